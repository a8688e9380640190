"""The loss that training minimises: weighted MSE of epsilon, plus the variational bound where the variance is learned.

Nichol and Dhariwal 2021 (arXiv 2102.09672), section 3, as in ADM and DiT: the mean is detached in the bound and the bound
is not rescaled. Shapes: B batch, C/H/W channels, height, width. Everything is computed in float32.
"""

import math
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from dmpctl.diffusion.schedule import FlowSchedule, NoiseSchedule, Schedule, split_prediction
from dmpctl.errors import UsageError
from dmpctl.settings.training import Objective


@dataclass(frozen=True)
class Losses:
    """Per-sample losses [B] float32: `loss` = weight(t) * `mse` + `vb`. `vb` in bits per dimension, None if not learned."""

    mse: Tensor
    vb: Tensor | None
    loss: Tensor


class HybridObjective:
    """L_hybrid of a prediction (epsilon, or epsilon and a variance half); of a flow the plain MSE of its velocity."""

    def __init__(self, schedule: Schedule, learned_sigma: bool, settings: Objective) -> None:
        """`schedule` on the device of what will be predicted. UsageError for a weight that its kind does not have."""
        if isinstance(schedule, FlowSchedule) and settings.loss_weight != "constant":
            raise UsageError(f"--loss-weight {settings.loss_weight} is for a Gaussian diffusion, this is a flow", "leave it out")
        self._schedule, self._learned_sigma, self._settings = schedule, learned_sigma, settings

    def __call__(self, prediction: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Losses:
        """Losses of `prediction` [B, 2C or C, H, W] at t [B], where x_t is x0 [B, C, H, W] with `noise` added."""
        x0, x_t, noise = x0.float(), x_t.float(), noise.float()
        eps, v = split_prediction(prediction, x0.shape[1], self._learned_sigma)
        mse = (self._schedule.target(x0, noise) - eps).square().flatten(1).mean(1)
        if isinstance(self._schedule, FlowSchedule):  # the second half of a published SiT is not trained
            return Losses(mse, None, mse)
        weighted = self.weight(t) * mse
        if v is None:
            return Losses(mse, None, weighted)
        vb = variational_bound(self._schedule, eps.detach(), v, x0, x_t, t)
        return Losses(mse, vb, weighted + vb)

    def weight(self, t: Tensor) -> Tensor:
        """Weight [B] of the MSE at timesteps t [B].

        min-SNR: Hang et al. 2023 (arXiv 2303.09556), eq. 8 for epsilon. P2: Choi et al. 2022 (arXiv 2204.00227), eq. 8.
        """
        if isinstance(self._schedule, FlowSchedule):
            return torch.ones_like(t, dtype=torch.float32)
        snr, settings = self._schedule.snr(t), self._settings
        match settings.loss_weight:
            case "constant":
                return torch.ones_like(snr)
            case "min-snr":
                return snr.clamp(max=settings.min_snr_gamma) / snr
            case "p2":
                return (settings.p2_k + snr) ** -settings.p2_gamma
            case _:
                assert_never(settings.loss_weight)


def variational_bound(schedule: NoiseSchedule, eps: Tensor, v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """One term of the bound, bits per dimension [B]: KL(q(x_{t-1} | x_t, x0) || p) for t > 0, -log2 p(x0 | x_1) for t = 0."""
    mean = schedule.posterior_mean(schedule.predict_x0(x_t, t, eps), x_t, t)
    log_variance = schedule.learned_log_variance(v, t)
    true_mean, true_log_variance = schedule.posterior_mean(x0, x_t, t), schedule.posterior_log_variance(t)
    kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    nll = -discretised_log_likelihood(x0, mean, log_variance / 2)
    nats = torch.where((t == 0).view(-1, 1, 1, 1), nll, kl)
    return nats.flatten(1).mean(1) / math.log(2)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) in nats, elementwise."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.exp() - ratio - 1 + (mean1 - mean2).square() * (-log_variance2).exp())


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability in nats, elementwise, of the 1/255-wide half bins around x under N(mean, exp(log_scale)²).

    The outer bins are open: below -0.999 and above 0.999 (Ho et al. 2020, eq. 13). Normal cdf as published, see `_cdf`.
    """
    inverse, centred = (-log_scale).exp(), x - mean
    upper, lower = _cdf(inverse * (centred + 1 / 255)), _cdf(inverse * (centred - 1 / 255))
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return inside.clamp(min=1e-12).log()


def _cdf(x: Tensor) -> Tensor:
    """Standard normal cdf by tanh, within 3e-4 (Page 1977): the published losses use it, so ours must."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
