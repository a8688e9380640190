import multiprocessing
import os
from collections import Counter
from itertools import islice

import pytest
import torch
from torch import Tensor

from dmpctl.batches.loader import StepBatches, TrainingItems, batches, order_of, permutation
from dmpctl.data.bundled import Digits
from dmpctl.errors import IntegrityError, UsageError


class Unheld:
    """The digits, one by one; `broken` is an index that cannot be read."""

    name, num_classes, mirror, fingerprint = "unheld", 10, True, "none"

    def __init__(self, broken: int | None = None) -> None:
        self.digits, self.broken = Digits(), broken

    def __len__(self) -> int:
        return len(self.digits)

    def item(self, index: int) -> tuple[Tensor, int]:
        if index == self.broken:
            raise IntegrityError(f"image {index} cannot be decoded", "repair it")
        return self.digits.item(index)


def first(count: int, source=None, batch_size=12, start=0, rank=0, world=1, **options):
    source = source or Digits()
    order = StepBatches(len(source), batch_size, 3, start, rank, world, order_of(source))
    return list(islice(batches(source, order, **options), count))


def equal(one, two):
    pairs = zip(one, two, strict=True)
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(("n", "size"), [(12, 4), (10, 4), (7, 7), (5, 16), (1, 3)])
def test_every_epoch_sees_each_index_once(n, size):
    places = [place for batch in islice(StepBatches(n, size, seed=0), 3 * n) for place in batch]
    whole = len(places) // n
    assert whole >= 3
    for epoch in range(whole):
        assert places[epoch * n][0] == epoch
        assert Counter(places[epoch * n : (epoch + 1) * n]) == Counter((epoch, index) for index in range(n))


def test_epochs_and_seeds_have_their_own_order():
    orders = {tuple(next(iter(StepBatches(50, 50, seed, start)))) for seed in range(4) for start in range(4)}
    assert len({tuple(index for _, index in order) for order in orders}) == 16


def test_the_order_is_the_one_that_earlier_runs_were_trained_in():
    assert [index for _, index in next(iter(StepBatches(10, 10, seed=0)))] == [2, 0, 1, 4, 5, 8, 7, 6, 9, 3]


@pytest.mark.parametrize("start", [0, 1, 2, 3, 11])
def test_starting_at_a_step_equals_skipping_to_it(start):
    assert list(islice(StepBatches(10, 4, 0, start), 5)) == list(islice(StepBatches(10, 4, 0), start, start + 5))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_layout_of_ranks_sees_the_same_global_batch(world):
    ranks = [islice(StepBatches(30, 8, 5, 2, rank, world), 20) for rank in range(world)]
    together = [[place for turn in zip(*step, strict=True) for place in turn] for step in zip(*ranks, strict=True)]
    assert together == list(islice(StepBatches(30, 8, 5, 2), 20))


def test_a_batch_that_does_not_divide_is_refused_at_once():
    with pytest.raises(UsageError, match="12 does not divide over 5 processes") as caught:
        StepBatches(1797, 12, 0, world=5)
    assert caught.value.exit_code == 2
    assert "--batch-size" in str(caught.value.hint)


def test_no_images_are_refused():
    with pytest.raises(UsageError, match="no image"):
        StepBatches(0, 4, 0)


def test_batches_are_what_the_order_says():
    digits = Digits()
    for step, (images, labels) in enumerate(first(5)):
        _, indices = StepBatches(len(digits), 12, 3).at(step)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert torch.equal(images, digits.images()[indices])
        assert torch.equal(labels, digits.labels()[indices])


def test_batches_of_ranks_interleave_to_the_global_batch():
    ranks = [first(3, rank=rank, world=2, hflip=True) for rank in range(2)]
    for step, (images, labels) in enumerate(first(3, hflip=True)):
        for rank in range(2):
            assert torch.equal(images[rank::2], ranks[rank][step][0])
            assert torch.equal(labels[rank::2], ranks[rank][step][1])


@pytest.mark.parametrize("source", [Digits(), Unheld()], ids=["held", "unheld"])
def test_workers_change_nothing(source):
    assert equal(first(6, source=source, hflip=True, start=148, num_workers=2), first(6, hflip=True, start=148))


