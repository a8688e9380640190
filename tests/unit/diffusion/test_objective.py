"""The objective against scipy, torch.distributions, diffusers and golden weights."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import norm
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dmpctl.diffusion.objective import HybridObjective, discretised_log_likelihood
from dmpctl.diffusion.schedule import NoiseSchedule
from dmpctl.settings.training import Objective
from dmpctl.types import ScheduleSpec

GOLDEN = Path(__file__).parents[2] / "golden"
LINEAR = NoiseSchedule.from_spec(ScheduleSpec("linear"))
T = torch.tensor([0, 1, 17, 500, 999])


def objective(learned_sigma: bool = True, **settings: Any) -> HybridObjective:
    return HybridObjective(LINEAR, learned_sigma, Objective(**settings))


def batch(t: Tensor = T, channels: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """prediction [B, 2C, 4, 4], x0, x_t, noise at `t`."""
    generator = torch.Generator().manual_seed(3)
    prediction = torch.randn(len(t), 2 * channels, 4, 4, generator=generator)
    x0, noise = torch.randn(2, len(t), channels, 4, 4, generator=generator)
    return prediction, x0, LINEAR.add_noise(x0, t, noise), noise


def textbook(prediction: Tensor, x_t: Tensor, t: Tensor) -> Normal:
    """p(x_{t-1} | x_t) in float64: Ho et al. 2020, eq. 11, and Nichol and Dhariwal 2021, eq. 15."""
    eps, v = prediction.double().chunk(2, dim=1)
    abar, beta = (table[t].view(-1, 1, 1, 1) for table in (LINEAR.alphas_cumprod, LINEAR.betas))
    mean = (x_t - beta / (1 - abar).sqrt() * eps) / (1 - beta).sqrt()
    share = (v + 1) / 2
    return Normal(mean, (share * beta.log() + (1 - share) * smaller(t).log()).exp().sqrt())


def smaller(t: Tensor) -> Tensor:
    """Posterior variance [B, 1, 1, 1] float64, at t = 0 that of t = 1 (Ho et al. 2020, eq. 7)."""
    t = t.clamp(min=1)
    return (LINEAR.betas[t] * (1 - LINEAR.alphas_cumprod[t - 1]) / (1 - LINEAR.alphas_cumprod[t])).view(-1, 1, 1, 1)


def test_bound_after_the_first_step_is_a_kl_divergence() -> None:
    t = T[1:]
    prediction, x0, x_t, noise = batch(t)
    abar, prev, beta = (
        table.view(-1, 1, 1, 1) for table in (LINEAR.alphas_cumprod[t], LINEAR.alphas_cumprod[t - 1], LINEAR.betas[t])
    )
    mean = (prev.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - prev) * x_t) / (1 - abar)
    kl = kl_divergence(Normal(mean, smaller(t).sqrt().expand_as(mean)), textbook(prediction, x_t, t))
    losses = objective()(prediction, x0, x_t, t, noise)
    assert losses.vb is not None
    torch.testing.assert_close(losses.vb.double(), kl.mean((1, 2, 3)) / math.log(2), rtol=1e-4, atol=1e-6)


def test_bound_at_the_first_step_is_a_discretised_likelihood() -> None:
    t = torch.zeros(3, dtype=torch.int64)
    prediction, x0, x_t, noise = batch(t)
    prediction[:, :4] = noise + 0.3 * prediction[:, :4]  # near the truth: the published cdf is a tanh, poor far out
    p = textbook(prediction, x_t, t)
    upper, lower = (norm.cdf(x0 + edge / 255, p.mean, p.stddev) for edge in (1, -1))
    probability = np.where(x0 < -0.999, upper, np.where(x0 > 0.999, 1 - lower, upper - lower))
    losses = objective()(prediction, x0, x_t, t, noise)
    assert losses.vb is not None
    np.testing.assert_allclose(losses.vb.numpy(), -np.log2(probability).mean((1, 2, 3)), rtol=2e-3)


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 0.3), (0.9, 0.05), (-1.5, 1.0)])
def test_likelihoods_of_all_256_levels_sum_to_one(mean: float, scale: float) -> None:
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_p = discretised_log_likelihood(levels, torch.tensor(mean), torch.tensor(scale).log())
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-6)
    exact = np.diff(norm.cdf(np.r_[-np.inf, (levels.numpy()[:-1] + levels.numpy()[1:]) / 2, np.inf], mean, scale))
    np.testing.assert_allclose(log_p.exp().numpy(), exact, atol=1e-3)


def test_a_perfect_prediction_costs_nothing() -> None:
    _, x0, x_t, noise = batch(T[1:])
    losses = objective()(torch.cat([noise, -torch.ones_like(noise)], dim=1), x0, x_t, T[1:], noise)
    assert losses.vb is not None
    torch.testing.assert_close(losses.loss, torch.zeros(4), rtol=0, atol=1e-5)


def test_the_mean_is_detached_in_the_bound() -> None:
    prediction, x0, x_t, noise = batch()
    prediction.requires_grad_()
    losses = objective(loss_weight="min-snr")(prediction, x0, x_t, T, noise)
    assert losses.vb is not None
    (of_bound,) = torch.autograd.grad(losses.vb.sum(), prediction, retain_graph=True)
    (of_loss,) = torch.autograd.grad(losses.loss.sum(), prediction, retain_graph=True)
    (of_mse,) = torch.autograd.grad((objective(loss_weight="min-snr").weight(T) * losses.mse).sum(), prediction)
    assert of_bound[:, :4].abs().max() == 0
    assert (of_bound[:, 4:].flatten(1).abs().amax(1) > 0).all()
    assert torch.equal(of_loss[:, :4], of_mse[:, :4])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_min_snr_weight_is_the_golden_one(kind: str) -> None:
    golden = load_file(GOLDEN / "class-topk.tensors.safetensors")
    weigh = HybridObjective(NoiseSchedule.from_spec(ScheduleSpec(kind)), True, Objective(loss_weight="min-snr", min_snr_gamma=5))
    torch.testing.assert_close(
        weigh.weight(golden["t"]), golden[f"{kind}.mse_min_snr_5"] / golden[f"{kind}.mse"], rtol=1e-5, atol=0
    )


def test_p2_and_constant_weights() -> None:
    snr = LINEAR.alphas_cumprod[T] / (1 - LINEAR.alphas_cumprod[T])
    expected = 1 / (2 + snr) ** 0.5
    torch.testing.assert_close(objective(loss_weight="p2", p2_gamma=0.5, p2_k=2).weight(T).double(), expected, rtol=1e-5, atol=0)
    assert objective().weight(T).tolist() == [1] * len(T)


def test_loss_is_weighted_mse_plus_the_bound() -> None:
    prediction, x0, x_t, noise = batch()
    weighted = objective(loss_weight="p2")
    losses = weighted(prediction, x0, x_t, T, noise)
    assert losses.vb is not None
    np.testing.assert_allclose(losses.mse.numpy(), ((prediction[:, :4] - noise) ** 2).mean((1, 2, 3)).numpy(), rtol=1e-5)
    torch.testing.assert_close(losses.loss, weighted.weight(T) * losses.mse + losses.vb)


def test_without_learned_sigma_there_is_no_bound() -> None:
    prediction, x0, x_t, noise = batch(channels=1)
    losses = objective(learned_sigma=False)(prediction[:, :1], x0, x_t, T, noise)
    assert losses.vb is None
    assert torch.equal(losses.loss, losses.mse)
    with pytest.raises(ValueError, match="2 channels where 1 are expected"):
        objective(learned_sigma=False)(prediction, x0, x_t, T, noise)


def test_everything_is_float32_and_each_sample_is_its_own() -> None:
    prediction, x0, x_t, noise = batch()
    half = prediction.bfloat16()
    together = objective()(half, x0, x_t, T, noise)
    alone = [
        objective()(half[i : i + 1].float(), x0[i : i + 1], x_t[i : i + 1], T[i : i + 1], noise[i : i + 1]) for i in range(5)
    ]
    for name in ("mse", "vb", "loss"):
        values = getattr(together, name)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, torch.cat([getattr(one, name) for one in alone]))


def test_gradients_of_wild_predictions_are_finite() -> None:
    prediction, x0, x_t, noise = batch()
    prediction = (20 * prediction).requires_grad_()
    objective()(prediction, 5 * x0, x_t, T, noise).loss.sum().backward()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()
