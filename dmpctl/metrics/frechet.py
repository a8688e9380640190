"""Frechet distance between features (Heusel et al. 2017), its standard error, and whether two of them differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Literal

import torch
from scipy.special import ndtr, ndtri  # scipy.stats costs half a second
from torch import Tensor

from dmpctl.errors import NumericalError, UsageError
from dmpctl.metrics.moments import BLOCK, FeatureMoments, features_to_moments, same_width
from dmpctl.rng import seed_of

Verdict = Literal["improved", "no significant change", "worse"]
CONFIDENCE = 0.95  # two-sided
GROUPS = 10  # of the delete-group jackknife


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

    `standard_error` covers the sampling of the `n` images only, not of the reference. `debiased` is the delete-group
    jackknife's value, None where it was not asked for. Both are None where n <= width: neither law holds there.
    """

    value: float
    standard_error: float | None
    n: int
    n_reference: int | None
    debiased: float | None = None


@dataclass(frozen=True)
class PairedDifference:
    """FID of `a` minus FID of `b` on common seeds: negative means that `a` is closer to the reference.

    `standard_error`, `z` and the two-sided `p_value` are None where n <= width.
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


def features_to_fid(features: Tensor, reference: Gaussian, debias: bool = False) -> FidEstimate:
    """FID of features [N, D] to a reference, with its standard error sd(g) / sqrt(N), g being its influence function.

    `debias` adds the delete-group jackknife (ten more distances): it takes away the bias of order 1/N, but not the
    reference's, and takes away too much where N is not well above D. Raises UsageError for fewer than two rows a group.
    """
    parts = _group_moments(features, GROUPS if debias else 1)
    return _estimate(features, parts, Factor.of(reference))[0]


def paired_difference(features_a: Tensor, features_b: Tensor, reference: Gaussian) -> PairedDifference:
    """FID(a) - FID(b) for features [N, D] whose rows k come from the same sampling seed.

    The standard error is that of the mean of g_a(k) - g_b(k), the two influence functions image by image: what the two
    sets have in common cancels. Raises UsageError if they do not pair up.
    """
    if features_a.shape != features_b.shape:
        found = f"{list(features_a.shape)} and {list(features_b.shape)}"
        raise UsageError(f"features on common seeds should pair up row by row, found {found}", "sample both with the same seeds")
    reference = Factor.of(reference)
    a, influence_a = _estimate(features_a, _group_moments(features_a, 1), reference)
    b, influence_b = _estimate(features_b, _group_moments(features_b, 1), reference)
    value, error, z, p_value = a.value - b.value, None, None, None
    if influence_a is not None and influence_b is not None:
        error = _error_of_mean(influence_a - influence_b)
        z = _z(value, error)
        p_value = float(2 * ndtr(-abs(z)))
    return PairedDifference(value, error, z, p_value, a.n, a.n_reference, a, b)


def verdict(difference: float, standard_error: float, confidence: float = CONFIDENCE) -> Verdict:
    """Whether a difference of two FIDs (new minus old) is significant at a two-sided `confidence`; negative is better."""
    z = _z(difference, standard_error)
    if abs(z) <= ndtri((1 + confidence) / 2):
        return "no significant change"
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


def _estimate(features: Tensor, parts: list[FeatureMoments], reference: Factor) -> tuple[FidEstimate, Tensor | None]:
    """Estimate and influence of each image [N] (None where N <= D); more than one of `parts`: debiased too."""
    whole = reduce(FeatureMoments.merge, parts)
    sample = Factor.of(whole)
    same_width(sample.width, reference.width)
    if whole.count <= sample.width:
        return FidEstimate(moments_to_fid(sample, reference), None, whole.count, reference.count), None
    rotation, singular_values, _ = torch.linalg.svd(sample.root.T @ reference.root, full_matrices=False)
    value = _distance(sample, reference, singular_values)
    influence = torch.cat(list(_influence(features, sample, reference, rotation, singular_values)))
    debiased = _debiased(parts, reference, value) if len(parts) > 1 else None
    return FidEstimate(value, _error_of_mean(influence), whole.count, reference.count, debiased), influence


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


def _group_moments(features: Tensor, groups: int) -> list[FeatureMoments]:
    """Moments of `groups` groups of rows; group g holds rows g, g + groups, ..., so that sorted classes spread evenly."""
    if groups > 1 and len(features) < 2 * groups:
        raise UsageError(f"a jackknife of {groups} groups needs {2 * groups} feature vectors, found {len(features)}")
    return [features_to_moments([features[group::groups]]) for group in range(groups)]


def _debiased(parts: list[FeatureMoments], reference: Factor, value: float) -> float:
    """Delete-group jackknife: G FID - sum (1 - n_g / N) FID without g (Busing et al. 1999, for groups of any size)."""
    total = sum(part.count for part in parts)
    debiased = len(parts) * value
    for index, part in enumerate(parts):
        rest = reduce(FeatureMoments.merge, parts[:index] + parts[index + 1 :])
        debiased -= (1 - part.count / total) * moments_to_fid(rest, reference)
    return debiased
