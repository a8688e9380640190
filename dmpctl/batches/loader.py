"""The images of each training step, a pure function of (seed, step): nothing to save or skip, equal for any layout of ranks."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import count
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dmpctl.batches.caption_states import CaptionNumbers
from dmpctl.batches.latents import LatentCache
from dmpctl.errors import DmpError, UsageError
from dmpctl.rng import seed_of
from dmpctl.types import Ordered, Source

MOST_HELD_OUT = 2_000  # images: as many as the paired loss is measured on
Batch = tuple[Tensor, Tensor]  # images, or moments; labels, or numbers of captions
Place = tuple[int, int]  # (epoch, index): which image, in which pass over the data


@runtime_checkable
class Held(Protocol):
    """A source that may hold all of its images in memory, so that a batch is one gather."""

    def images(self) -> Tensor | None:
        """uint8 [N, C, S, S]; None if they are not held."""
        ...

    def labels(self) -> Tensor:
        """int64 [N]."""
        ...


Draw = Callable[[int, torch.Generator], Tensor]  # a tensor [n] for n images


def permutation(n: int, generator: torch.Generator) -> Tensor:
    """The order of one epoch, int64 [n]."""
    return torch.randperm(n, generator=generator)


def coins(n: int, generator: torch.Generator) -> Tensor:
    """A fair coin for every image, bool [n]."""
    return torch.rand(n, generator=generator) < 0.5


def held_out(count: int, share: float) -> list[int]:
    """Which of so many images are kept from training to be measured on: an even share, as images may be sorted by class."""
    held = min(round(share * count), MOST_HELD_OUT)
    return [i * count // held for i in range(held)]


def order_of(source: Source, held: Sequence[int] = ()) -> Draw:
    """How the order of an epoch is drawn: the source's own way, else a permutation; without the images that are `held` out."""
    own = (lambda n, generator: source.order(generator)) if isinstance(source, Ordered) else permutation
    if not held:
        return own

    def order(n: int, generator: torch.Generator) -> Tensor:
        found = own(n + len(held), generator)
        return found[~torch.isin(found, torch.tensor(held))]

    return order


class EachEpoch:
    """A tensor [n] for each epoch, drawn from (seed, purpose, epoch) and kept while that epoch lasts."""

    def __init__(self, draw: Draw, n: int, seed: int, purpose: str) -> None:
        self._draw, self._n, self._seed, self._purpose = draw, n, seed, purpose
        self._kept: dict[int, Tensor] = {}

    def of(self, epoch: int) -> Tensor:
        """The tensor [n] of one epoch."""
        if epoch not in self._kept:
            if len(self._kept) > 1:  # a batch may lie across two epochs
                del self._kept[min(self._kept)]
            self._kept[epoch] = self._draw(self._n, torch.Generator().manual_seed(seed_of(self._seed, self._purpose, epoch)))
        return self._kept[epoch]

    def at(self, epochs: Tensor, slots: Tensor) -> Tensor:
        """Element slots[i] of the tensor of epochs[i], for int64 [B] and [B]."""
        first, last = int(epochs.min()), int(epochs.max())
        if first == last:
            return self.of(first)[slots]
        return torch.stack([self.of(epoch) for epoch in range(first, last + 1)])[epochs - first, slots]


class StepBatches(Sampler[list[Place]]):
    """A batch sampler without end: step s has the same `size` images on every layout of ranks, each rank taking its stride.

    Epochs are laid end to end, so a batch may lie across two of them; each has every index once, in the order that `draw` gives.
    `size` is the global batch, `start` the first step. Raises UsageError if `size` does not divide over `world`, or n is 0.
    """

    def __init__(
        self, n: int, size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1, draw: Draw = permutation
    ) -> None:
        if n < 1:
            raise UsageError("there is no image to train on", "check --data")
        if size % world:
            hint = f"take a --batch-size that is a multiple of {world}, or another --num-processes"
            raise UsageError(f"a batch of {size} does not divide over {world} processes", hint)
        self.n, self.size, self.seed, self.start, self.rank = n, size, seed, start, rank
        self._mine = torch.arange(rank, size, world)
        self._order = EachEpoch(draw, n, seed, "order")

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Epochs and indices of this rank's images at one step, int64 [size / world] each."""
        position = step * self.size + self._mine
        epochs = position // self.n
        return epochs, self._order.at(epochs, position % self.n)

    def __iter__(self) -> Iterator[list[Place]]:
        for step in count(self.start):
            epochs, indices = self.at(step)
            yield list(zip(epochs.tolist(), indices.tolist(), strict=True))


