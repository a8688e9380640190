"""Images of a patched and of an unpatched backbone, in latents."""

from functools import partial
from typing import Any

from benchmarks.bench.case import Case
from benchmarks.bench.timing import interleaved

SAMPLERS = {"DDPM-250": ("ddpm", 250), "DDIM-50": ("ddim", 50), "DPM-Solver++-20": ("dpm-solver++", 20)}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Images per second of whole batches, each sampled once; and what a patch costs, by pairs of steps taken in turn.

    A machine drifts by more over minutes than a patch costs: the ratio of two whole batches says nothing.
    """
    seconds = interleaved({which: partial(case.sample, which, "ddim", 2) for which in case.models}, rounds, case.device)
    whole = {
        f"{name} {which}": partial(case.sample, which, sampler, steps)
        for name, (sampler, steps) in SAMPLERS.items()
        for which in case.models
    }
    return {
        "step patched / unpatched": seconds["patched"] / seconds["unpatched"],
        "images_per_second": {
            name: len(case.x0) / value for name, value in interleaved(whole, 1, case.device, warm_ups=0).items()
        },
    }
