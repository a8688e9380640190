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
from tests.contracts.rows import Rows

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


def other_weights(path: Path, to: Path) -> Path:
    """The weights in `path` with one number changed."""
    state = torch.load(path, weights_only=True)
    state["fc.bias"][0] += 1
    torch.save(state, to)
    return to


rows = Rows("case", ["pixels-grey", "pixels-rgb", "inception", "inception-clean", "timm"])


@pytest.fixture(scope="module")
def case(request, tmp_path_factory, random_inception) -> Case:
    folder, images = tmp_path_factory.mktemp("extractors"), random_images(3, 3, 16, 16)
    match request.param:
        case "pixels-grey":
            return Case(lambda: Pixels(1, 8), lambda: Pixels(1, 16), random_images(6, 1, 8, 8))
        case "pixels-rgb":
            return Case(lambda: Pixels(3, 16), lambda: Pixels(1, 16), random_images(6, 3, 16, 16))
        case "inception":
            second = other_weights(random_inception, folder / "other.pth")
            return Case(lambda: Inception(random_inception, pinned=False), lambda: Inception(second, pinned=False), images)
        case "inception-clean":
            own = partial(Inception, random_inception, pinned=False)
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


@rows.but("")
def test_one_float32_row_of_the_promised_width_per_image(case, extractor, features):
    assert features.shape == (len(case.images), extractor.width)
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert not features.requires_grad


@rows.on("pixels-grey inception timm")
def test_one_pass_gives_the_features_of_a_plain_call(case, extractor, features):
    assert torch.equal(extractor.outputs(case.images).features, features)


@rows.but("")
def test_features_tell_images_apart(features):
    assert torch.pdist(features.double()).min() > 1e-2


@rows.on("pixels-rgb inception timm")
def test_batch_size_does_not_matter(case, extractor, features):
    one_by_one = torch.cat([extractor(image[None]) for image in case.images])
    torch.testing.assert_close(one_by_one, features, atol=1e-5, rtol=1e-5)
    uneven = torch.cat([extractor(batch) for batch in case.images.split(2)])
    torch.testing.assert_close(uneven, features, atol=1e-5, rtol=1e-5)


@rows.but("pixels-grey inception")
def test_the_same_images_give_the_same_features(case, extractor, features):
    before = case.images.clone()
    assert torch.equal(extractor(case.images), features)
    assert torch.equal(case.images, before)


@rows.on("pixels-grey inception-clean timm")
def test_fingerprint_is_stable_and_names_what_it_is(case, extractor):
    assert case.make().fingerprint == extractor.fingerprint
    assert extractor.name in extractor.fingerprint


@rows.but("")
def test_fingerprint_changes_with_weights_or_preprocessing(case, extractor):
    assert case.other().fingerprint != extractor.fingerprint


@rows.with_each(
    "change", [Tensor.float, Tensor.long, Tensor.bool, lambda images: images[0]], "pixels-grey | inception-clean timm"
)
def test_anything_but_uint8_images_is_refused(case, extractor, change):
    with pytest.raises(UsageError, match="uint8"):
        extractor(change(case.images))


def test_every_row_is_asked_for_what_it_promises():
    assert not rows.forgotten()
