"""The paired loss: denoising error of two models on the same images, timesteps, noise and captions. The sharpest there is.

25 fixed timesteps, one fixed noise; differences of 1e-5 show where Fréchet distances of samples do not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dmpctl.diffusion.schedule import schedule_of, split_prediction
from dmpctl.models.conditions import Conditions, Labels, captions_of, encoded
from dmpctl.models.patched import Patched
from dmpctl.rng import seed_of
from dmpctl.settings.model import Settings
from dmpctl.types import Progress, Source

TIMESTEPS = 25
MOST_IMAGES = 2_000
PROFILE_IMAGES = 500


@dataclass(frozen=True)
class LossDifference:
    """Mean squared epsilon (of a flow: velocity) error of two models; `difference` is patched minus backbone, negative is better.

    `standard_error` is over the images, which are the unit of sampling; `bands` is the difference per timestep.
    """

    backbone: float
    patched: float
    difference: float
    standard_error: float
    images: int
    timesteps: tuple[int, ...]
    bands: tuple[float, ...]


@torch.no_grad()  # not inference_mode: a model that is moved in here is trained later
def epsilon_errors(
    model: Patched,
    source: Source,
    device: torch.device,
    seed: int,
    progress: Progress,
    batch: int = 512,
    most: int | None = None,
) -> tuple[Tensor, list[int]]:
    """Squared epsilon error [T, N] float64 at T evenly spaced timesteps for N images, and those timesteps.

    `most` images at most, None: 2 000.
    """
    spec = model.backbone.spec
    schedule = schedule_of(spec.schedule).to(device)
    steps = [int(t) for t in torch.linspace(0, spec.schedule.steps - 1, 2 * TIMESTEPS + 1)[1::2]]
    count = min(len(source), MOST_IMAGES if most is None else most)
    x0, told, numbers = clean_images(model, source, count, device, progress, batch)
    errors = torch.empty(len(steps), count, dtype=torch.float64)
    model.to(device)
    with progress.track("paired loss", len(steps)) as task:
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
    model: Patched, source: Source, count: int, device: torch.device, progress: Progress, batch: int = 512
) -> tuple[Tensor, Conditions | None, Tensor]:
    """Latents [count, C, H, W] on the CPU of so many images, what the backbone is told, and under which numbers [count].

    That is their classes, or the first caption of each; None: nothing.
    """
    chosen = [i * len(source) // count for i in range(count)]  # spread evenly: class folders are sorted
    items = [source.item(i) for i in chosen]
    images, labels = torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
    x0 = torch.cat([model.codec.encode(part.to(device)).mean.cpu() for part in torch.split(images, batch)])
    spec = model.backbone.spec
    if model.text is None:
        return x0, (Labels(spec.null_class) if spec.num_classes else None), labels
    texts = [captions_of(source, index, 1)[0] for index in chosen]
    return x0, encoded(texts, model.text, Settings(), progress), torch.arange(count)


def error_profile(model: Patched, source: Source, seed: int, device: torch.device, progress: Progress) -> dict[int, float]:
    """Mean squared epsilon error at evenly spaced timesteps, under a noise that no report is made with."""
    errors, steps = epsilon_errors(model, source, device, seed_of(seed, "profile"), progress, most=PROFILE_IMAGES)
    return dict(zip(steps, errors.mean(1).tolist(), strict=True))


def loss_difference(backbone: Tensor, patched: Tensor, steps: list[int]) -> LossDifference:
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
    )
