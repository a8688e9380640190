"""timm's networks with random weights of their own: the same features, and files that do not fit."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.metrics.features.timm import DINOV2, TimmFeatures
from tests.random_inception import random_images as images

SMALL = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model(SMALL, pretrained=False).eval()


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("timm") / "tiny.safetensors"
    save_file(network.state_dict(), path)
    return path


def test_features_are_timms_before_its_classes(network, weights):
    x = images(2, 224, 224)
    config = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = network.forward_head(network.forward_features((x / 255 - mean) / std), pre_logits=True)
    extractor = TimmFeatures(SMALL, weights)
    torch.testing.assert_close(extractor(x), expected, atol=1e-4, rtol=0)
    assert extractor(x).shape == (2, extractor.width)
    assert extractor.name == f"timm-{SMALL}"


def test_grey_is_three_equal_channels(weights):
    extractor, grey = TimmFeatures(SMALL, weights), images(1, 16, 16, channels=1)
    torch.testing.assert_close(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))
    assert torch.equal(extractor.outputs(grey).features, extractor(grey))
    with pytest.raises(UsageError, match="2 channels"):
        extractor(images(1, 16, 16, channels=2))


def test_a_pickle_of_plain_tensors_will_do_and_another_hash_is_another_fingerprint(network, weights, tmp_path):
    torch.save(network.state_dict(), tmp_path / "tiny.pt")
    first, second = TimmFeatures(SMALL, weights), TimmFeatures(SMALL, tmp_path / "tiny.pt")
    x = images(1, 32, 32)
    assert torch.equal(first(x), second(x))
    assert first.fingerprint != second.fingerprint


def test_dinov2_takes_its_weights_at_518_pixels_and_looks_at_224(tmp_path, monkeypatch):
    """The small DINOv2 in place of the large one, whose file has the same layout."""
    small = "vit_small_patch14_dinov2.lvd142m"
    monkeypatch.setattr("dmpctl.metrics.features.timm.DINOV2", small)
    published = timm.create_model(small, pretrained=False, num_classes=0)
    assert published.pos_embed.shape[1] == 37 * 37 + 1  # 518 / 14
    save_file(published.state_dict(), tmp_path / "small.safetensors")
    extractor = TimmFeatures(small, tmp_path / "small.safetensors")
    assert extractor.name == "dinov2"
    assert "bicubic-antialias-224 mean (0.485, 0.456, 0.406)" in extractor.fingerprint
    assert extractor(images(1, 64, 64)).shape == (1, 384)


def test_the_published_name_is_one_that_timm_knows():
    assert timm.is_model(DINOV2)


def test_what_is_not_there_or_does_not_fit(weights, tmp_path):
    with pytest.raises(UsageError, match="timm has no model") as unknown:
        TimmFeatures("vit_tinny", weights)
    assert "vit_tin" in (unknown.value.hint or "")
    with pytest.raises(MissingError, match="are not there"):
        TimmFeatures(SMALL, tmp_path / "none.pt")
    with pytest.raises(IntegrityError, match="does not fit"):
        TimmFeatures("vit_small_patch16_224", weights)
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(IntegrityError, match="does not fit"):
        TimmFeatures(SMALL, tmp_path / "other.safetensors")
