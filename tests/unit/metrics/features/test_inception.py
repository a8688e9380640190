"""Inception without its weights: random ones in torch-fidelity's own file format, and torch-fidelity as the oracle."""

import hashlib
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.metrics.features import inception
from dmpctl.metrics.features.inception import PREPROCESSINGS, PUBLISHED_SHA256, Inception
from tests.helpers import Hostile
from tests.random_inception import random_images as images


@pytest.fixture(scope="module")
def extractor(weights) -> Inception:
    return Inception(weights, pinned=False)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (299, 299), (40, 330)])
def test_features_are_torch_fidelitys(weights, extractor, height, width):
    x = images(4, height, width)
    oracle = FeatureExtractorInceptionV3("oracle", ["2048"], feature_extractor_weights_path=str(weights))
    expected = oracle(x)[0]
    found = extractor(x)
    assert found.shape == (4, 2048)
    assert expected.std(dim=0).mean() > 0.02  # the images differ, so equality means something
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_features_are_torchmetrics_without_antialiasing(weights, extractor):
    from torchmetrics.image.fid import FrechetInceptionDistance

    x = images(4, 64, 64)
    theirs = FrechetInceptionDistance(feature_extractor_weights_path=str(weights), antialias=False)
    torch.testing.assert_close(extractor(x), theirs.inception(x), atol=1e-4, rtol=0)
    aliased = FrechetInceptionDistance(feature_extractor_weights_path=str(weights), antialias=True)
    assert (extractor(x) - aliased.inception(x)).abs().max() > 1e-2  # half a pixel of resize shows


def test_logits_are_those_that_torch_fidelity_scores(weights, extractor):
    x = images(3, 40, 40)
    oracle = FeatureExtractorInceptionV3("oracle", ["logits_unbiased"], feature_extractor_weights_path=str(weights))
    torch.testing.assert_close(extractor.outputs(x).logits, oracle(x)[0], atol=1e-4, rtol=0)


def test_spatial_features_are_tensorflows(weights, extractor):
    """ADM's `mixed_6/conv:0`: after its ReLU, seven channels, channels last: computed from the trunk layer by layer."""
    x = images(2, 40, 40)
    oracle = FeatureExtractorInceptionV3("oracle", ["2048"], feature_extractor_weights_path=str(weights))
    found = []
    oracle.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: found.append(output))
    oracle(x)
    expected = torch.stack([found[0][:, c, i, j] for i in range(17) for j in range(17) for c in range(7)], dim=1)
    spatial = extractor.outputs(x).spatial
    assert spatial.shape == (2, 2023)
    assert (spatial >= 0).all()
    torch.testing.assert_close(spatial, expected, atol=1e-5, rtol=0)


def test_one_pass_gives_the_features_of_a_plain_call(extractor):
    x = images(2, 24, 24)
    assert torch.equal(extractor.outputs(x).features, extractor(x))


def test_features_are_pytorch_fids(weights, monkeypatch):
    from pytorch_fid import inception as theirs

    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: torch.load(weights, weights_only=True))
    oracle = theirs.InceptionV3([theirs.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
    x = images(4, 64, 48)
    with torch.no_grad():
        expected = oracle(x.float() / 255)[0].flatten(1)
    own = Inception(weights, pinned=False, preprocessing="pytorch-fid")
    torch.testing.assert_close(own(x), expected, atol=1e-4, rtol=0)


def test_every_preprocessing_has_features_and_a_name_of_its_own(weights):
    x = images(2, 64, 64)
    extractors = [Inception(weights, pinned=False, preprocessing=kind) for kind in PREPROCESSINGS]
    assert len({extractor.fingerprint for extractor in extractors}) == 3
    first, second, third = (extractor(x) for extractor in extractors)
    assert min((first - second).abs().max(), (first - third).abs().max(), (second - third).abs().max()) > 1e-2


def test_grey_is_three_equal_channels(extractor):
    grey = images(2, 16, 16, channels=1)
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))


