"""Checkpoints written behind training's back: it waits for a copy in memory, not for the disk."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from torch import Tensor

from dmpctl.runs import checkpoint
from dmpctl.runs.checkpoint import TrainerState
from dmpctl.runs.records import Description


class Saver:
    """Context that writes the checkpoints of one run into `folder`, one at a time, in order.

    `keep`, `keep_every`: which stay, as in `checkpoint.save`. What goes wrong is raised by the next call.
    """

    def __init__(self, folder: Path, kind: str, keep: int, keep_every: int | None = None) -> None:
        self._folder, self._kind, self._keep, self._keep_every = folder, kind, keep, keep_every
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._going: Future[Path] | None = None

    def save(self, state: TrainerState, untrained: Mapping[str, Tensor], described: Description) -> None:
        """Write this checkpoint, after the one before; returns when all of it has been copied.

        What is used afterwards: the average where one is kept, else the raw weights, and `untrained` tensors of the module.
        """
        self.finish()
        kept = checkpoint.copied(state)
        weights = checkpoint.copied_tensors(untrained) | kept.raw | kept.ema
        self._going = self._pool.submit(
            checkpoint.save, self._folder, self._kind, weights, described, kept, self._keep, self._keep_every
        )

    def check(self) -> None:
        """Raise what went wrong, if it is known already."""
        if self._going is not None and self._going.done():
            self.finish()

    def finish(self) -> None:
        """Wait until everything is on disk; raises what went wrong."""
        going, self._going = self._going, None
        if going is not None:
            going.result()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown()
        if kind is None:
            self.finish()
