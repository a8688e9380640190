"""The latent cache as a source: its items are what the codec says, and its key is all that decides them."""

import pickle
from itertools import islice

import pytest
import torch

from dmpctl.batches.latents import LatentCache, latent_shards, pack, unpack
from dmpctl.batches.loader import StepBatches, TrainingItems, batches, order_of
from dmpctl.data.bundled import Digits
from dmpctl.errors import IntegrityError, UsageError
from dmpctl.models.encode import build_latents
from dmpctl.types import Moments, Silent
from tests.latent_helpers import Ramp

EXACT = torch.float32


class Few:
    """The first digits, as images that may be mirrored."""

    name, num_classes, mirror = "few", 10, True

    def __init__(self, count: int = 30, fingerprint: str = "f" * 64, size: int = 8, channels: int = 1) -> None:
        self.count, self.fingerprint, self.size = count, fingerprint, size
        self.digits = Digits(channels=channels)

    def __len__(self) -> int:
        return self.count

    def item(self, index: int):
        image, label = self.digits.item(range(self.count)[index])
        return image[:, : self.size, : self.size], label


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def cache(root):
    return build_latents(Few(), Ramp(), root, Silent(), batch=7, dtype=EXACT, per_shard=8)


def expected(indices, mirrored):
    images = torch.stack([Few().item(int(index))[0] for index in indices])
    return pack(Ramp().encode(torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)), EXACT)


def realistic(count=64):
    """Moments as real autoencoders give them: means near 1, and anything from near certain to as wide as the latents."""
    draw = torch.Generator().manual_seed(0)
    mean = torch.randn(count, 4, 8, 8, generator=draw)
    return Moments(mean, -33 + 34 * torch.rand(mean.shape, generator=draw))


def test_float32_keeps_everything():
    moments = realistic()
    kept = unpack(pack(moments, EXACT))
    assert torch.equal(kept.mean, moments.mean)
    assert torch.equal(kept.logvar, moments.logvar)


def test_float16_changes_latents_by_less_than_a_thousandth():
    moments = realistic()
    kept = unpack(pack(moments, torch.float16))
    assert kept.mean.dtype == kept.logvar.dtype == torch.float32
    noise = torch.randn(moments.mean.shape, generator=torch.Generator().manual_seed(1))
    exact, found = (m.mean.double() + (0.5 * m.logvar.double()).exp() * noise for m in (moments, kept))
    assert 0 < float((found - exact).norm() / exact.norm()) < 1e-3
    spread = [(0.5 * m.logvar.double()).exp() for m in (moments, kept)]
    assert ((kept.mean - moments.mean).abs() <= 2**-11 * moments.mean.abs() + 2**-25).all()
    assert (spread[1] / spread[0] - 1).abs().max() <= 33.5 / 2 * 2**-11
    assert (spread[1] - spread[0])[moments.logvar < 0].abs().max() < 2e-4


def test_an_exact_codec_has_nothing_to_cache():
    with pytest.raises(UsageError, match="nothing to cache"):
        pack(Moments(torch.zeros(1, 1, 2, 2)), torch.float16)


def test_items_are_the_moments_of_the_images(cache):
    assert len(cache) == 30
    assert (cache.name, cache.num_classes, cache.mirror) == ("few", 10, True)
    for index in (0, 7, 8, 29):
        moments, label = cache.item(index)
        assert torch.equal(moments, expected([index], torch.tensor([False]))[0])
        assert label == Few().item(index)[1] == int(cache.labels()[index])
    with pytest.raises(IndexError):
        cache.item(30)


def test_any_images_and_mirrors_in_one_gather(cache):
    indices = torch.tensor([29, 3, 3, 16, 0, 8, 7])
    mirrored = torch.tensor([True, True, False, False, True, False, True])
    found = cache.gather(indices, mirrored)
    assert torch.equal(found, expected(indices, mirrored))
    flipped = cache.gather(indices, ~mirrored)
    assert not torch.equal(flipped.flip(-1), found)  # a mirror's latents are no mirrored latents


def test_float16_is_the_default(root):
    cache = build_latents(Few(), Ramp(), root, Silent())
    found = cache.gather(torch.arange(30), torch.zeros(30, dtype=torch.bool))
    assert found.dtype == torch.float16
    assert torch.equal(found, expected(range(30), torch.zeros(30, dtype=torch.bool)).half())


