"""Samplers against diffusers' schedulers on a toy denoiser, and on Gaussian data whose best denoiser is known."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dmpctl.diffusion.samplers import Sampler, sample
from dmpctl.diffusion.schedule import NoiseSchedule
from dmpctl.errors import NumericalError, UsageError
from dmpctl.rng import ImageDraws
from dmpctl.types import ScheduleSpec

GOLDEN = Path(__file__).parents[2] / "golden"
SHAPE = (3, 4, 6, 6)
DIFFUSERS_KIND = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
ALL: list[Sampler] = ["ddpm", "ddim", "dpm-solver++", "unipc"]


def schedule_of(kind: str = "linear", steps: int = 1000) -> NoiseSchedule:
    return NoiseSchedule.from_spec(ScheduleSpec(kind, steps))  # type: ignore[arg-type]


def toy(x: Tensor, t: Tensor) -> Tensor:
    """Bounded in epsilon and in the variance half, and nonlinear in x and t."""
    when = t.view(-1, 1, 1, 1) / 1000
    return torch.cat([torch.tanh(x) * (0.3 + when), torch.sin(3 * x + when)], dim=1)


def toy_eps(x: Tensor, t: Tensor) -> Tensor:
    return toy(x, t)[:, : x.shape[1]]


class Draws:
    """Normal draws of one generator, counted."""

    def __init__(self, seed: int = 0) -> None:
        self.generator, self.count = torch.Generator().manual_seed(seed), 0

    def __call__(self) -> Tensor:
        self.count += 1
        return torch.randn(SHAPE, generator=self.generator)


def by_diffusers(scheduler: Any, predict: Callable[[Tensor, Tensor], Tensor], **step: Any) -> Tensor:
    """The scheduler's own loop, its noise from the generator that `Draws` uses."""
    draws = Draws()
    x = draws()
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t.repeat(len(x))), t, x, **({"generator": draws.generator} | step)).prev_sample
    return x


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("learned", [True, False])
def test_ddpm_equals_diffusers(learned: bool, kind: str) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(
        beta_schedule=DIFFUSERS_KIND[kind],
        variance_type="learned_range" if learned else "fixed_large",
        timestep_spacing="linspace",
        clip_sample=False,
    )
    theirs.set_timesteps(20)
    predict = toy if learned else toy_eps
    found, expected = sample(predict, Draws(), schedule_of(kind), learned, "ddpm", 20), by_diffusers(theirs, predict)
    # float32 cumulative products in diffusers move the first steps of the cosine schedule
    assert float((found - expected).abs().max() / expected.std()) < (1e-4 if kind == "linear" else 5e-3)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_equals_diffusers(eta: float) -> None:
    """Over every step of a short schedule, where diffusers' previous timestep is the true one."""
    from diffusers import DDIMScheduler

    schedule = schedule_of(steps=50)
    theirs = DDIMScheduler(50, trained_betas=schedule.betas.tolist(), clip_sample=False, timestep_spacing="linspace")
    theirs.set_timesteps(50)
    found, expected = sample(toy, Draws(), schedule, True, "ddim", 50, eta), by_diffusers(theirs, toy_eps, eta=eta)
    assert float((found - expected).abs().max() / expected.std()) < 1e-4


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 10, 25])
def test_dpm_solver_equals_diffusers_with_its_own_timesteps(steps: int, kind: str) -> None:
    from diffusers import DPMSolverMultistepScheduler

    scheduler: Any = DPMSolverMultistepScheduler
    theirs = scheduler(beta_schedule=DIFFUSERS_KIND[kind], lambda_min_clipped=-5.1)
    theirs.set_timesteps(steps)
    found, expected = sample(toy, Draws(), schedule_of(kind), True, "dpm-solver++", steps), by_diffusers(theirs, toy_eps)
    assert float((found - expected).abs().max() / expected.std()) < 1e-4


@pytest.mark.parametrize("steps", [5, 20])
def test_unipc_is_that_of_diffusers(steps: int) -> None:
    from diffusers import UniPCMultistepScheduler

    scheduler: Any = UniPCMultistepScheduler
    theirs = scheduler(beta_schedule="linear")
    theirs.set_timesteps(steps)
    x = Draws()()
    for t in theirs.timesteps:
        x = theirs.step(toy_eps(x, t.repeat(len(x))), t, x).prev_sample
    found, expected = sample(toy, Draws(), schedule_of(), True, "unipc", steps), x
    assert float((found - expected).abs().max() / expected.std()) < 1e-4


