"""Frechet distance between features (Heusel et al. 2017), its standard error, and whether two of them differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Literal

import torch
from scipy.special import ndtr, ndtri  # scipy.stats costs half a second
from torch import Tensor

from dmpctl.errors import NumericalError, UsageError
from dmpctl.metrics.moments import BLOCK, FeatureMoments, features_to_moments, same_width
from dmpctl.rng import seed_of
from dmpctl.types import Progress, Silent

Verdict = Literal["improved", "no significant change", "worse", "too small a change to name"]
CONFIDENCE = 0.95  # two-sided
GROUPS = 10  # of the delete-group jackknife
# Images per feature, above which intervals cover (docs/fid.md). Of a difference most of what the jackknife leaves cancels.
FOR_A_DIFFERENCE, FOR_AN_INTERVAL = 2, 3


@dataclass(frozen=True, eq=False)
class Factor:
    """A Gaussian with its covariance factored once, S = root root^T, on the support of S alone.

    `mean` [D], `vectors` [D, r] orthonormal, `deviations` [r] (square roots of the eigenvalues), float64. Eigenvalues up
    to D eps max are rounding: a constant feature, or fewer images than features, leave r < D and an exact distance.
    `count` None: the file that it comes from does not say.
    """

    count: int | None
    mean: Tensor
    vectors: Tensor
    deviations: Tensor
    trace: float

    @classmethod
    def of(cls, moments: FeatureMoments | Factor) -> Factor:
        """Factor of moments (a factor is returned as it is: keep the reference's and it is computed once).

        Raises UsageError for fewer than two vectors, NumericalError for no covariance at all.
        """
        if isinstance(moments, Factor):
            return moments
        return cls.of_covariance(moments.mean, moments.covariance(), moments.count)

    @classmethod
    def of_covariance(cls, mean: Tensor, covariance: Tensor, count: int | None = None) -> Factor:
        """Factor of a mean [D] and a symmetric covariance [D, D], float64.

        Raises NumericalError where it is not finite or no covariance: an eigenvalue below zero by more than rounding.
        """
        if not torch.isfinite(covariance).all():
            raise NumericalError("the covariance of the features is not finite", "look for features that are far too large")
        values, vectors = torch.linalg.eigh(covariance)
        largest = float(values[-1])
        if float(values[0]) < -1e-6 * abs(largest):
            raise NumericalError(f"the covariance of the features has a negative eigenvalue ({float(values[0]):.3g})")
        keep = values > len(mean) * torch.finfo(torch.float64).eps * largest
        return cls(count, mean.clone(), vectors[:, keep], values[keep].sqrt(), float(covariance.trace()))

    @property
    def width(self) -> int:
        """Features per vector, D."""
        return self.mean.shape[0]

    @cached_property
    def root(self) -> Tensor:
        """L [D, r] with S = L L^T."""
        return self.vectors * self.deviations


Gaussian = FeatureMoments | Factor


@dataclass(frozen=True)
class FidEstimate:
    """A distance and how certain it is.

    `standard_error` covers the sampling of the `n` images only, not of the reference; `debiased` ± 1.96 of it is the interval.
    `debiased` is the jackknife's value, None where it was not asked for. Both are None for too few images (`has_interval`).
    """

    value: float
    standard_error: float | None
    n: int
    n_reference: int | None
    debiased: float | None = None


@dataclass(frozen=True)
class PairedDifference:
    """FID of `a` minus FID of `b` on common seeds, of the debiased ones: negative means that `a` is closer to the reference.

    For too few images (`has_interval`) it is that of the plain ones: `standard_error`, `z`, the two-sided `p_value` are None.
    """

    value: float
    standard_error: float | None
    z: float | None
    p_value: float | None
    n: int
    n_reference: int | None
    a: FidEstimate
    b: FidEstimate


def moments_to_fid(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^1/2, the last as the sum of singular values of L_a^T L_b.

    Raises UsageError if the widths differ or a side has fewer than two vectors.
    """
    a, b = Factor.of(a), Factor.of(b)
    same_width(a.width, b.width)
    return _distance(a, b, torch.linalg.svdvals(a.root.T @ b.root))


def has_interval(count: int, width: int, times: int = FOR_AN_INTERVAL) -> bool:
    """Whether so many images of so many features give a standard error and a debiased value: the one rule of all commands.

    `times` FOR_A_DIFFERENCE: of a paired difference.
    """
    return count > max(times * width, 2 * GROUPS)


def refuse_few(count: int, width: int, hint: str) -> None:
    """UsageError where images are no more than their features: the one rule of all commands that measure a distance."""
    if count <= width:
        raise UsageError(
            f"{count} images are too few for {width} features: the distance would be mostly bias",
            f"compare more than {width} images (a difference has an interval from {FOR_A_DIFFERENCE * width + 1} on) {hint}",
        )


def features_to_fid(features: Tensor, reference: Gaussian, debias: bool = False, progress: Progress | None = None) -> FidEstimate:
    """FID of features [N, D] to a reference, with its standard error sd(g) / sqrt(N), g being its influence function.

    `debias` adds the jackknife (14 more distances): it takes away the bias of orders 1/N and 1/N^2, but not the reference's.
    Raises UsageError for fewer than two rows.
    """
    return _shown(_estimate(features, Factor.of(reference), FOR_AN_INTERVAL, debias, progress or Silent())[0], features.shape[1])


def paired_difference(
    features_a: Tensor, features_b: Tensor, reference: Gaussian, progress: Progress | None = None
) -> PairedDifference:
    """FID(a) - FID(b), each freed of its bias, for features [N, D] whose rows k come from the same sampling seed.

    The bias is of each side's own covariance, so it does not cancel. The standard error is that of the mean of
    g_a(k) - g_b(k), the two influence functions image by image: what the two sets have in common cancels. Raises UsageError
    if they do not pair up.
    """
    return paired_gains(features_a, features_b, reference, progress)[0]


def paired_gains(
    features_a: Tensor, features_b: Tensor, reference: Gaussian, progress: Progress | None = None
) -> tuple[PairedDifference, Tensor | None]:
    """The paired difference, and what each image adds to it [N] float64, with that mean; None for too few images."""
    if features_a.shape != features_b.shape:
        found = f"{list(features_a.shape)} and {list(features_b.shape)}"
        raise UsageError(f"features on common seeds should pair up row by row, found {found}", "sample both with the same seeds")
    reference, progress = Factor.of(reference), progress or Silent()
    a, influence_a = _estimate(features_a, reference, FOR_A_DIFFERENCE, True, progress)
    b, influence_b = _estimate(features_b, reference, FOR_A_DIFFERENCE, True, progress)
    sides = (_shown(side, reference.width) for side in (a, b))
    if a.debiased is None or b.debiased is None or influence_a is None or influence_b is None:
        return PairedDifference(a.value - b.value, None, None, None, a.n, a.n_reference, *sides), None
    value, gains = a.debiased - b.debiased, influence_a - influence_b
    error = _error_of_mean(gains)
    z = _z(value, error)
    p_value = float(2 * ndtr(-abs(z)))
    return PairedDifference(value, error, z, p_value, a.n, a.n_reference, *sides), gains - gains.mean() + value


def influence_of(features: Tensor, reference: Factor, moments: FeatureMoments | None = None) -> tuple[float, Tensor]:
    """The distance of features [N, D] (`moments`: theirs, where they are at hand), and its influence function at each [N]."""
    sample = Factor.of(moments or features_to_moments([features]))
    same_width(sample.width, reference.width)
    rotation, singular_values, _ = torch.linalg.svd(sample.root.T @ reference.root, full_matrices=False)
    influence = torch.cat(list(_influence(features, sample, reference, rotation, singular_values)))
    return _distance(sample, reference, singular_values), influence


def verdict(difference: float, standard_error: float, least: float = 0.0, confidence: float = CONFIDENCE) -> Verdict:
    """Whether a difference (new minus old) is significant at a two-sided `confidence` and `least` or more; negative is better."""
    z = _z(difference, standard_error)
    if abs(z) <= ndtri((1 + confidence) / 2):
        return "no significant change"
    if abs(difference) < least:
        return "too small a change to name"
    return "improved" if z < 0 else "worse"


def noise_floor(features: Tensor, count: int, seed: int) -> float:
    """FID of `count` real images, drawn with replacement, to all of them [N, D]: a perfect generator would score this."""
    generator = torch.Generator().manual_seed(seed_of(seed, "noise floor"))
    drawn = features[torch.randint(len(features), (count,), generator=generator).to(features.device)]
    return moments_to_fid(features_to_moments([drawn]), features_to_moments([features]))


def _distance(a: Factor, b: Factor, singular_values: Tensor) -> float:
    """Sum of the terms of the distance; rounding may not take it below 0. Raises NumericalError on overflow."""
    shift = a.mean - b.mean
    distance = float(shift @ shift) + a.trace + b.trace - 2 * float(singular_values.sum())
    if not math.isfinite(distance):
        raise NumericalError(f"the distance is {distance}", "look for features that are far too large")
    return max(0.0, distance)


def _shown(estimate: FidEstimate, width: int) -> FidEstimate:
    """The estimate without an interval that would not cover."""
    return estimate if has_interval(estimate.n, width) else replace(estimate, standard_error=None, debiased=None)


def _estimate(
    features: Tensor, reference: Factor, times: int, debias: bool, progress: Progress
) -> tuple[FidEstimate, Tensor | None]:
    """Estimate and influence of each image [N] (None where `has_interval` says no)."""
    count, width = features.shape
    if not has_interval(count, width, times):
        value = moments_to_fid(features_to_moments([features]), reference)
        return FidEstimate(value, None, count, reference.count), None
    parts = _group_moments(features) if debias else []
    whole = reduce(FeatureMoments.merge, parts) if parts else None
    value, influence = influence_of(features, reference, whole)
    debiased = _debiased(parts, reference, value, progress) if parts else None
    return FidEstimate(value, _error_of_mean(influence), count, reference.count, debiased), influence


def _influence(
    features: Tensor, sample: Factor, reference: Factor, rotation: Tensor, singular_values: Tensor
) -> Iterator[Tensor]:
    """g(x) = 2 (mu1 - mu2)^T (x - mu1) + (x - mu1)^T (I - T) (x - mu1), block by block, each [B].

    With L1^T L2 = U s Q^T, the transport map T = S1^-1/2 (S1^1/2 S2 S1^1/2)^1/2 S1^-1/2 is A s A^T, A = V1 w1^-1/2 U:
    an inverse on the support of S1 alone, outside which x - mu1 is zero.
    """
    whiten = sample.vectors / sample.deviations @ rotation
    shift = sample.mean - reference.mean
    for block in torch.split(features.detach(), BLOCK):
        centred = block.cpu().double() - sample.mean
        yield 2 * centred @ shift + centred.square().sum(dim=1) - (centred @ whiten).square() @ singular_values


def _error_of_mean(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5)


def _z(difference: float, standard_error: float) -> float:
    """Difference in standard errors; without any error, 0 or infinite. Raises NumericalError where either is not a number."""
    if math.isnan(difference) or not standard_error >= 0:
        raise NumericalError(f"a difference of {difference} with standard error {standard_error} says nothing")
    if standard_error == 0:
        return 0.0 if difference == 0 else math.copysign(math.inf, difference)
    return difference / standard_error


def _group_moments(features: Tensor) -> list[FeatureMoments]:
    """Moments of GROUPS random groups of rows: an order that has meaning, such as that of classes, must not make the groups."""
    count = len(features)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(count, "jackknife")))
    rows = (group.sort().values for group in order.tensor_split(GROUPS))  # in order: a memory map is read once through
    return [features_to_moments(features[part] for part in torch.split(group, BLOCK)) for group in rows]


