"""What every extractor promises, asked of each one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from dmpctl.errors import UsageError
from dmpctl.metrics.features.inception import Inception
from dmpctl.metrics.features.pixels import Pixels
from dmpctl.metrics.features.timm import TimmFeatures
from dmpctl.types import Extractor
from tests.random_inception import write_random_inception

TINY = "vit_tiny_patch16_224"


@dataclass
class Case:
    """`make()` gives equal extractors; `other` is one with other weights or preprocessing."""

    make: Callable[[], Extractor]
    other: Callable[[], Extractor]
    images: Tensor


def random_images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def random_timm(path: Path, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_file(timm.create_model(TINY, pretrained=False, num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="module", params=["pixels-grey", "pixels-rgb", "inception", "inception-clean", "timm"])
def case(request, tmp_path_factory) -> Case:
    folder, images = tmp_path_factory.mktemp("extractors"), random_images(4, 3, 16, 16)
    match request.param:
        case "pixels-grey":
            return Case(lambda: Pixels(1, 8), lambda: Pixels(1, 16), random_images(6, 1, 8, 8))
        case "pixels-rgb":
            return Case(lambda: Pixels(3, 16), lambda: Pixels(1, 16), random_images(6, 3, 16, 16))
        case "inception":
            first, second = (write_random_inception(folder / f"{seed}.pth", seed) for seed in range(2))
            return Case(lambda: Inception(first, pinned=False), lambda: Inception(second, pinned=False), images)
        case "inception-clean":
            path = write_random_inception(folder / "random.pth")
            own = partial(Inception, path, pinned=False)
            return Case(lambda: own(preprocessing="clean"), lambda: own(preprocessing="pytorch-fid"), images)
        case _:
            first, second = (random_timm(folder / f"{seed}.safetensors", seed) for seed in range(2))
            return Case(lambda: TimmFeatures(TINY, first), lambda: TimmFeatures(TINY, second), images)


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


def test_one_pass_gives_the_features_of_a_plain_call(case, extractor, features):
    assert torch.equal(extractor.outputs(case.images).features, features)


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
