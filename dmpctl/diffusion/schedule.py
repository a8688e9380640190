"""The noise schedule and all that follows from it (Ho et al. 2020, arXiv 2006.11239; Dhariwal and Nichol 2021, ADM).

Every quantity is computed in float64 on the CPU; what meets a tensor is rounded to float32 after that, as in ADM.
Shapes: S timesteps of this schedule, B batch, C/H/W channels, height, width. t is int64 [B] in 0..S-1.
"""

import math
from collections.abc import Sequence
from copy import copy
from typing import Any, assert_never

import numpy as np
import torch
from torch import Tensor

from dmpctl.errors import UsageError
from dmpctl.types import Inference, ScheduleSpec


class NoiseSchedule:
    """q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) for given betas, and its posterior q(x_{t-1} | x_t, x_0).

    Float64 tables [S], always on the CPU: `betas`, `alphas_cumprod` (abar), `alphas_cumprod_prev`, `posterior_variance`,
    `posterior_log_variance_clipped`. `timesteps` [S] int64 (CPU): a backbone's numbers of them; the identity unless respaced.
    """

    inference: Inference | None = None  # of a scheduler file, None: ADM's

    def __init__(self, betas: Tensor, timesteps: Tensor | None = None) -> None:
        """`betas` [S] in (0, 1), else UsageError; `timesteps` None: 0..S-1."""
        betas = betas.to("cpu", torch.float64)
        if not bool(((betas > 0) & (betas < 1)).all()):
            worst = float(betas.max())
            raise UsageError(f"betas must lie in (0, 1), {len(betas)} steps give up to {worst:.3g}", "use more timesteps")
        abar = torch.cumprod(1 - betas, 0)
        prev = torch.cat([abar.new_ones(1), abar[:-1]])
        self.betas, self.alphas_cumprod, self.alphas_cumprod_prev = betas, abar, prev
        self.timesteps = torch.arange(len(betas)) if timesteps is None else timesteps
        self.posterior_variance = betas * (1 - prev) / (1 - abar)
        # The variance at t = 0 is 0, so its logarithm is taken from t = 1 (one lone step: from its beta, it is never used).
        second = self.posterior_variance[1:2] if len(betas) > 1 else betas
        self.posterior_log_variance_clipped = torch.cat([second, self.posterior_variance[1:]]).log()
        tables = {
            "signal": abar.sqrt(),
            "noise": (1 - abar).sqrt(),
            "recip": (1 / abar).sqrt(),
            "recip_m1": (1 / abar - 1).sqrt(),
            "mean_x0": betas * prev.sqrt() / (1 - abar),
            "mean_xt": (1 - prev) * (1 - betas).sqrt() / (1 - abar),
            "min_log": self.posterior_log_variance_clipped,
            "max_log": betas.log(),
            "snr": abar / (1 - abar),
        }
        self._tables = {name: table.float() for name, table in tables.items()}

    @classmethod
    def from_spec(cls, spec: ScheduleSpec) -> "NoiseSchedule":
        """The schedule a backbone was trained with; UsageError if it has too few steps (linear: 20 or fewer)."""
        match spec.kind:
            case "linear":
                scale = 1000 / spec.steps
                return cls(torch.linspace(scale * 1e-4, scale * 0.02, spec.steps, dtype=torch.float64))
            case "cosine":
                return cls(torch.tensor(_cosine_betas(spec.steps), dtype=torch.float64))
            case "scaled-linear":  # of Stable Diffusion: linear in the square root of beta
                return cls(torch.linspace(0.00085**0.5, 0.012**0.5, spec.steps, dtype=torch.float64) ** 2)
            case "flow":
                raise ValueError("a flow has no betas: see FlowSchedule")
            case _:
                assert_never(spec.kind)

    def __len__(self) -> int:
        return len(self.betas)

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """A copy whose coefficients live on `device`; call it once, outside of the loop."""
        moved = copy(self)
        moved._tables = {name: table.to(device) for name, table in self._tables.items()}
        return moved

    def visited(self, count: int) -> list[int]:
        """`count` timesteps, ascending, as the scheduler file spaces them, else as ADM. UsageError where there are fewer."""
        total, how = len(self), self.inference
        even = respaced_timesteps(total, count)
        if how is None:
            return even
        match how.timestep_spacing:
            case "leading" | None:
                found: Any = np.arange(count) * (total // count) + how.steps_offset
            case "linspace":
                found = np.linspace(0, total - 1, count).round()
            case "trailing":
                found = np.arange(total, 0, -total / count).round()[::-1] - 1
            case _:
                assert_never(how.timestep_spacing)
        if found[-1] >= total:
            most = (total - how.steps_offset - 1) // 2
            raise UsageError(f"{count} steps from timestep {how.steps_offset} on go beyond {total}", f"ask for 1 to {most} steps")
        return [int(t) for t in found]

    def respace(self, timesteps: Sequence[int]) -> "NoiseSchedule":
        """The schedule that visits only `timesteps` (ascending), with the same abar there (ADM's SpacedDiffusion)."""
        kept = torch.tensor(timesteps, dtype=torch.int64)
        abar = self.alphas_cumprod[kept]
        prev = torch.cat([abar.new_ones(1), abar[:-1]])
        return NoiseSchedule(1 - abar / prev, self.timesteps[kept]).to(self._tables["snr"].device)

    def _at(self, name: str, t: Tensor) -> Tensor:
        """Coefficients of timesteps t [B], float32 [B, 1, 1, 1]."""
        return self._tables[name][t].view(-1, 1, 1, 1)

    def snr(self, t: Tensor) -> Tensor:
        """Signal to noise ratio abar / (1 - abar), float32 [B]."""
        return self._tables["snr"][t]

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t [B, C, H, W] from x0 and standard normal noise (Ho et al., eq. 4)."""
        return self._at("signal", t) * x0 + self._at("noise", t) * noise

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """The quantity that is predicted: the noise."""
        return noise

    def predict_x0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x0 [B, C, H, W] that `eps` implies: `add_noise` solved for x0."""
        return self._at("recip", t) * x_t - self._at("recip_m1", t) * eps

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean [B, C, H, W] of q(x_{t-1} | x_t, x_0) (Ho et al., eq. 7)."""
        return self._at("mean_x0", t) * x0 + self._at("mean_xt", t) * x_t

    def posterior_log_variance(self, t: Tensor) -> Tensor:
        """Log variance [B, 1, 1, 1] of q(x_{t-1} | x_t, x_0), at t = 0 that of t = 1."""
        return self._at("min_log", t)

    def log_beta(self, t: Tensor) -> Tensor:
        """Log beta [B, 1, 1, 1]: the larger of the two fixed variances (Ho et al., section 3.2)."""
        return self._at("max_log", t)

    def learned_log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        """Log variance [B, C, H, W] of a prediction's second half `v`: -1 is the posterior's, 1 is log beta.

        Nichol and Dhariwal 2021 (arXiv 2102.09672), eq. 15.
        """
        share = (v + 1) / 2
        return share * self.log_beta(t) + (1 - share) * self.posterior_log_variance(t)


class FlowSchedule:
    """x_t = (1 - s) x_0 + s noise with s = t / steps (SiT's linear path; rectified flow). t floating [B] in 0..steps.

    The network predicts the velocity x_0 - noise, along which samples move from noise to images.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def to(self, device: torch.device | str) -> "FlowSchedule":
        """This schedule: it has no tables to move."""
        return self

    def level(self, t: Tensor) -> Tensor:
        """s, float32 [B, 1, 1, 1]."""
        return (t.float() / self.steps).view(-1, 1, 1, 1)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t [B, C, H, W] from x0 and standard normal noise."""
        s = self.level(t)
        return (1 - s) * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """The quantity that is predicted: the velocity."""
        return x0 - noise


Schedule = NoiseSchedule | FlowSchedule


def schedule_of(spec: ScheduleSpec, inference: Inference | None = None) -> Schedule:
    """The schedule a backbone was trained with, and is sampled by; UsageError if it has too few steps."""
    if spec.kind == "flow":
        return FlowSchedule(spec.steps)
    made = NoiseSchedule.from_spec(spec)
    made.inference = inference
    return made


def respaced_timesteps(steps: int, count: int) -> list[int]:
    """`count` of `steps` timesteps, ascending, evenly spaced with both ends (ADM's space_timesteps, one section).

    UsageError if `count` is not in 1..steps.
    """
    if not 1 <= count <= steps:
        raise UsageError(f"cannot keep {count} of {steps} timesteps", f"ask for 1 to {steps} steps")
    stride = (steps - 1) / (count - 1) if count > 1 else 1.0
    kept, position = [], 0.0
    for _ in range(count):  # a running sum, not i * stride: where it ends near .5, its rounding is the published one
        kept.append(round(position))
        position += stride
    return kept


def split_prediction(prediction: Tensor, channels: int, learned_sigma: bool) -> tuple[Tensor, Tensor | None]:
    """(epsilon or velocity [B, C, H, W], variance half or None), float32; ValueError if the prediction has other channels."""
    expected = 2 * channels if learned_sigma else channels
    if prediction.shape[1] != expected:
        raise ValueError(f"a prediction of {prediction.shape[1]} channels where {expected} are expected")
    prediction = prediction.float()
    return prediction[:, :channels], prediction[:, channels:] if learned_sigma else None


def _cosine_betas(steps: int) -> list[float]:
    """Betas of abar(u) = cos²((u + 0.008) / 1.008 * pi / 2), at most 0.999 (ADM's squaredcos_cap_v2)."""

    def abar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - abar((i + 1) / steps) / abar(i / steps), 0.999) for i in range(steps)]
