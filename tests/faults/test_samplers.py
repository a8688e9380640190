"""Samplers are what their names say elsewhere: SiT's SDE by its formula, diffusers' timesteps; presets are whose they claim."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmpctl.diffusion.samplers import sample
from dmpctl.diffusion.schedule import FlowSchedule, NoiseSchedule
from dmpctl.errors import NumericalError, UsageError
from dmpctl.settings.layers import read_toml
from dmpctl.types import ScheduleSpec
from tests.helpers import SMALL, run_cli

ROOT = Path(__file__).parents[2]


def curved(x: Tensor, t: Tensor) -> Tensor:
    """A velocity that depends on x and on the time from noise (0) to images (1)."""
    time = t.view(-1, 1, 1, 1)
    return torch.sin(2 * x + time) + 0.5 * time


@pytest.mark.parametrize("steps", [2, 10, 250])
def test_euler_maruyama_is_the_published_sde_of_sit(steps: int) -> None:
    """Ma et al. 2024, eq. 4-6, for alpha = t, sigma = 1 - t, w = sigma, time from noise to images; last step: the mean."""
    generator = torch.Generator().manual_seed(5)
    noises = [torch.randn(3, 2, 4, 4, generator=generator) for _ in range(steps)]

    def drift(x: Tensor, t: float) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = t, 1 - t, 1.0, -1.0
        v = curved(x, torch.full((3,), t, dtype=x.dtype))
        ratio = alpha / d_alpha
        score = (ratio * v - x) / (sigma**2 - ratio * d_sigma * sigma)
        return v + sigma * score

    times = torch.linspace(0, 0.96, steps, dtype=torch.float64).tolist()
    x = noises[0].double()
    for (now, then), noise in zip(pairwise(times), noises[1:], strict=True):
        x = x + (then - now) * drift(x, now) + (2 * (1 - now) * (then - now)) ** 0.5 * noise.double()
    x = x + 0.04 * drift(x, 0.96)

    drawn = iter(noises)
    found = sample(lambda x, t: curved(x, 1 - t / 1000), lambda: next(drawn), FlowSchedule(1000), False, "euler-maruyama", steps)
    torch.testing.assert_close(found.double(), x, rtol=0, atol=2e-4 * float(x.std()))


def test_dpm_solver_visits_the_timesteps_of_diffusers_at_every_count(monkeypatch) -> None:
    """1000 alone is refused: diffusers visits one timestep twice there, and its own result is NaN."""
    from diffusers import DPMSolverMultistepScheduler

    schedule, kind = NoiseSchedule.from_spec(ScheduleSpec()), DPMSolverMultistepScheduler
    theirs: Any = kind(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    begun: list[Any] = []

    class Seen(kind):
        """The solver, cut short: it says which timesteps it was about to visit."""

        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            begun.append(self.timesteps)
            self.timesteps = self.timesteps[:0]

    monkeypatch.setattr("diffusers.DPMSolverMultistepScheduler", Seen)
    for steps in range(1, 1000):
        sample(lambda x, t: x, lambda: torch.zeros(1, 1, 1, 1), schedule, False, "dpm-solver++", steps)
        theirs.set_timesteps(steps)
        assert torch.equal(begun[-1], theirs.timesteps), steps
    theirs.set_timesteps(1000)
    assert len(theirs.timesteps.unique()) == 999
    with pytest.raises(UsageError, match=r"dpm-solver\+\+ takes at most 999 steps"):
        sample(lambda x, t: x, lambda: torch.zeros(1, 1, 1, 1), schedule, False, "dpm-solver++", 1000)


def test_the_example_of_imagenet_encodes_and_decodes_as_published() -> None:
    path = ROOT / "examples" / "imagenet256-dit-xl2.toml"
    found = read_toml(path)
    assert (found["patch"]["codec"], found["fid"]["codec"]) == ("vae-ema", "vae-ema")
    assert "mse" not in path.read_text("utf-8")


def test_readme_help_and_settings_agree_on_whose_recipe_a_preset_is() -> None:
    readme, place = (ROOT / "README.md").read_text("utf-8"), (ROOT / "docs" / "recipes.md").read_text("utf-8")
    asked = run_cli("patch", "--preset", "dmp-code", "--print-config", cwd=ROOT)
    text = run_cli("patch", "--preset", "dmp", "--print-config", cwd=ROOT)
    assert (asked.code, text.code) == (0, 0)
    assert ["balance", "per-sample", "preset", "dmp-code"] in [line.split() for line in asked.out.splitlines()]
    assert ["balance", "shazeer", "preset", "dmp"] in [line.split() for line in text.out.splitlines()]
    words = " ".join(run_cli("patch", "--help", cwd=ROOT, env={"COLUMNS": "200"}).out.split())
    assert "dmp (the paper's text), dmp-code (its published code)" in words
    assert "docs/recipes.md#the-papers-text-and-the-published-code" in readme
    assert "## The paper's text and the published code" in place


def test_a_model_that_was_moved_while_it_measured_is_trained_later() -> None:
    """`.to("cpu:0")` copies every tensor, as to a GPU: what it makes has to be trained through."""
    from dmpctl.comparing.paired_loss import error_profile
    from dmpctl.data.bundled import Digits
    from dmpctl.models.backbone import load_backbone
    from dmpctl.models.patched import Patched
    from dmpctl.sampling.generate import generate
    from dmpctl.settings.measuring import Sampling
    from dmpctl.settings.sections import Base
    from dmpctl.types import Silent

    model, device = Patched(load_backbone(Base())), torch.device("cpu", 0)
    error_profile(model, Digits(), 0, device, Silent())
    images = generate(model, [0], Sampling(steps=2), device)
    held = [*model.backbone.model.state_dict().values(), images]
    assert not any(tensor.is_inference() for tensor in held)
    weights = model.backbone.model.x_embedder.proj.weight.requires_grad_()
    model.backbone.model.x_embedder(torch.zeros(1, 1, 8, 8)).sum().backward()
    assert weights.grad is not None


@pytest.mark.slow
def test_importance_sampling_of_timesteps_in_two_processes(tmp_path: Path) -> None:
    given = ("--batch-size", SMALL["batch_size"], "--iters", 2, "--eval-images", 4, "--steps", 2, "--no-evaluate")
    done = run_cli("patch", "--run", tmp_path / "run", "--preset", "dmp+", "--cpu", "--num-processes", 2, *given, cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "timesteps.json").is_file()


def test_dopri5_is_the_pair_of_dormand_and_prince() -> None:
    """Against scipy's RK45 with SiT's tolerances, image by image: the same steps, so the same end."""
    from scipy.integrate import solve_ivp

    start, asked = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(2)), []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        asked.append(1 - t / 1000)
        return curved(x, 1 - t / 1000)

    found = sample(watched, lambda: start, FlowSchedule(1000), False, "dopri5", 250)
    for number, image in enumerate(start):

        def slope(time: float, flat: Any) -> Any:
            return curved(torch.from_numpy(flat).view(1, 1, 4, 4), torch.tensor([time], dtype=torch.float64)).flatten().numpy()

        theirs = solve_ivp(slope, (0, 1), image.double().flatten().numpy(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found[number].double().flatten(), torch.from_numpy(theirs.y[:, -1]), rtol=0, atol=1e-4)
        assert len(asked) >= theirs.nfev - 6
    alone = sample(watched, lambda: start[1:2], FlowSchedule(1000), False, "dopri5", 250)
    torch.testing.assert_close(alone[0], found[1], rtol=0, atol=1e-5)  # an image's steps are its own


def test_dopri5_that_may_not_take_enough_steps_says_so() -> None:
    with pytest.raises(NumericalError, match="not at its end after 2 steps"):
        sample(lambda x, t: 50 * torch.cos(9 * x), lambda: torch.ones(1, 1, 2, 2), FlowSchedule(1000), False, "dopri5", 2)
