"""Which timesteps training sees: uniform ones, or more of those where there is something to learn.

Importance sampling (Nichol and Dhariwal 2021, section 3.3), with a density that is fixed before training: a frozen backbone's
own error says at which timesteps gradients are large. The weights 1 / (T p(t)) leave every mean what it is under uniform draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmpctl.errors import NumericalError

FLOOR = 0.1  # of the mean density: no timestep is seen less often than this times as often as on average


@dataclass(frozen=True, eq=False)
class TimestepDensity:
    """p(t) over T timesteps. `cumulative` [T] float64 ends at 1; `weights` [T] float32 have mean 1 under p."""

    cumulative: Tensor
    weights: Tensor

    @classmethod
    def from_errors(cls, errors: Mapping[int, float], steps: int) -> TimestepDensity:
        """Density in proportion to `errors` (mean squared error at some timesteps, linear between them), above a floor.

        NumericalError for an error that is negative or not finite, or where all are zero.
        """
        known = sorted(errors)
        values = np.array([errors[t] for t in known], dtype=np.float64)
        if not np.isfinite(values).all() or (values < 0).any() or not values.any():
            raise NumericalError(f"errors {values.tolist()} at timesteps {known} say nothing about which timesteps matter")
        density = np.interp(np.arange(steps), known, values)
        density = density / density.mean() + FLOOR
        share = torch.from_numpy(density / density.sum())
        cumulative = share.cumsum(0)
        cumulative[-1] = 1.0
        return cls(cumulative, (1 / (steps * share)).float())

    def to(self, device: torch.device | str) -> TimestepDensity:
        """This density with its weights on `device`; timesteps are drawn on the CPU."""
        return TimestepDensity(self.cumulative, self.weights.to(device))

    def draw(self, uniform: Tensor) -> Tensor:
        """Timesteps int64 [B] of uniform numbers [B] in [0, 1)."""
        return torch.searchsorted(self.cumulative, uniform.double(), right=True).clamp_(max=len(self.cumulative) - 1)
