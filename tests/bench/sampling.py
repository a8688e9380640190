"""Images of a patched and of an unpatched backbone, in latents."""

from functools import partial
from typing import Any

from tests.bench.case import Case
from tests.bench.timing import interleaved

SAMPLERS = {"DDPM-250": ("ddpm", 250), "DDIM-50": ("ddim", 50), "DPM-Solver++-20": ("dpm-solver++", 20)}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Images per second of whole batches, and patched over unpatched; every sampler has run two steps before."""
    actions = {}
    for name, (sampler, steps) in SAMPLERS.items():
        for which in case.models:
            case.sample(which, sampler, 2)
            actions[f"{name} {which}"] = partial(case.sample, which, sampler, steps)
    seconds = interleaved(actions, rounds, case.device, warm_ups=0)
    return {
        "images_per_second": {name: len(case.x0) / value for name, value in seconds.items()},
        "seconds patched / unpatched": {name: seconds[f"{name} patched"] / seconds[f"{name} unpatched"] for name in SAMPLERS},
    }