def test_resuming_gives_the_same_images_and_mirrors():
    assert equal(first(8, hflip=True, batch_size=600)[3:], first(5, hflip=True, batch_size=600, start=3))


def test_a_mirror_depends_on_seed_epoch_and_index_only():
    items = TrainingItems(Digits(), hflip=True, seed=1)
    places = [(epoch, index) for epoch in (0, 3, 1) for index in range(0, 200, 7)]
    together, labels = items.at(places)
    for row, place in enumerate(places):
        image, label = items.at([place])
        assert torch.equal(image[0], together[row])
        assert int(label) == int(labels[row]) == int(Digits().labels()[place[1]])


def test_half_of_the_images_are_mirrored_and_the_rest_left_alone():
    digits = Digits()
    places = [(epoch, index) for epoch in range(4) for index in range(1000)]
    images, _ = TrainingItems(digits, hflip=True, seed=0).at(places)
    plain = digits.images()[[index for _, index in places]]
    kept, turned = (images == plain).flatten(1).all(1), (images == plain.flip(-1)).flatten(1).all(1)
    assert (kept | turned).all()
    assert abs(float(turned.double().mean()) - 0.5) < 4 * 0.5 / 4000**0.5 + 0.01  # four standard errors, few symmetric digits
    by_epoch = turned.view(4, 1000)
    assert all(0.4 < float((by_epoch[0] != by_epoch[epoch]).double().mean()) < 0.6 for epoch in (1, 2, 3))
    assert torch.equal(TrainingItems(digits, hflip=False, seed=0).at(places)[0], plain)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generator_is_not_touched(workers):
    before = torch.get_rng_state()
    first(3, hflip=True, num_workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_leave_the_process_group_and_end_with_the_batches():
    others = set(multiprocessing.active_children())
    running = batches(Digits(), StepBatches(1797, 12, 0), num_workers=2)
    next(running), next(running)  # one of each
    mine = [child for child in multiprocessing.active_children() if child not in others]
    assert len(mine) == 2
    assert os.getpgid(0) not in {os.getpgid(child.pid or 0) for child in mine}
    running.close()
    assert not set(mine) & set(multiprocessing.active_children())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_expected_failure_keeps_its_words(workers):
    with pytest.raises(IntegrityError) as caught:
        first(160, source=Unheld(broken=5), num_workers=workers)
    assert caught.value.message == "image 5 cannot be decoded"
    assert caught.value.hint == "repair it"


class Blocks(Unheld):
    """Thirty digits that are read in blocks of ten: like what is fetched part by part."""

    def __len__(self) -> int:
        return 30

    def order(self, generator: torch.Generator) -> Tensor:
        blocks = torch.arange(30).view(3, 10)[torch.randperm(3, generator=generator)]
        return torch.cat([block[torch.randperm(10, generator=generator)] for block in blocks])


def indices_of(labelled):
    """Which digit each image is: of the first thirty no two are alike."""
    first = Digits().images()[:30].flatten(1)
    return [int((first == image.flatten()).all(1).nonzero()) for images, _ in labelled for image in images]


def test_a_source_is_read_in_its_own_order():
    assert order_of(Unheld()) is permutation
    seen = indices_of(first(10, source=Blocks(), batch_size=6))
    epochs = [seen[start : start + 30] for start in (0, 30)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(30))
        assert all(len({index // 10 for index in epoch[start : start + 10]}) == 1 for start in (0, 10, 20))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_its_order_does_not_depend_on_ranks_resuming_or_workers(world):
    whole = first(12, source=Blocks(), batch_size=8, hflip=True)
    for start, workers in ((0, 0), (5, 0), (2, 2)):
        given = {"source": Blocks(), "batch_size": 8, "hflip": True, "start": start, "num_workers": workers, "world": world}
        ranks = [first(4, rank=rank, **given) for rank in range(world)]
        for step, (images, labels) in enumerate(whole[start : start + 4]):
            for rank in range(world):
                assert torch.equal(images[rank::world], ranks[rank][step][0])
                assert torch.equal(labels[rank::world], ranks[rank][step][1])
