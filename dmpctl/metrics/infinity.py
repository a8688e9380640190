"""FID without its bias of order 1/N, by a line through FIDs of fewer images (Chong and Forsyth 2020)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dmpctl.errors import UsageError
from dmpctl.metrics.frechet import FOR_A_DIFFERENCE, Factor, Gaussian, influence_of
from dmpctl.rng import seed_of
from dmpctl.types import Progress, Silent

POINTS = 15


@dataclass(frozen=True)
class FidInfinity:
    """`value` is where the line over 1/N meets 1/N = 0; `r_squared` says how well a line fits; the counts it goes through."""

    value: float
    standard_error: float
    r_squared: float
    fewest: int
    most: int


def fid_infinity(
    features: Tensor, reference: Gaussian, seed: int = 0, points: int = POINTS, progress: Progress | None = None
) -> FidInfinity:
    """FID of features [N, D] extrapolated to N = infinity; the reference's own bias stays.

    Subsets are drawn without replacement, `points` of them from the larger of N/10 and twice the width, up to N. The error
    is the infinitesimal jackknife's: subsets share images, so that of the line's fit would be far too small. Raises UsageError
    where N leaves no room for them.
    """
    count, width = features.shape
    fewest = max(count // 10, FOR_A_DIFFERENCE * width)
    if fewest >= count:
        raise UsageError(
            f"FID-infinity of {width} features takes more than {FOR_A_DIFFERENCE * width} images, found {count}",
            "use more images, or leave fid-infinity out of --metrics",
        )
    reference, generator = Factor.of(reference), torch.Generator().manual_seed(seed_of(seed, "fid infinity"))
    counts = [round(float(n)) for n in torch.linspace(fewest, count, points)]
    x = 1 / torch.tensor(counts, dtype=torch.float64)
    weights = 1 / points - x.mean() * (x - x.mean()) / (x - x.mean()).square().sum()  # of the distances, in the line's value at 0
    found, added = torch.zeros(points, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    with (progress or Silent()).track("FID-infinity", points) as task:
        for point, n in enumerate(counts):
            rows = torch.randperm(count, generator=generator)[:n].sort().values  # in order: a memory map is read once through
            value, influence = influence_of(features[rows], reference)
            found[point] = value
            added[rows] += weights[point] * (influence - influence.mean()) / n  # what each image adds to that value
            task.advance()
    value = float(weights @ found)
    r_squared = float(torch.corrcoef(torch.stack([x, found]))[0, 1] ** 2)
    return FidInfinity(value, float(added.square().sum().sqrt()), r_squared, counts[0], counts[-1])
