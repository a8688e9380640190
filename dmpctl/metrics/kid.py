"""Kernel Inception Distance (Binkowski et al. 2018): unbiased MMD^2 with a cubic kernel, over random subsets."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dmpctl.errors import UsageError
from dmpctl.metrics.moments import same_width
from dmpctl.rng import seed_of

SUBSETS, SUBSET_SIZE = 100, 1000
PARTNERS = 4096  # images that each image is compared with for the standard error
BLOCK = 2048  # images at a time: a block of kernels has 64 MiB


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over `subsets` subsets of `subset_size` images a side, as published numbers have them.

    The deviation is no standard error: of a side that has no more images than a subset it holds no variation at all.
    `standard_error` covers the sampling of both sides and of the subsets.
    """

    value: float
    deviation: float
    subsets: int
    subset_size: int
    standard_error: float


def features_to_kid(
    generated: Tensor, real: Tensor, subsets: int = SUBSETS, subset_size: int | None = None, seed: int = 0
) -> KernelDistance:
    """torch-fidelity's KID of features [N, D] and [M, D], in float64; kernel (x y / D + 1)^3.

    `subset_size` None: 1000, or all of the smaller side where it has fewer. Raises UsageError where widths differ, or for
    subsets larger than a side.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    same_width(generated.shape[1], real.shape[1])
    most = min(len(generated), len(real))
    size = min(SUBSET_SIZE, most) if subset_size is None else subset_size
    if not 2 <= size <= most:
        raise UsageError(f"KID subsets of {size} images do not fit {len(generated)} generated and {len(real)} real ones")
    found = kid_features_to_metric(
        generated.double(), real.double(), kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    value, deviation = found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]
    variance = _variance(generated, real, seed) + deviation**2 / subsets
    return KernelDistance(value, deviation, subsets, size, math.sqrt(variance))


def _variance(generated: Tensor, real: Tensor, seed: int) -> float:
    """Variance of the unbiased MMD^2 of all images: both terms of Hoeffding (where both sides are alike the second is all)."""
    first = second = 0.0
    for own, other in ((generated, real), (real, generated)):
        near, near_spread, near_count = _affinity(own, own, seed)
        far, far_spread, far_count = _affinity(own, other, seed)
        noise = near_spread / near_count + far_spread / far_count  # of a mean over so many partners
        first += 4 * (float((near - far).var()) - noise) / len(own)
        second += 2 * near_spread / len(own) ** 2 + 2 * far_spread / (len(own) * len(other))
    return max(first + second, second / 2)  # the first is an estimate that may fall below 0


def _affinity(points: Tensor, others: Tensor, seed: int) -> tuple[Tensor, float, int]:
    """Mean kernel [N] of each of points [N, D] with partners, PARTNERS of others [M, D] at most; of a set with itself without
    its own. Then the mean square of the kernels less the means of their rows and columns, and the number of partners.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, "kid partners"))
    drawn = torch.randperm(len(others), generator=generator)[:PARTNERS].sort().values
    partners, width, means = others[drawn].cpu().double(), points.shape[1], []
    squares, columns = 0.0, torch.zeros(len(drawn), dtype=torch.float64)
    for rows in torch.split(torch.arange(len(points)), BLOCK):
        kernels = (points[rows].cpu().double() @ partners.T / width + 1) ** 3
        itself = rows[:, None] == drawn if points is others else torch.zeros_like(kernels, dtype=torch.bool)
        means.append(kernels.masked_fill(itself, 0.0).sum(1) / (len(drawn) - itself.sum(1)))
        rest = (kernels - means[-1][:, None]).masked_fill(itself, 0.0)
        squares, columns = squares + float(rest.square().sum()), columns + rest.sum(0)
    spread = (squares - float(columns.square().sum()) / len(points)) / (len(points) * len(drawn))
    return torch.cat(means), spread, len(drawn)