class TrainingItems(Dataset[Batch | DmpError]):
    """Images as training takes them, by (epoch, index).

    With `hflip` an image is mirrored in half of the epochs: a function of (seed, epoch, index). Of a `LatentCache`
    there are moments, floating [2C, h, w], in place of images. `numbers`: of captions, given in place of labels;
    None: labels.
    """

    def __init__(self, source: Source, hflip: bool, seed: int, numbers: CaptionNumbers | None = None) -> None:
        self.source, self.hflip, self._numbers = source, hflip, numbers
        self._mirrored = EachEpoch(coins, len(source), seed, "mirror")

    def __getitems__(self, places: Sequence[Place]) -> Batch | DmpError:
        """Returns `at`, or its expected failure as a value: raised in a loader process, it would arrive as traceback and text."""
        try:
            return self.at(places)
        except DmpError as error:
            return error

    def at(self, places: Sequence[Place]) -> Batch:
        """Images uint8 [B, C, S, S] and labels int64 [B]; one gather if the source is held in memory."""
        epochs, indices = torch.tensor(places).unbind(1)
        source, mirrored = self.source, torch.zeros(len(indices), dtype=torch.bool)
        if self.hflip:
            mirrored = self._mirrored.at(epochs, indices)
        if isinstance(source, LatentCache):
            images, labels = source.gather(indices, mirrored), source.labels()[indices]
        elif isinstance(source, Held) and (held := source.images()) is not None:
            images, labels = held[indices], source.labels()[indices]
        else:
            items = [source.item(index) for index in indices.tolist()]
            images, labels = torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
        if self.hflip and not isinstance(source, LatentCache):
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
        return images, labels if self._numbers is None else self._numbers.at(epochs, indices)


def as_fetched(batch: Any) -> Any:
    """The collate function: batches are gathered already."""
    return batch


def leave_process_group(worker: int) -> None:
    """Put a loader process into its own group: Ctrl-C and a launcher's killpg must reach the trainer only, which saves first."""
    os.setpgrp()


def batches(
    source: Source, order: StepBatches, hflip: bool = False, num_workers: int = 0, numbers: CaptionNumbers | None = None
) -> Generator[Batch, None, None]:
    """Images uint8 [B, C, S, S] and labels int64 [B] of this rank, in `order`, without end.

    Of a `LatentCache`: moments [B, 2C, h, w] in place of images; `numbers` as in `TrainingItems`. `close()` ends the
    loader processes. Nothing is drawn from torch's global generator. Raises in its turn what an item raises.
    """
    items = TrainingItems(source, hflip, order.seed, numbers)
    return _loaded(items, order, num_workers, seed_of(order.seed, "loader", order.rank))


def in_order(source: Source, items: Sequence[int], batch_size: int, num_workers: int = 0) -> Generator[Batch, None, None]:
    """Images uint8 [B, C, S, S] and labels int64 [B] of these items as they are, each once. Otherwise like `batches`."""
    parts = [[(0, index) for index in items[first : first + batch_size]] for first in range(0, len(items), batch_size)]
    return _loaded(TrainingItems(source, hflip=False, seed=0), parts, num_workers, 0)


def _loaded(items: TrainingItems, order: Iterable[list[Place]], num_workers: int, seed: int) -> Generator[Batch, None, None]:
    fetched: Iterator[Batch | DmpError] = iter(
        DataLoader(
            items,
            batch_sampler=order,
            collate_fn=as_fetched,
            num_workers=num_workers,
            worker_init_fn=leave_process_group,
            persistent_workers=num_workers > 0,
            generator=torch.Generator().manual_seed(seed),  # or it would draw from the global one
        )
    )
    try:
        for batch in fetched:
            if isinstance(batch, DmpError):
                raise batch
            yield batch
    finally:
        del fetched  # the last reference ends the processes now; left to the garbage collector they take 5 sec each
