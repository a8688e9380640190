"""Clocks: actions taken in turn, whole commands, and what a step keeps and where its time goes."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from statistics import median

import torch
from torch import Tensor

from tests.helpers import environment


def interleaved(
    actions: dict[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    warm_ups: int = 2,
) -> dict[str, float]:
    """Median seconds of each action, taken in turn so that a drift of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + warm_ups):
        for name, action in actions.items():
            finish(device)
            start = time.perf_counter()
            action()
            finish(device)
            if number >= warm_ups:
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def finish(device: str) -> None:
    """Wait until the device has done all that it was asked to."""
    if device == "cuda":
        torch.cuda.synchronize()


def top_costs(action: Callable[[], object], device: str, count: int = 8) -> dict[str, float]:
    """Share of a step that its dearest operations take by themselves, by torch's profiler."""
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else [])]
    with torch.profiler.profile(activities=kinds) as profile:
        action()
        finish(device)
    times = {
        event.key: float(event.self_device_time_total if device == "cuda" else event.self_cpu_time_total)
        for event in profile.key_averages()
    }
    total = sum(times.values())
    return {name: round(times[name] / total, 4) for name in sorted(times, key=lambda name: -times[name])[:count]}


def saved_bytes(action: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Bytes of activations that autograd keeps for one step, each storage counted once and the weights left out."""
    held = {weight.untyped_storage().data_ptr() for weight in weights}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        action()
    return sum(seen.values())


def peak_mib(action: Callable[[], object], device: str) -> float:
    """MiB above what lies on the GPU before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    finish(device)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def command(*line: object) -> Callable[[], object]:
    """`dmpctl` with these words, as a whole process."""
    words = [sys.executable, "-m", "dmpctl", *map(str, line)]
    return lambda: subprocess.run(words, check=True, env=environment(), capture_output=True)
