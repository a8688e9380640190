"""Kernel Inception Distance (Binkowski et al. 2018): unbiased MMD^2 with a cubic kernel, over random subsets."""

from dataclasses import dataclass

from torch import Tensor

from dmpctl.errors import UsageError
from dmpctl.metrics.moments import same_width

SUBSETS, SUBSET_SIZE = 100, 1000


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over `subsets` subsets of `subset_size` images a side."""

    value: float
    deviation: float
    subsets: int
    subset_size: int


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
    return KernelDistance(found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"], subsets, size)
