"""Count, mean and scatter of features: all that a Frechet distance needs, in float64, mergeable over shards."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dmpctl.errors import NumericalError, UsageError

BLOCK = 4096  # rows cast to float64 at a time: 64 MiB at width 2048


@dataclass(eq=False)
class FeatureMoments:
    """Moments of `count` feature vectors: `mean` [D] and centred `scatter` [D, D], both float64 on the CPU.

    scatter = sum (x - mean)(x - mean)^T, joined by the pairwise formula of Chan, Golub and LeVeque (1979), so the result
    does not depend on order, batch size or shards (1e-9 relative), and a constant feature keeps a variance of exactly 0.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, width: int) -> Self:
        """Returns the moments of no vector of `width` features: merging them changes nothing."""
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))

    @property
    def width(self) -> int:
        """Features per vector, D."""
        return self.mean.shape[0]

    def add(self, features: Tensor) -> None:
        """Take in a batch [B, D] of any float dtype, on any device.

        Raises UsageError for another shape or dtype, NumericalError for values that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.width or not features.is_floating_point():
            found = f"{features.dtype} {list(features.shape)}"
            raise UsageError(f"features should be floating point of shape [B, {self.width}], found {found}")
        for block in torch.split(features.detach(), BLOCK):
            self._add(block.cpu().double())

    def _add(self, block: Tensor) -> None:
        """Take in [B, D] float64 as one more shard; its shift of the mean rides along as an extra row of one product."""
        bad = int((~torch.isfinite(block)).any(dim=1).sum())
        if bad:
            raise NumericalError(f"{bad} of {len(block)} feature vectors are not finite", "look at the images they come from")
        new, total = len(block), self.count + len(block)
        if not new:
            return
        mean = block.mean(dim=0)
        shift = mean - self.mean
        rows = torch.cat([block - mean, shift[None] * (self.count * new / total) ** 0.5])
        self.scatter.addmm_(rows.T, rows)
        self.mean += shift * (new / total)
        self.count = total

    def merge(self, other: Self) -> Self:
        """Moments of both sets together; neither is changed. Raises UsageError if their widths differ."""
        same_width(self.width, other.width)
        total = self.count + other.count
        if not total:
            return self.empty(self.width)
        shift = other.mean - self.mean
        scatter = (self.scatter + other.scatter).addr_(shift, shift, alpha=self.count * other.count / total)
        return type(self)(total, self.mean + shift * (other.count / total), scatter)

    def covariance(self) -> Tensor:
        """Unbiased covariance [D, D], exactly symmetric. Raises UsageError for fewer than two vectors."""
        if self.count < 2:
            raise UsageError(f"a covariance needs at least 2 feature vectors, found {self.count}", "use more images")
        return (self.scatter + self.scatter.T) / (2 * (self.count - 1))


def features_to_moments(batches: Iterable[Tensor]) -> FeatureMoments:
    """Moments of batches [B, D] in one pass. Raises as `FeatureMoments.add`, and UsageError if there is no batch."""
    moments: FeatureMoments | None = None
    for batch in batches:
        if moments is None:
            moments = FeatureMoments.empty(batch.shape[-1] if batch.ndim else 0)
        moments.add(batch)
    if moments is None:
        raise UsageError("there are no features to take moments of", "is the list of images empty?")
    return moments


def same_width(a: int, b: int) -> None:
    """Raises UsageError if two widths of features differ."""
    if a != b:
        raise UsageError(f"features of width {a} cannot be compared with width {b}", "use the same extractor for both")
