"""Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020), block by block.

A manifold is a union of balls: around each image, as far as its k-th nearest neighbour among its own kind. Precision is the
share of generated images in a ball of real ones, recall the share of real images in a ball of generated ones: the order of
the two arguments matters, and a generator that makes one good image over and over has precision 1 and recall near 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dmpctl.errors import NumericalError, UsageError
from dmpctl.metrics.moments import same_width

BLOCK = 2048  # images of each side at a time: a block of distances has 32 MiB, whatever N
PR_NEIGHBOURS = 3  # Kynkäänniemi et al., ADM's evaluator
DC_NEIGHBOURS = 5  # Naeem et al.


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1], by k nearest neighbours."""

    precision: float
    recall: float
    neighbours: int


@dataclass(frozen=True)
class DensityCoverage:
    """Density (may exceed 1) and coverage in [0, 1], by k nearest neighbours."""

    density: float
    coverage: float
    neighbours: int


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = PR_NEIGHBOURS) -> PrecisionRecall:
    """Of features [N, D] and [M, D] of any float dtype, on any device; compared in float64.

    Raises UsageError where widths differ or a side has no more images than neighbours, NumericalError for features that are
    not finite.
    """
    _refuse(real, generated, neighbours)
    precision = _share_inside(generated, real, squared_radii(real, neighbours))
    recall = _share_inside(real, generated, squared_radii(generated, neighbours))
    return PrecisionRecall(precision, recall, neighbours)


def density_coverage(real: Tensor, generated: Tensor, neighbours: int = DC_NEIGHBOURS) -> DensityCoverage:
    """Of features [N, D] and [M, D]. Density: balls of real images that a generated one lies in, over k; coverage: share of
    real images whose ball holds a generated one. Raises as `precision_recall`.
    """
    _refuse(real, generated, neighbours)
    radii = squared_radii(real, neighbours)
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool)
    for rows, _, distances in _squared_distances(real, generated):
        within = distances < radii[rows, None]
        inside += int(within.sum())
        covered[rows] |= within.any(dim=1)
    return DensityCoverage(inside / (neighbours * len(generated)), int(covered.sum()) / len(real), neighbours)


def squared_radii(features: Tensor, neighbours: int) -> Tensor:
    """Squared distance [N] float64 of each of features [N, D] to its k-th nearest other one."""
    nearest = torch.full((len(features), neighbours + 1), torch.inf, dtype=torch.float64)  # the first is itself
    for rows, _, distances in _squared_distances(features, features):
        nearest[rows] = torch.cat([nearest[rows], distances], dim=1).topk(neighbours + 1, dim=1, largest=False).values
    return nearest[:, neighbours]


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of points [N, D] within a ball around a centre [M, D] of squared radius [M]."""
    inside = torch.zeros(len(points), dtype=torch.bool)
    for rows, columns, distances in _squared_distances(points, centres):
        inside[rows] |= (distances <= radii[columns]).any(dim=1)
    return int(inside.sum()) / len(points)


def _squared_distances(points: Tensor, others: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, squared distances [B, b] float64) of every block of points [N, D] to every block of others [M, D].

    |a|^2 + |b|^2 - 2 a b loses digits where vectors are long and near; float64 leaves far more of them than features have.
    """
    for rows in _blocks(points):
        a = points[rows].cpu().double()
        lengths = a.square().sum(dim=1)[:, None]
        for columns in _blocks(others):
            b = others[columns].cpu().double()
            yield rows, columns, (lengths + b.square().sum(dim=1) - 2 * a @ b.T).clamp(min=0)


def _blocks(features: Tensor) -> Iterator[slice]:
    """Slices of rows, BLOCK at a time."""
    return (slice(first, min(first + BLOCK, len(features))) for first in range(0, len(features), BLOCK))


def _refuse(real: Tensor, generated: Tensor, neighbours: int) -> None:
    same_width(real.shape[1], generated.shape[1])
    for name, features in (("real", real), ("generated", generated)):
        if len(features) <= neighbours:
            raise UsageError(f"{neighbours} nearest neighbours need more than {neighbours} {name} images, found {len(features)}")
        if not all(bool(torch.isfinite(part).all()) for part in torch.split(features, BLOCK)):
            raise NumericalError(f"features of {name} images are not finite", "look at the images they come from")
