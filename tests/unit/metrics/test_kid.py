"""KID against the unbiased estimator written out, torchmetrics, and its mean of zero."""

import pytest
import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from dmpctl.errors import UsageError
from dmpctl.metrics.kid import _affinity, features_to_kid


def features(count: int, shift: float = 0.0, seed: int = 0) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)) + shift


def mmd2(x: Tensor, y: Tensor) -> float:
    """Unbiased MMD^2, one pair at a time."""
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 16 + 1) ** 3)

    n = len(x)
    same = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j)
    return same / (n * (n - 1)) - 2 * sum(kernel(a, b) for a in x for b in y) / n**2


def test_one_subset_of_everything_is_the_estimator():
    x, y = features(30), features(30, shift=0.4, seed=1)
    found = features_to_kid(x, y, subsets=1, subset_size=30)
    assert found.value == pytest.approx(mmd2(x, y), rel=1e-9)
    assert found.value == pytest.approx(float(poly_mmd(x.double(), y.double())), rel=1e-6)


def test_subsets_of_the_same_law_have_mean_zero():
    found = features_to_kid(features(2000), features(2000, seed=1), subsets=50, subset_size=200)
    assert abs(found.value) < 4 * found.deviation / 50**0.5
    assert features_to_kid(features(2000), features(2000, 0.3, 1), subsets=50, subset_size=200).value > 10 * abs(found.value)


def test_a_seed_fixes_the_subsets():
    x, y = features(300), features(300, 0.2, 1)
    assert features_to_kid(x, y, 5, 50, seed=1) == features_to_kid(x, y, 5, 50, seed=1)
    assert features_to_kid(x, y, 5, 50, seed=1) != features_to_kid(x, y, 5, 50, seed=2)


def test_subsets_follow_the_smaller_side():
    assert features_to_kid(features(40), features(60), subsets=2).subset_size == 40
    with pytest.raises(UsageError, match="subsets of 50 images"):
        features_to_kid(features(40), features(60), subset_size=50)
    with pytest.raises(UsageError, match="width"):
        features_to_kid(features(40), features(40)[:, :3])


def test_the_standard_error_is_the_spread_of_repeated_experiments():
    """With fewer images than a subset, whose "sd over subsets" then holds no variation of either side."""
    found = [features_to_kid(features(200, 0.2, 2 * k), features(150, 0.0, 2 * k + 1), subsets=5) for k in range(60)]
    spread = torch.tensor([each.value for each in found]).std()
    assert sum(each.standard_error for each in found) / 60 == pytest.approx(float(spread), rel=0.25)
    assert sum(each.deviation for each in found) / 60 < 0.7 * spread


def test_the_standard_error_leaves_each_image_out_of_its_own_partners():
    x, y = features(30), features(30, shift=0.4, seed=1)
    own = torch.tensor([[0.0 if i == j else float((x[i] @ x[j] / 16 + 1) ** 3) for j in range(30)] for i in range(30)])
    assert _affinity(x, x, 0)[0].tolist() == pytest.approx((own.sum(1) / 29).tolist(), rel=1e-5)
    across = torch.tensor([[float((x[i] @ y[j] / 16 + 1) ** 3) for j in range(30)] for i in range(30)])
    assert _affinity(x, y, 0)[0].tolist() == pytest.approx(across.mean(1).tolist(), rel=1e-5)
