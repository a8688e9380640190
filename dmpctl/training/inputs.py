"""The inputs of a training step, made by the processor: its batch and all that is drawn for it.

Where another device computes, they are made while that is busy with the step before.
"""

from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from queue import Empty, Queue
from threading import Event, Thread
from typing import TypeVar

import torch
from torch import Tensor

from dmpctl.batches.caption_states import CaptionNumbers
from dmpctl.batches.loader import StepBatches, batches, held_out, order_of
from dmpctl.codecs.identity import Identity
from dmpctl.diffusion.timesteps import TimestepDensity
from dmpctl.models.conditions import Conditions
from dmpctl.processes.ranks import Ranks
from dmpctl.rng import StepDraws
from dmpctl.settings.model import Settings
from dmpctl.types import BackboneSpec, Codec, Source

T = TypeVar("T")

PATIENCE = 5.0  # sec to wait at the end for an item that is being made: a source may hang


@dataclass(frozen=True)
class Inputs:
    """One step's batch, on the CPU: a function of (seed, step, sample) alone.

    `images`: uint8 [B, C, S, S], or moments floating [B, 2C, h, w]; `latent_noise`: for a draw from those, None where
    there is nothing to draw; `cond`: None for an unconditional backbone.
    """

    images: Tensor
    latent_noise: Tensor | None
    t: Tensor
    noise: Tensor
    cond: Tensor | None
    gate_noise: Tensor | None

    def to(self, device: torch.device) -> "Inputs":
        """These inputs on another device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if value is not None})


@dataclass(frozen=True)
class InputMaker:
    """Makes this rank's inputs of any step; each kind of noise has a random stream of its own.

    `source`: images, or the moments that `codec` has encoded them into. `gate_noise`: shape of one sample's, None: there is none.
    `conditions`: for the backbone, None: it takes none; `numbers`: of them, for each image, None: its label. `density`: of
    timesteps, None: uniform.
    """

    source: Source
    codec: Codec
    spec: BackboneSpec
    settings: Settings
    ranks: Ranks
    gate_noise: tuple[int, ...] | None
    conditions: Conditions | None
    numbers: CaptionNumbers | None
    density: TimestepDensity | None

    def order(self, start: int) -> StepBatches:
        """The order of this rank's images from step `start` on."""
        size, seed, ranks = self.settings.train.batch_size, self.settings.run.seed, self.ranks
        held = held_out(len(self.source), self.settings.evaluate.held_out or 0.0)
        count, draw = len(self.source) - len(held), order_of(self.source, held)
        return StepBatches(count, size, seed, start, ranks.rank, ranks.world, draw)

    def from_step(self, start: int) -> Generator[Inputs, None, None]:
        """The inputs of step `start` and all later ones, without end."""
        data = self.settings.data
        mirror = self.source.mirror if data.hflip is None else data.hflip
        with closing(batches(self.source, self.order(start), mirror, data.num_workers, self.numbers)) as stream:
            for step, (images, labels) in enumerate(stream, start):
                yield self.drawn(step, images, labels)

    def drawn(self, step: int, images: Tensor, labels: Tensor) -> Inputs:
        """The inputs of a step whose batch is at hand."""
        shape = self.spec.latent_shape
        exact = isinstance(self.codec, Identity) and not images.is_floating_point()
        return Inputs(
            images,
            None if exact else self._draws.at(step, "latent").normal(*shape),
            self._timesteps(step),
            self._draws.at(step, "noise").normal(*shape),
            self._condition(step, labels),
            None if self.gate_noise is None else self._draws.at(step, "gate").normal(*self.gate_noise),
        )

    @cached_property
    def _draws(self) -> StepDraws:
        return StepDraws(self.settings.run.seed, self.settings.train.batch_size, self.ranks.rank, self.ranks.world)

    def _timesteps(self, step: int) -> Tensor:
        """int64 [B], uniform or of the density; of a flow floating, uniform between the two ends."""
        draws, schedule = self._draws.at(step, "timestep"), self.spec.schedule
        if self.density is not None:
            return self.density.draw(draws.uniform())
        return draws.uniform() * schedule.steps if schedule.kind == "flow" else draws.integers(schedule.steps)

    def _condition(self, step: int, labels: Tensor) -> Tensor | None:
        """Each sample's condition, the null one for a share of them (--class-dropout); None for an unconditional backbone."""
        if self.conditions is None:
            return None
        dropped = self._draws.at(step, "label").uniform() < self.settings.objective.class_dropout
        null = self.conditions.null
        return self.conditions.of(labels if null is None else torch.where(dropped, null, labels))


def one_ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """Yields `items`, made by a thread before they are asked for; an exception in making one is raised in its turn.

    The first is made here, so that loader processes have this thread as their parent. `close()` closes `items`, too.
    """
    made: Queue[T | BaseException | None] = Queue(1)  # an exception came in place of an item; None: there are no more
    left = Event()

    def make() -> None:
        try:
            for item in items:
                made.put(item)
                if left.is_set():
                    return
            made.put(None)
        except BaseException as error:
            made.put(error)

    thread = Thread(target=make, name="inputs", daemon=True)
    try:
        item: T | BaseException | None = next(items, None)
        if item is not None:
            thread.start()
        while item is not None:
            if isinstance(item, BaseException):
                raise item
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
