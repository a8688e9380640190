"""Two models compared on common seeds: the distances of their images to real ones, their denoising losses, and both differences.

The end of `dmpctl patch`, `dmpctl fid --versus` and every cell of a study are compared here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from dmpctl.measuring.paired_loss import LossDifference, loss_difference
from dmpctl.metrics.frechet import Gaussian, PairedDifference, paired_difference


@dataclass(frozen=True)
class Trial:
    """One model on common seeds: `features` [M, D] of its images, `errors` [T, N] of its denoising at T `timesteps`.

    None: not measured.
    """

    features: Tensor | None = None
    errors: Tensor | None = None
    timesteps: Sequence[int] = ()


@dataclass(frozen=True)
class Comparison:
    """Differences of a model from another, negative is better; None: not measured of both."""

    distance: PairedDifference | None
    loss: LossDifference | None

    @classmethod
    def of(cls, model: Trial, other: Trial, reference: Gaussian | None = None) -> Self:
        """Compares two trials whose rows come from the same seeds; `reference`: of real images, None: losses alone.

        Raises UsageError for features that do not pair up.
        """
        distance = loss = None
        if reference is not None and model.features is not None and other.features is not None:
            distance = paired_difference(model.features, other.features, reference)
        if model.errors is not None and other.errors is not None:
            loss = loss_difference(other.errors, model.errors, list(model.timesteps))
        return cls(distance, loss)
