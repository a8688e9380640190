"""The schedule against golden tensors, diffusers and closed forms."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dmpctl.diffusion.schedule import NoiseSchedule, respaced_timesteps, split_prediction
from dmpctl.errors import UsageError
from dmpctl.types import ScheduleSpec

GOLDEN = Path(__file__).parents[2] / "golden"
KINDS = ("linear", "cosine")
RESPACED: dict[str, list[int]] = json.loads((GOLDEN / "respaced_timesteps.json").read_text())


@pytest.fixture(params=KINDS)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return NoiseSchedule.from_spec(ScheduleSpec(request.param))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["uncond-soft", "class-topk"])
def test_golden_betas_and_noised_samples(model: str, kind: str) -> None:
    golden = load_file(GOLDEN / f"{model}.tensors.safetensors")
    schedule = NoiseSchedule.from_spec(ScheduleSpec(kind))
    assert schedule.betas.dtype == schedule.posterior_variance.dtype == torch.float64
    torch.testing.assert_close(schedule.betas, golden[f"{kind}.betas"], rtol=0, atol=1e-15)
    x_t = schedule.add_noise(golden["x"], golden["t"], golden["noise"])
    torch.testing.assert_close(x_t, golden[f"{kind}.x_t"], rtol=0, atol=1e-6)


def test_a_linear_schedule_of_other_length_is_scaled() -> None:
    betas = NoiseSchedule.from_spec(ScheduleSpec("linear", 250)).betas
    np.testing.assert_allclose(betas.numpy(), np.linspace(4e-4, 0.08, 250), rtol=1e-12)


def test_cosine_abar_is_its_closed_form() -> None:
    abar = NoiseSchedule.from_spec(ScheduleSpec("cosine")).alphas_cumprod[:990].numpy()  # later betas are capped at 0.999
    u = np.arange(1, 991) / 1000
    closed = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(abar, closed, rtol=1e-9)


def test_too_few_linear_steps_are_refused() -> None:
    with pytest.raises(UsageError, match=r"betas must lie in \(0, 1\)"):
        NoiseSchedule.from_spec(ScheduleSpec("linear", 20))
    assert len(NoiseSchedule.from_spec(ScheduleSpec("linear", 21))) == 21


def test_posterior_is_bayes_rule(schedule: NoiseSchedule) -> None:
    """Prior N(sqrt(abar') x0, 1 - abar') times likelihood N(x_t; sqrt(alpha) x, beta), combined by precision."""
    t = torch.tensor([1, 17, 500, 990])
    beta, prev = schedule.betas[t].numpy(), schedule.alphas_cumprod_prev[t].numpy()
    x0, x_t = np.array([0.3, -1.0, 0.9, 0.1]), np.array([0.2, 0.4, -2.0, 1.0])
    precision = 1 / (1 - prev) + (1 - beta) / beta
    mean = (np.sqrt(prev) * x0 / (1 - prev) + np.sqrt(1 - beta) * x_t / beta) / precision
    np.testing.assert_allclose(schedule.posterior_variance[t].numpy(), 1 / precision, rtol=1e-9)
    found = schedule.posterior_mean(*(torch.tensor(x).float().view(-1, 1, 1, 1) for x in (x0, x_t)), t)
    np.testing.assert_allclose(found.flatten().numpy(), mean, rtol=1e-5)


def test_log_variance_at_zero_is_clipped_to_that_at_one(schedule: NoiseSchedule) -> None:
    assert schedule.posterior_variance[0] == 0
    found = schedule.posterior_log_variance(torch.tensor([0, 1])).flatten()
    assert found[0] == found[1] == schedule.posterior_variance[1].log().float()


def test_learned_log_variance_runs_from_posterior_to_beta(schedule: NoiseSchedule) -> None:
    t = torch.tensor([1, 400, 999])
    ends = [schedule.posterior_variance[t].log().float(), schedule.betas[t].log().float()]
    for v, expected in [(-1.0, ends[0]), (1.0, ends[1]), (0.0, (ends[0] + ends[1]) / 2)]:
        found = schedule.learned_log_variance(torch.full((3, 2, 1, 1), v), t)
        torch.testing.assert_close(found, expected.view(-1, 1, 1, 1).expand(3, 2, 1, 1))


def test_predict_x0_undoes_add_noise(schedule: NoiseSchedule) -> None:
    t = torch.tensor([0, 17, 500, 900])
    x0, noise = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(schedule.predict_x0(schedule.add_noise(x0, t, noise), t, noise), x0, rtol=0, atol=1e-4)


def test_snr_is_the_one_of_diffusers() -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    t = torch.arange(1000)
    snr = NoiseSchedule.from_spec(ScheduleSpec("linear")).snr(t)
    assert snr.dtype == torch.float32
    torch.testing.assert_close(snr, compute_snr(DDPMScheduler(beta_schedule="linear"), t), rtol=1e-3, atol=0)


@pytest.mark.parametrize("count", list(RESPACED))
def test_golden_respaced_timesteps(count: str) -> None:
    assert respaced_timesteps(1000, int(count)) == RESPACED[count]


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_respacing_keeps_distinct_ascending_timesteps(steps: int) -> None:
    assert respaced_timesteps(steps, 1) == [0]
    assert respaced_timesteps(steps, steps) == list(range(steps))
    for count in range(2, steps, 13):
        kept = respaced_timesteps(steps, count)
        assert len(set(kept)) == count
        assert kept == sorted(kept)
        assert (kept[0], kept[-1]) == (0, steps - 1)


@pytest.mark.parametrize("count", [0, 1001])
def test_more_steps_than_there_are_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"cannot keep {count} of 1000"):
        respaced_timesteps(1000, count)


def test_a_respaced_schedule_has_the_same_abar(schedule: NoiseSchedule) -> None:
    kept = respaced_timesteps(1000, 50)
    spaced = schedule.respace(kept)
    assert spaced.timesteps.tolist() == kept
    torch.testing.assert_close(spaced.alphas_cumprod, schedule.alphas_cumprod[kept], rtol=1e-9, atol=0)
    survived = np.prod(1 - schedule.betas.numpy()[kept[3] + 1 : kept[4] + 1])
    assert 1 - float(spaced.betas[4]) == pytest.approx(survived, rel=1e-9)
    assert spaced.respace([0, 49]).timesteps.tolist() == [0, 999]


def test_one_lone_step_is_finite(schedule: NoiseSchedule) -> None:
    assert schedule.respace([0]).posterior_log_variance(torch.tensor([0])).isfinite().all()


def test_to_copies_and_respacing_stays_on_the_device(schedule: NoiseSchedule) -> None:
    t = torch.zeros(2, dtype=torch.int64)
    moved = schedule.to("meta")
    assert moved.snr(t.to("meta")).device.type == moved.respace([0, 9]).snr(t.to("meta")).device.type == "meta"
    assert schedule.snr(t).device.type == "cpu"


def test_split_prediction() -> None:
    prediction = torch.arange(8, dtype=torch.bfloat16).view(1, 4, 1, 2)
    eps, v = split_prediction(prediction, 2, learned_sigma=True)
    assert v is not None
    assert eps.dtype == v.dtype == torch.float32
    assert (eps.flatten().tolist(), v.flatten().tolist()) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert split_prediction(prediction, 4, learned_sigma=False)[1] is None
    with pytest.raises(ValueError, match="4 channels where 2 are expected"):
        split_prediction(prediction, 2, learned_sigma=False)