def test_training_sees_the_moments_of_what_it_would_see(cache):
    places = [(epoch, index) for epoch in (0, 1, 5) for index in range(30)]
    for hflip in (False, True):
        images, labels = TrainingItems(Few(), hflip, seed=3).at(places)
        moments, same_labels = TrainingItems(cache, hflip, seed=3).at(places)
        assert torch.equal(moments, pack(Ramp().encode(images), EXACT))
        assert torch.equal(labels, same_labels)


def test_workers_and_copies_change_nothing(cache):
    copy = pickle.loads(pickle.dumps(cache))  # noqa: S301
    assert len(pickle.dumps(cache)) < 2_000
    one, two, three = (
        list(islice(batches(source, StepBatches(30, 8, 1), hflip=True, num_workers=workers), 6))
        for source, workers in ((cache, 0), (cache, 2), (copy, 0))
    )
    for first, second, third in zip(one, two, three, strict=True):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[0], third[0])
        assert torch.equal(first[1], second[1])


def test_without_mirrors_there_are_none(root):
    cache = build_latents(Few(), Ramp(), root, Silent(), flip=False, dtype=EXACT)
    indices, none = torch.arange(30), torch.zeros(30, dtype=torch.bool)
    assert not cache.mirror
    assert torch.equal(cache.gather(indices, none), expected(indices, none))
    with pytest.raises(UsageError, match="without mirrored images"):
        cache.gather(indices, ~none)


class Wider(Ramp):
    scale = 2.0


@pytest.mark.parametrize(
    "other",
    [
        lambda root: latent_shards(root, Few(), Ramp("1" * 64), True),
        lambda root: latent_shards(root, Few(), Wider(), True),
        lambda root: latent_shards(root, Few(fingerprint="e" * 64), Ramp(), True),
        lambda root: latent_shards(root, Few(size=6), Ramp(), True),
        lambda root: latent_shards(root, Few(channels=3), Ramp(), True),
        lambda root: latent_shards(root, Few(29), Ramp(), True),
        lambda root: latent_shards(root, Few(), Ramp(), False),
        lambda root: latent_shards(root, Few(), Ramp(), True, EXACT),
    ],
    ids=["codec", "scale", "data", "size", "channels", "count", "flip", "dtype"],
)
def test_whatever_decides_latents_is_in_the_key(root, other):
    first, second = latent_shards(root, Few(), Ramp(), True), other(root)
    assert second.digest != first.digest
    assert second.folder != first.folder
    assert first.folder.parent == second.folder.parent == root / "latents"


def test_the_key_is_written_out(cache):
    assert cache._shards.key == {
        "schema_version": 1,
        "kind": "latents",
        "codec": "0" * 64,
        "scale": 1.0,
        "data": "f" * 64,
        "channels": 1,
        "size": 8,
        "crop": "adm-center",
        "flip": True,
        "dtype": "float32",
        "count": 30,
        "per_shard": 8,
    }


def test_a_cache_with_a_hole_is_not_opened(tmp_path):
    shards = build_latents(Few(), Ramp(), tmp_path, Silent(), per_shard=8)._shards
    shards.path(2).unlink()
    with pytest.raises(IntegrityError, match=r"lacks shard-00002"):
        LatentCache(shards)


class Turned(Few):
    """Read from its end, whatever the seed."""

    def order(self, generator):
        return torch.arange(len(self)).flip(0)


def labels_read(source):
    """The labels of the first three batches of ten."""
    order = StepBatches(len(source), 10, 0, draw=order_of(source))
    return [label for _, part in islice(batches(source, order), 3) for label in part.tolist()]


def test_latents_are_read_in_the_order_of_their_images(root):
    """So that a run may go on with the cache, or without it."""
    cache = build_latents(Turned(fingerprint="e" * 64), Ramp(), root, Silent(), dtype=EXACT, per_shard=8)
    for source in (cache, pickle.loads(pickle.dumps(cache))):  # noqa: S301
        labels = labels_read(source)
        assert labels == [Few().item(index)[1] for index in reversed(range(30))]
    assert labels != labels_read(LatentCache(cache._shards))
