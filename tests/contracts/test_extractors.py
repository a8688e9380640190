"""What every extractor promises, asked of each one."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from dmpctl.errors import UsageError
from dmpctl.metrics.features.inception import Inception
from dmpctl.metrics.features.pixels import Pixels
from dmpctl.types import Extractor


@dataclass
class Case:
    """`make()` gives equal extractors; `other` is one with other weights or preprocessing."""

    make: Callable[[], Extractor]
    other: Callable[[], Extractor]
    images: Tensor


def random_images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def random_inception(path: Path, seed: int) -> Path:
    """Weights whose activations neither vanish nor explode (He initialisation)."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with patch.object(FeatureExtractorInceptionV3, "load_state_dict"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=nothing)
        for module in trunk.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(trunk.state_dict(), path)
    return path


@pytest.fixture(scope="module", params=["pixels-grey", "pixels-rgb", "inception"])
def case(request, tmp_path_factory) -> Case:
    match request.param:
        case "pixels-grey":
            return Case(lambda: Pixels(1, 8), lambda: Pixels(1, 16), random_images(6, 1, 8, 8))
        case "pixels-rgb":
            return Case(lambda: Pixels(3, 16), lambda: Pixels(1, 16), random_images(6, 3, 16, 16))
        case _:
            folder = tmp_path_factory.mktemp("extractors")
            first, second = (random_inception(folder / f"{seed}.pth", seed) for seed in range(2))
            images = random_images(4, 3, 16, 16)
            return Case(lambda: Inception(first, pinned=False), lambda: Inception(second, pinned=False), images)


@pytest.fixture(scope="module")
def extractor(case) -> Extractor:
    return case.make()


@pytest.fixture(scope="module")
def features(case, extractor) -> Tensor:
    return extractor(case.images)


def test_one_float32_row_of_the_promised_width_per_image(case, extractor, features):
    assert features.shape == (len(case.images), extractor.width)
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert not features.requires_grad


def test_features_tell_images_apart(features):
    assert torch.pdist(features.double()).min() > 1e-2


def test_batch_size_does_not_matter(case, extractor, features):
    one_by_one = torch.cat([extractor(image[None]) for image in case.images])
    torch.testing.assert_close(one_by_one, features, atol=1e-5, rtol=1e-5)
    uneven = torch.cat([extractor(batch) for batch in case.images.split(3)])
    torch.testing.assert_close(uneven, features, atol=1e-5, rtol=1e-5)


def test_the_same_images_give_the_same_features(case, extractor, features):
    before = case.images.clone()
    assert torch.equal(extractor(case.images), features)
    assert torch.equal(case.images, before)


def test_fingerprint_is_stable_and_names_what_it_is(case, extractor):
    assert case.make().fingerprint == extractor.fingerprint
    assert extractor.name in extractor.fingerprint


def test_fingerprint_changes_with_weights_or_preprocessing(case, extractor):
    assert case.other().fingerprint != extractor.fingerprint


@pytest.mark.parametrize("change", [Tensor.float, Tensor.long, Tensor.bool, lambda images: images[0]])
def test_anything_but_uint8_images_is_refused(case, extractor, change):
    with pytest.raises(UsageError, match="uint8"):
        extractor(change(case.images))