def test_weights_that_are_not_the_published_ones_are_refused(weights):
    with pytest.raises(IntegrityError) as refused:
        Inception(weights)
    for part in (str(weights), PUBLISHED_SHA256, hashlib.sha256(weights.read_bytes()).hexdigest()):
        assert part in refused.value.message
    assert refused.value.exit_code == 4


def test_unpinned_weights_say_so(weights, extractor):
    assert not extractor.known
    assert "unpinned" in extractor.fingerprint
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in extractor.fingerprint


def test_the_published_weights_are_known_even_when_not_pinned(weights, monkeypatch):
    monkeypatch.setattr(inception, "PUBLISHED_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
    pinned, unpinned = Inception(weights), Inception(weights, pinned=False)
    assert pinned.known
    assert unpinned.known
    assert pinned.fingerprint == unpinned.fingerprint
    assert "unpinned" not in pinned.fingerprint


def test_a_flipped_byte_is_noticed(weights, tmp_path, monkeypatch):
    data = bytearray(weights.read_bytes())
    monkeypatch.setattr(inception, "PUBLISHED_SHA256", hashlib.sha256(data).hexdigest())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(data)
    with pytest.raises(IntegrityError, match="expected"):
        Inception(tmp_path / "flipped.pth")


def test_missing_weights_name_the_command_that_fetches_them(tmp_path):
    with pytest.raises(MissingError) as missing:
        Inception(tmp_path / "none.pth")
    assert missing.value.exit_code == 3
    assert "dmpctl download inception" in (missing.value.hint or "")


def test_a_malicious_file_runs_no_code(tmp_path):
    target, path = tmp_path / "ran", tmp_path / "hostile.pth"
    torch.save({"weight": Hostile(target)}, path)
    with pytest.raises(IntegrityError, match="not a readable weights file"):
        Inception(path, pinned=False)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 half a zip", b"\x80\x02"])
def test_a_file_of_something_else_is_an_integrity_error(tmp_path, content):
    path = tmp_path / "other.pth"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"other\.pth"):
        Inception(path, pinned=False)


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [1, 2], {"epoch": 3}, {"state_dict": {"w": torch.zeros(1)}}, {1: torch.zeros(1)}]
)
def test_a_file_without_a_state_dict_is_an_integrity_error(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(IntegrityError, match="state dict"):
        Inception(tmp_path / "other.pth", pinned=False)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "misshapen"])
def test_weights_of_another_network_are_an_integrity_error(weights, tmp_path, fault):
    state = torch.load(weights, weights_only=True)
    match fault:
        case "missing":
            del state["Mixed_7c.branch1x1.conv.weight"]
        case "unexpected":
            state["head.weight"] = torch.zeros(1)
        case "misshapen":
            state["Mixed_7c.branch1x1.conv.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(IntegrityError, match="does not fit Inception") as refused:
        Inception(tmp_path / "other.pth", pinned=False)
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 400


def test_loading_leaves_everyones_random_numbers_alone(weights):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Inception(weights, pinned=False)
    assert torch.equal(torch.rand(3), expected)


def test_extraction_is_true_float32_and_leaves_no_trace(weights):
    own = Inception(weights, pinned=False)
    convolution, seen = torch.backends.cudnn.conv, []

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((convolution.fp32_precision, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), output.dtype))

    own._layers[0].conv.register_forward_hook(look)
    before = convolution.fp32_precision
    try:
        convolution.fp32_precision = "tf32"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = own(images(1, 8, 8))
        assert seen == [("ieee", False, False, torch.float32)]
        assert convolution.fp32_precision == "tf32"
        with pytest.raises(RuntimeError), patch.object(own, "_prepare", side_effect=RuntimeError):
            own(images(1, 8, 8))
        assert convolution.fp32_precision == "tf32"
    finally:
        convolution.fp32_precision = before
    assert not features.requires_grad
    assert not any(module.training for layer in own._layers for module in layer.modules())


@pytest.mark.parametrize("channels", [2, 4])
def test_only_grey_and_rgb(extractor, channels):
    with pytest.raises(UsageError, match=f"{channels} channels"):
        extractor(images(1, 8, 8, channels))
