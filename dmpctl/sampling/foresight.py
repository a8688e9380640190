"""A word beforehand where images will take long: measured on a few calls of the model, and what to type for less."""

import time
from datetime import timedelta

import torch

from dmpctl.models.patched import Patched
from dmpctl.processes.threads import threads_for
from dmpctl.settings.measuring import Sampling
from dmpctl.types import Progress

LONG = 600.0  # sec that nobody need be told of beforehand
ENOUGH = 0.3  # sec of one call, beyond which no larger batch is tried


@torch.no_grad()  # not inference_mode: a model that is moved in here is trained later
def seconds_for(model: Patched, images: int, sampling: Sampling, device: torch.device) -> float:
    """How long so many images will take about: a call on ever more images at once is timed, the last one counts."""
    model.to(device)
    at_once, spec = min(images, sampling.sample_batch), model.backbone.spec
    count, took = 1, 0.0
    with threads_for(spec.parameters):
        while True:
            x, first = torch.zeros(count, *spec.latent_shape, device=device), torch.zeros(count, dtype=torch.int64, device=device)
            told = model.prompts.captions.of(first.cpu()).to(device) if model.prompts else first if spec.num_classes else None
            for _ in range(2):  # the first call prepares much
                began = time.perf_counter()
                model.predict(x, first + 1, told).sum().item()  # which waits for the device
                took = time.perf_counter() - began
                if took > ENOUGH:
                    break
            if took > ENOUGH or count == at_once:
                calls = sampling.steps * (1 + (sampling.sampler == "heun")) * (1 + (sampling.cfg != 1))
                return took / count * images * calls
            count = min(4 * count, at_once)


def foresee(
    model: Patched, images: int, sampling: Sampling, device: torch.device, progress: Progress, fewer: str, sides: int = 1
) -> None:
    """Say it before images that take more than ten minutes; `fewer`: the option that makes fewer of them."""
    if images and (model.backbone.spec.text is None or model.prompts is not None):
        seconds = sides * seconds_for(model, images, sampling, device)
        if seconds > LONG:
            what = f"{images:,}" if sides == 1 else f"{sides} x {images:,}"
            ahead = timedelta(seconds=60 * round(seconds / 60))
            less = f"{fewer}, or fewer --steps (--sampler {'heun' if model.backbone.spec.schedule.kind == 'flow' else 'ddim'})"
            progress.say(f"{what} images in {sampling.steps} steps will take about {ahead} on {device}; for less: {less}")
