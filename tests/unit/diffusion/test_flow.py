"""Flows (SiT): the path, the objective and the samplers, on Gaussian data whose velocity is known."""

import pytest
import torch
from torch import Tensor

from dmpctl.backbones.dit import DiT, DiTConfig, shape_config
from dmpctl.diffusion.objective import HybridObjective
from dmpctl.diffusion.samplers import FLOW_SAMPLERS, sample
from dmpctl.diffusion.schedule import FlowSchedule, NoiseSchedule, schedule_of
from dmpctl.errors import UsageError
from dmpctl.rng import ImageDraws
from dmpctl.settings.training import Objective
from dmpctl.store.shapes import is_flow
from dmpctl.types import ScheduleSpec

FLOW = FlowSchedule(1000)
MEAN, SD = 2.0, 0.5  # of the data


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[x0 - noise | x_t] for data N(MEAN, SD²)."""
    s = FLOW.level(t)
    var = ((1 - s) * SD) ** 2 + s**2
    off = x - (1 - s) * MEAN
    return MEAN + (1 - s) * SD**2 / var * off - s / var * off


def drawn(count: int = 400) -> ImageDraws:
    return ImageDraws(3, range(count), (1, 4, 4))


def test_the_path_goes_from_image_to_noise():
    x0, noise = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    found = FLOW.add_noise(x0, torch.tensor([0.0, 250.0, 1000.0]), noise)
    assert torch.equal(found[0], x0[0])
    torch.testing.assert_close(found[1], 0.75 * x0[1] + 0.25 * noise[1])
    assert torch.equal(found[2], noise[2])


def test_what_is_predicted_is_the_paths_derivative():
    x0, noise, t = torch.randn(2, 1, 2, 2).double(), torch.randn(2, 1, 2, 2).double(), torch.tensor([100.0, 700.0])
    step = (FLOW.add_noise(x0, t - 1, noise) - FLOW.add_noise(x0, t, noise)) * 1000
    torch.testing.assert_close(FLOW.target(x0, noise), step, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_samples_have_the_moments_of_the_data(sampler):
    with torch.inference_mode():
        found = sample(velocity, drawn(), FLOW, False, sampler, 200)
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(found.std()) == pytest.approx(SD, rel=0.06)


def test_one_even_step_of_euler_is_its_formula():
    start = drawn(3)()
    with torch.inference_mode():
        found = sample(velocity, drawn(3), FLOW, False, "euler", 1)
    torch.testing.assert_close(found, start + velocity(start, torch.full((3,), 1000.0)))


def test_heun_is_of_second_order():
    """Against the exact flow of a Gaussian: x(0) = MEAN + SD * x(1)."""
    exact = MEAN + SD * drawn(8)()
    errors = []
    with torch.inference_mode():
        for steps in (20, 40):
            found = {name: sample(velocity, drawn(8), FLOW, False, name, steps) for name in ("euler", "heun")}
            errors.append({name: float((value - exact).abs().max()) for name, value in found.items()})
    assert errors[0]["heun"] < errors[0]["euler"] / 3
    assert errors[1]["heun"] < errors[0]["heun"] / 2.5
    assert errors[1]["euler"] < errors[0]["euler"] / 1.7


def test_only_the_sde_draws_noise():
    for sampler, count in (("euler", 1), ("heun", 1), ("euler-maruyama", 10)):
        asked = []

        def draw(asked=asked) -> Tensor:
            asked.append(1)
            return torch.zeros(1, 1, 2, 2)

        sample(velocity, draw, FLOW, False, sampler, 10)
        assert len(asked) == count


@pytest.mark.parametrize(
    ("sampler", "schedule"), [("ddpm", FLOW), ("unipc", FLOW), ("heun", NoiseSchedule.from_spec(ScheduleSpec()))]
)
def test_a_sampler_of_the_other_kind_is_refused(sampler, schedule):
    with pytest.raises(UsageError, match=f"--sampler {sampler} is for a"):
        sample(velocity, drawn(2), schedule, False, sampler, 5)


def test_the_objective_is_the_mse_of_the_velocity():
    x0, noise, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([1.0, 30.5, 600.0, 999.0])
    prediction = torch.randn(4, 4, 3, 3)  # a published SiT has twice the channels, whose second half is not looked at
    losses = HybridObjective(FLOW, True, Objective())(prediction, x0, FLOW.add_noise(x0, t, noise), t, noise)
    torch.testing.assert_close(losses.loss, (x0 - noise - prediction[:, :2]).square().flatten(1).mean(1))
    assert losses.vb is None
    with pytest.raises(UsageError, match="--loss-weight min-snr is for a Gaussian diffusion"):
        HybridObjective(FLOW, True, Objective(loss_weight="min-snr"))


def test_a_sit_counts_time_from_noise_to_image():
    config = DiTConfig(8, 1, 2, 16, 2, 2, 0)
    plain, flow = DiT(config), DiT(config, ScheduleSpec("flow"))
    plain.initialise(torch.Generator().manual_seed(0))
    flow.load_state_dict(plain.state_dict())
    t = torch.tensor([0.0, 250.0, 1000.0])
    torch.testing.assert_close(flow.embed_time(t), plain.embed_time(torch.tensor([1.0, 0.75, 0.0])))
    assert (plain.spec.prediction, flow.spec.prediction) == ("epsilon", "velocity")


def test_shapes_and_schedules_by_name():
    assert shape_config("SiT-XL/2") == shape_config("DiT-XL/2")
    assert is_flow("SiT-B/4")
    assert not is_flow("DiT-B/4")
    assert isinstance(schedule_of(ScheduleSpec("flow")), FlowSchedule)
    betas = NoiseSchedule.from_spec(ScheduleSpec("scaled-linear")).betas
    from diffusers import DDPMScheduler

    expected = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").betas
    torch.testing.assert_close(betas.float(), expected)
