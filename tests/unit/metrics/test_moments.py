"""Moments are the same numbers however the features arrive (invariant 7)."""

import itertools

import numpy as np
import pytest
import torch

from dmpctl.errors import NumericalError, UsageError
from dmpctl.metrics.moments import BLOCK, FeatureMoments, features_to_moments


def features(count: int = 500, width: int = 12, seed: int = 0) -> torch.Tensor:
    """Correlated float32 features far from zero, where a naive sum of squares would lose digits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator) + 30


def close(a: FeatureMoments, b: FeatureMoments) -> bool:
    scale = float(b.scatter.abs().max())
    return (
        a.count == b.count
        and torch.allclose(a.mean, b.mean, rtol=1e-12, atol=0)
        and torch.allclose(a.scatter, b.scatter, rtol=1e-9, atol=1e-12 * scale)
    )


def test_mean_and_covariance_are_numpys():
    x = features()
    moments = features_to_moments([x])
    np.testing.assert_allclose(moments.mean.numpy(), x.double().numpy().mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance().numpy(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-10, atol=1e-12)
    assert moments.count == 500
    assert moments.mean.dtype == moments.scatter.dtype == torch.float64
    assert torch.equal(moments.covariance(), moments.covariance().T)


@pytest.mark.parametrize("size", [1, 7, 100, 499])
def test_batch_size_does_not_matter(size):
    x = features()
    assert close(features_to_moments(x.split(size)), features_to_moments([x]))


def test_more_rows_than_one_block():
    x = torch.randn(BLOCK + 100, 5, generator=torch.Generator().manual_seed(0))
    assert close(features_to_moments([x]), features_to_moments(x.split(1_000)))


def test_order_does_not_matter():
    x = features()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    assert close(features_to_moments(x[order].split(33)), features_to_moments(x.split(50)))


def test_merged_shards_are_the_whole_in_any_order_of_merging():
    x = features()
    whole = features_to_moments([x])
    shards = [features_to_moments([x[:3]]), features_to_moments([x[3:200]]), features_to_moments(x[200:].split(9))]
    for a, b, c in itertools.permutations(shards):
        assert close(a.merge(b).merge(c), whole)
        assert close(a.merge(b.merge(c)), whole)


def test_a_rank_without_images_changes_nothing():
    moments, empty = features_to_moments([features()]), FeatureMoments.empty(12)
    for merged in (empty.merge(moments), moments.merge(empty)):
        assert merged.count == moments.count
        assert torch.equal(merged.mean, moments.mean)
        assert torch.equal(merged.scatter, moments.scatter)
    assert empty.merge(FeatureMoments.empty(12)).count == 0


def test_merging_leaves_its_parts_alone():
    x = features()
    a, b = features_to_moments([x[:100]]), features_to_moments([x[100:]])
    merged = a.merge(b)
    merged.add(x)
    assert close(a, features_to_moments([x[:100]]))
    assert close(b, features_to_moments([x[100:]]))


def test_an_offset_a_million_times_the_spread_costs_no_digits():
    x = features(width=3).double()
    shifted = features_to_moments((x + 2.0**25).split(16)).covariance()
    assert torch.allclose(shifted, features_to_moments([x]).covariance(), rtol=1e-6)


def test_constant_features_have_a_variance_of_exactly_zero():
    x = features()
    x[:, 4], x[:, 7] = -1.0, 0.1
    merged = features_to_moments(x[:90].split(11)).merge(features_to_moments(x[90:].split(7)))
    for column in (4, 7):
        assert not merged.covariance()[column].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_is_taken_at_its_exact_value(dtype):
    x = features().to(dtype)
    assert close(features_to_moments([x]), features_to_moments([x.double()]))


def test_an_empty_batch_is_no_batch():
    x = features()
    moments = features_to_moments([x[:0], x, x[:0]])
    assert close(moments, features_to_moments([x]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_counted_and_refused(bad):
    x = features()
    x[3, 1] = x[3, 2] = x[8, 0] = bad
    with pytest.raises(NumericalError, match="2 of 500"):
        features_to_moments([x])


@pytest.mark.parametrize(
    "batch", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(3, 4, dtype=torch.int64)]
)
def test_other_shapes_and_integers_are_refused(batch):
    with pytest.raises(UsageError, match="floating point"):
        features_to_moments([batch])


def test_widths_must_agree():
    moments = features_to_moments([features()])
    with pytest.raises(UsageError, match=r"\[B, 12\]"):
        moments.add(features(width=11))
    with pytest.raises(UsageError, match=r"width 12 .* width 11"):
        moments.merge(features_to_moments([features(width=11)]))


def test_no_features_and_a_single_one_are_refused():
    with pytest.raises(UsageError, match="no features"):
        features_to_moments([])
    with pytest.raises(UsageError, match="at least 2"):
        features_to_moments([features()[:1]]).covariance()
