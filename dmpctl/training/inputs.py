"""What a training step takes from the processor: its batch and all that is drawn for it.

Where another device computes, it is made while that is busy with the step before.
"""

from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, Queue
from threading import Event, Thread
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

PATIENCE = 5.0  # sec to wait at the end for an item that is being made: a source may hang


@dataclass(frozen=True)
class Inputs:
    """One step's batch, on the CPU: a function of (seed, step, sample) alone.

    `images`: uint8 [B, C, S, S], or moments floating [B, 2C, h, w]; `latent_noise`: what a draw from those takes, None where
    there is nothing to draw; `cond`: None for an unconditional backbone.
    """

    images: Tensor
    latent_noise: Tensor | None
    t: Tensor
    noise: Tensor
    cond: Tensor | None
    gate_noise: Tensor | None

    def to(self, device: torch.device) -> "Inputs":
        """The same on another device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if value is not None})


@dataclass(frozen=True)
class Failed:
    """What came in place of an item."""

    error: BaseException


def one_ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same items, made by a thread before they are asked for; what fails in making one is raised in its turn.

    The first is made here, so that loader processes have this thread as their parent. `close()` closes `items`, too.
    """
    made: Queue[T | Failed | None] = Queue(1)  # None: there are no more
    left = Event()

    def make() -> None:
        try:
            for item in items:
                made.put(item)
                if left.is_set():
                    return
            made.put(None)
        except BaseException as error:
            made.put(Failed(error))

    thread = Thread(target=make, name="inputs", daemon=True)
    try:
        item: T | Failed | None = next(items, None)
        if item is not None:
            thread.start()
        while item is not None:
            if isinstance(item, Failed):
                raise item.error
            yield item
            item = made.get()
    finally:
        left.set()
        if thread.ident is not None:
            with suppress(Empty):
                made.get_nowait()  # it may wait for room
            thread.join(PATIENCE)
        if not thread.is_alive():
            items.close()
