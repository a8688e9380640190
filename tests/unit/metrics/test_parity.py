"""All metrics of 2 048 features of width 2 048 against torch-fidelity and torchmetrics, within stated digits.

Features are what Inception's look like: not negative, skewed, correlated, with far fewer directions than numbers.
"""

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import _compute_fid

from dmpctl.metrics.frechet import moments_to_fid
from dmpctl.metrics.inception_score import logits_to_score
from dmpctl.metrics.kid import features_to_kid
from dmpctl.metrics.moments import features_to_moments
from dmpctl.metrics.prdc import precision_recall

N = WIDTH = 2048


def features(seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(9)) / 14
    x = torch.randn(N, 200, generator=generator) @ mix + 0.2 * torch.randn(N, WIDTH, generator=generator) + shift
    return x.relu()


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    return features(1), features(2, shift=0.05)


@pytest.mark.slow
def test_the_frechet_distance_is_theirs_to_a_hundredth(pair):
    one, two = pair
    found = moments_to_fid(features_to_moments([one]), features_to_moments([two]))
    stats = [fid_features_to_statistics(x) for x in pair]
    theirs = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert found == pytest.approx(theirs, abs=1e-2)
    sums = [(x.double().mean(0), torch.cov(x.double().T)) for x in pair]
    assert found == pytest.approx(float(_compute_fid(*sums[0], *sums[1])), abs=1e-2)
    assert found > 1


@pytest.mark.slow
def test_a_set_of_inceptions_width_is_at_no_distance_from_itself(pair):
    moments = features_to_moments([pair[0]])
    assert moments_to_fid(moments, moments) < 1e-3


def test_precision_and_recall_are_torch_fidelitys_exactly(pair):
    one, two = pair
    theirs = prc_features_to_metric(two.double(), one.double(), prc_neighborhood=3, verbose=False)
    found = precision_recall(one, two)
    assert (found.precision, found.recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1.01 / N)


def test_kid_is_torch_fidelitys_to_a_thousandth(pair):
    one, two = pair
    theirs = kid_features_to_metric(one, two, kid_subsets=10, kid_subset_size=500, rng_seed=3, verbose=False)
    found = features_to_kid(one, two, subsets=10, subset_size=500, seed=3)
    assert found.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)


def test_the_inception_score_is_torch_fidelitys(pair):
    logits = pair[0][:, :1008] * 4
    theirs = isc_features_to_metric(logits, splits=8, shuffle=False)
    found = logits_to_score(logits, split_size=N // 8)
    assert found.value == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert found.deviation == pytest.approx(theirs["inception_score_std"], rel=1e-6)