@pytest.mark.parametrize(
    ("sampler", "eta", "steps", "learned"),
    [
        ("ddpm", 0.0, 1000, False),
        ("ddpm", 0.0, 1000, True),
        ("ddim", 0.0, 250, False),
        ("ddim", 1.0, 1000, False),
        ("dpm-solver++", 0.0, 250, False),
        ("unipc", 0.0, 250, False),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_gaussian_data_is_recovered(kind: str, sampler: Sampler, eta: float, steps: int, learned: bool) -> None:
    """Data N(mu, s²): epsilon = sqrt(1 - abar) (x - sqrt(abar) mu) / (abar s² + 1 - abar) is exact, so mu and s² come back."""
    mu, s, schedule = 0.7, 0.4, schedule_of(kind)
    abar = schedule.alphas_cumprod.float()

    def best(x: Tensor, t: Tensor) -> Tensor:
        a = abar[t].view(-1, 1, 1, 1)
        eps = (1 - a).sqrt() * (x - a.sqrt() * mu) / (a * s**2 + 1 - a)
        return torch.cat([eps, torch.zeros_like(eps)], dim=1) if learned else eps

    generator = torch.Generator().manual_seed(11)
    with torch.inference_mode():
        x0 = sample(best, lambda: torch.randn(16, 1, 32, 32, generator=generator), schedule, learned, sampler, steps, eta)
    count = x0.numel()
    assert float(x0.mean()) == pytest.approx(mu, abs=5 * s / math.sqrt(count) + 0.005)
    assert float(x0.var()) == pytest.approx(s**2, rel=5 * math.sqrt(2 / count) + 0.02)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_denoiser_sees_the_golden_original_timesteps(sampler: Sampler) -> None:
    golden = load_file(GOLDEN / "uncond-soft.tensors.safetensors")
    seen: list[Tensor] = []

    def watching(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return toy(x, t)

    sample(watching, Draws(), schedule_of(), True, sampler, 10)
    assert all(t.shape == (3,) and t.dtype == torch.int64 and len(t.unique()) == 1 for t in seen)
    assert [int(t[0]) for t in seen] == golden["sample.timesteps"].sort(descending=True).values.tolist()


@pytest.mark.parametrize(
    ("sampler", "eta", "draws"),
    [("ddpm", 0.0, 10), ("ddim", 0.0, 1), ("ddim", 0.5, 10), ("dpm-solver++", 0.0, 1), ("unipc", 0.0, 1)],
)
def test_noise_is_drawn_once_per_noisy_step(sampler: Sampler, eta: float, draws: int) -> None:
    """x_T and every step but the last, which adds none."""
    drawing, done = Draws(), list[int]()
    sample(toy, drawing, schedule_of(), True, sampler, 10, eta, done.append)
    assert drawing.count == draws
    assert done == list(range(1, 11))


@pytest.mark.parametrize("sampler", ALL)
def test_an_image_does_not_depend_on_its_batch(sampler: Sampler) -> None:
    def images(*indices: int) -> Tensor:
        return sample(toy, ImageDraws(7, indices, SHAPE[1:]), schedule_of(), True, sampler, 8, eta=0.3)

    torch.testing.assert_close(images(0, 1, 2)[1:], torch.cat([images(1), images(2)]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ALL)
def test_states_are_float32_for_a_half_precision_denoiser(sampler: Sampler) -> None:
    def half(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return toy(x, t).bfloat16()

    assert sample(half, Draws(), schedule_of(), True, sampler, 5).dtype == torch.float32


@pytest.mark.parametrize("sampler", ALL)
def test_a_result_that_is_not_finite_is_refused(sampler: Sampler) -> None:
    def breaks(x: Tensor, t: Tensor) -> Tensor:
        prediction = toy(x, t)
        prediction[1, 0, 0, 0] = math.nan
        return prediction

    with pytest.raises(NumericalError, match="1 of 3 samples are not finite after 5"):
        sample(breaks, Draws(), schedule_of(), True, sampler, 5)


@pytest.mark.parametrize("sampler", ALL)
def test_one_step_is_enough(sampler: Sampler) -> None:
    assert sample(toy, Draws(), schedule_of(), True, sampler, 1).isfinite().all()


@pytest.mark.parametrize("sampler", ALL)
def test_more_steps_than_the_schedule_has_are_refused(sampler: Sampler) -> None:
    most = 999 if sampler in ("dpm-solver++", "unipc") else 1000  # the solvers do not visit timestep 0
    assert sample(toy, Draws(), schedule_of(), True, sampler, most).isfinite().all()
    with pytest.raises(UsageError, match=str(most + 1)):
        sample(toy, Draws(), schedule_of(), True, sampler, most + 1)
