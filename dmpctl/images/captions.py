"""Captions: several to an image, one of them drawn for each epoch."""

from typing import Protocol, runtime_checkable

from dmpctl.rng import seed_of


@runtime_checkable
class Captioned(Protocol):
    """A source whose images may have captions."""

    def captions(self, index: int) -> tuple[str, ...]:
        """All captions of one image, in an order that never changes; () without."""
        ...


def drawn(count: int, seed: int, epoch: int, index: int) -> int:
    """Which of its `count` captions image `index` has in one epoch: a function of (seed, epoch, index)."""
    return seed_of(seed, "caption", epoch, index) % count
