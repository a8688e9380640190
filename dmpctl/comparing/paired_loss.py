"""The paired loss: denoising error of two models on the same images, timesteps, noise and captions. The sharpest there is.

25 fixed timesteps, one fixed noise; differences of 1e-5 show where Fréchet distances of samples do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmpctl.diffusion.schedule import schedule_of, split_prediction
from dmpctl.measuring.verdict import in_words
from dmpctl.metrics.frechet import CONFIDENCE
from dmpctl.models.conditions import Conditions, Labels, captions_of, encoded
from dmpctl.models.patched import Patched
from dmpctl.processes.threads import threads_for
from dmpctl.rng import seed_of
from dmpctl.settings.model import Settings
from dmpctl.types import Progress, Source

TIMESTEPS = 25
MOST_IMAGES = 2_000
PROFILE_IMAGES = 500
LEAST = 0.001  # smallest share of the loss that a verdict names: bfloat16 changes as much (docs/precision.md)


@dataclass(frozen=True)
class LossDifference:
    """Mean squared epsilon (of a flow: velocity) error of two models; `difference` is patched minus backbone, negative is better.

    `standard_error` is over the images, which are the unit of sampling; `bands` is the difference per timestep; `held_out`:
    the patch was not trained on these images.
    """

    backbone: float
    patched: float
    difference: float
    standard_error: float
    images: int
    timesteps: tuple[int, ...]
    bands: tuple[float, ...]
    held_out: bool = False


@torch.no_grad()  # not inference_mode: a model that is moved in here is trained later
def epsilon_errors(
    model: Patched,
    source: Source,
    device: torch.device,
    seed: int,
    progress: Progress,
    batch: int = 512,
    most: int | None = None,
    among: Sequence[int] | None = None,
) -> tuple[Tensor, list[int]]:
    """Squared epsilon error [T, N] float64 at T evenly spaced timesteps for N images, and those timesteps.

    `most` images at most, None: 2 000, spread evenly over those `among` the source, None: all.
    """
    spec = model.backbone.spec
    schedule = schedule_of(spec.schedule).to(device)
    steps = [int(t) for t in torch.linspace(0, spec.schedule.steps - 1, 2 * TIMESTEPS + 1)[1::2]]
    images = range(len(source)) if among is None else among
    count = min(len(images), MOST_IMAGES if most is None else most)
    chosen = [images[i * len(images) // count] for i in range(count)]  # spread evenly: class folders are sorted
    x0, told, numbers = clean_images(model, source, chosen, device, progress, batch)
    errors = torch.empty(len(steps), count, dtype=torch.float64)
    model.to(device)
    with threads_for(spec.parameters), progress.track("paired loss", len(steps)) as task:
        for row, t in enumerate(steps):
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed_of(seed, "paired", t)))
            for first in range(0, count, batch):
                part = slice(first, first + batch)
                at = torch.full((len(x0[part]),), t, device=device)
                cond = None if told is None else told.of(numbers[part]).to(device)
                clean, added = x0[part].to(device), noise[part].to(device)
                prediction = model.predict(schedule.add_noise(clean, at, added), at, cond)
                found, _ = split_prediction(prediction, spec.latent_shape[0], spec.learned_sigma)
                errors[row, part] = (found - schedule.target(clean, added)).square().flatten(1).mean(1).double().cpu()
            task.advance()
    return errors, steps


def clean_images(
    model: Patched, source: Source, chosen: Sequence[int], device: torch.device, progress: Progress, batch: int = 512
) -> tuple[Tensor, Conditions | None, Tensor]:
    """Latents [n, C, H, W] on the CPU of the images chosen, what the backbone is told, and under which numbers [n].

    That is their classes, or the first caption of each; None: nothing.
    """
    items = [source.item(i) for i in chosen]
    images, labels = torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
    x0 = torch.cat([model.codec.encode(part.to(device)).mean.cpu() for part in torch.split(images, batch)])
    spec = model.backbone.spec
    if model.text is None:
        return x0, (Labels(spec.null_class) if spec.num_classes else None), labels
    texts = [captions_of(source, index, 1)[0] for index in chosen]
    return x0, encoded(texts, model.text, Settings(), progress), torch.arange(len(chosen))


def error_profile(model: Patched, source: Source, seed: int, device: torch.device, progress: Progress) -> dict[int, float]:
    """Mean squared epsilon error at evenly spaced timesteps, under a noise that no report is made with."""
    errors, steps = epsilon_errors(model, source, device, seed_of(seed, "profile"), progress, most=PROFILE_IMAGES)
    return dict(zip(steps, errors.mean(1).tolist(), strict=True))


def loss_difference(backbone: Tensor, patched: Tensor, steps: list[int], held_out: bool = False) -> LossDifference:
    """Compare errors [T, N] of the two models, image by image."""
    gain = (patched - backbone).mean(0)
    return LossDifference(
        backbone=float(backbone.mean()),
        patched=float(patched.mean()),
        difference=float(gain.mean()),
        standard_error=float(gain.std() / len(gain) ** 0.5),
        images=len(gain),
        timesteps=tuple(steps),
        bands=tuple(float(v) for v in (patched - backbone).mean(1)),
        held_out=held_out,
    )


def loss_verdict(loss: LossDifference) -> str:
    """Verdict on a difference of paired losses: its size, and which images it is of."""
    which = "held-out" if loss.held_out else "training"
    certain = f"{100 * CONFIDENCE:.0f} % confidence over the {loss.images} {which} images"
    return in_words(loss.difference, loss.standard_error, loss.backbone, LEAST, certain)