def _debiased(parts: Sequence[FeatureMoments], reference: Factor, value: float, progress: Progress) -> float:
    """The distance at 1/n = 0, by the parabola in 1/n through all images, all but each group in turn, and halves.

    A jackknife of second order (Schucany, Gray and Owen 1971): in the mean over groups and over halves every image counts
    alike, so all that is linear in the images stays as it was. One split into halves would add its own noise.
    """
    left_out = [[part for other, part in enumerate(parts) if other != group] for group in range(GROUPS)]
    halves = [parts[::2], parts[1::2], parts[: GROUPS // 2], parts[GROUPS // 2 :]]
    with progress.track("jackknife of the distance", len(left_out) + len(halves)) as task:

        def distance(some: Sequence[FeatureMoments]) -> tuple[float, float]:
            merged = reduce(FeatureMoments.merge, some)
            found = moments_to_fid(merged, reference)
            task.advance()
            return 1 / merged.count, found

        pairs = [[distance(some) for some in sets] for sets in (left_out, halves)]
    whole = (1 / sum(part.count for part in parts), value)
    points = [whole, *((sum(x for x, _ in found) / len(found), sum(y for _, y in found) / len(found)) for found in pairs)]
    return sum(y * math.prod(other / (other - x) for other, _ in points if other != x) for x, y in points)
