"""Figures that are logged beside the losses: means between two log lines, speed, data wait, peak memory."""

import resource
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dmpctl.training.inputs import Inputs


class Averages:
    """Running means of a few scalars between two log lines, without waiting for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Add one step's figures; none: a step that was skipped, which the means leave out."""
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        self._count += bool(figures)

    def take(self) -> dict[str, float]:
        """Means since the last call."""
        means = {name: float(total) / max(self._count, 1) for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means


class Clock:
    """Speed and data wait between two log lines."""

    def __init__(self, batch_size: int) -> None:
        self._batch = batch_size
        self._reset()

    def _reset(self) -> None:
        self._start, self._wait, self._steps = time.perf_counter(), 0.0, 0

    def next_of(self, stream: Iterator[Inputs]) -> Inputs:
        """Returns the next inputs of a stream and counts one step; the time that they take is waiting for data."""
        since = time.perf_counter()
        taken = next(stream)
        self._wait += time.perf_counter() - since
        self._steps += 1
        return taken

    def take(self) -> dict[str, float]:
        """steps/sec, images/sec, share of time spent waiting for data, and peak memory in MiB; starts anew."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        rate = self._steps / elapsed
        figures = {
            "steps": float(self._steps),
            "steps_per_sec": round(rate, 3),
            "images_per_sec": round(rate * self._batch, 1),
            "data_wait": round(self._wait / elapsed, 4),
            "peak_memory_mib": peak_memory_mib(),
        }
        self._reset()
        return figures


def peak_memory_mib() -> float:
    """Peak memory of this process in MiB: of the GPU where one is used, else resident."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
