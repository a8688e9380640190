"""FID without its bias of order 1/N, by a line through FIDs of fewer images (Chong and Forsyth 2020)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dmpctl.errors import UsageError
from dmpctl.metrics.frechet import Factor, Gaussian, moments_to_fid
from dmpctl.metrics.moments import features_to_moments
from dmpctl.rng import seed_of

POINTS = 15


@dataclass(frozen=True)
class FidInfinity:
    """`value` is where the line over 1/N meets 1/N = 0; `r_squared` says how well a line fits; the counts it goes through."""

    value: float
    standard_error: float
    r_squared: float
    fewest: int
    most: int


def fid_infinity(features: Tensor, reference: Gaussian, seed: int = 0, points: int = POINTS) -> FidInfinity:
    """FID of features [N, D] extrapolated to N = infinity; the reference's own bias stays.

    Subsets are drawn without replacement, `points` of them from the larger of N/10 and twice the width, up to N. Raises
    UsageError where N leaves no room for them.
    """
    count, width = features.shape
    fewest = max(count // 10, 2 * width)
    if fewest >= count:
        raise UsageError(
            f"FID-infinity of {width} features takes more than {2 * width} images, found {count}",
            "use more images, or leave fid-infinity out of --metrics",
        )
    reference, generator = Factor.of(reference), torch.Generator().manual_seed(seed_of(seed, "fid infinity"))
    counts = [round(float(n)) for n in torch.linspace(fewest, count, points)]
    found = []
    for n in counts:
        rows = torch.randperm(count, generator=generator)[:n].sort().values  # in order: a memory map is read once through
        found.append(moments_to_fid(features_to_moments(features[part] for part in torch.split(rows, 4096)), reference))
    from scipy.stats import linregress  # it costs half a second

    line = linregress([1 / n for n in counts], found)
    return FidInfinity(float(line.intercept), float(line.intercept_stderr), float(line.rvalue**2), counts[0], counts[-1])
