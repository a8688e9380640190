"""The Inception Score against torch-fidelity, ADM's rule written out, and values known in closed form."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from dmpctl.errors import NumericalError, UsageError
from dmpctl.metrics.inception_score import logits_to_score


def logits(count: int, classes: int = 20, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [100, 205])
def test_contiguous_splits_are_torch_fidelitys_without_shuffling(count):
    x = logits(count)
    theirs = isc_features_to_metric(x, splits=count // 20 if count == 100 else 1, shuffle=False)
    found = logits_to_score(x, split_size=20 if count == 100 else count)
    assert found.value == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    assert found.deviation == pytest.approx(theirs["inception_score_std"], rel=1e-7, abs=1e-12)


def test_shuffled_splits_agree_with_torch_fidelity_within_their_spread():
    x = logits(2048)
    theirs = isc_features_to_metric(x)
    found = logits_to_score(x, seed=3)
    assert found.splits == 10
    assert abs(found.value - theirs["inception_score_mean"]) < 3 * found.deviation / 10**0.5
    assert logits_to_score(x, seed=3) == found
    assert logits_to_score(x, seed=4) != found


def test_adms_rule_written_out():
    """Splits of `split_size` in order, the last one shorter, each scored alone."""
    x = logits(70).double().softmax(1).numpy()
    scores = []
    for first in range(0, 70, 30):
        p = x[first : first + 30]
        scores.append(np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), axis=1))))
    found = logits_to_score(logits(70), split_size=30)
    assert found.value == pytest.approx(np.mean(scores), rel=1e-10)
    assert (found.splits, found.smallest) == (3, 10)


def test_sorted_classes_are_scored_as_one_class_where_splits_are_contiguous():
    sure = 50 * torch.eye(10).repeat_interleave(50, dim=0)  # 500 images, sorted by class
    assert logits_to_score(sure, split_size=50).value == pytest.approx(1.0)
    assert logits_to_score(sure).value > 8
    assert logits_to_score(sure, split_size=500).value == pytest.approx(10.0, rel=1e-6)


def test_images_that_say_nothing_score_one():
    assert logits_to_score(torch.zeros(40, 7)).value == pytest.approx(1.0)


def test_what_makes_no_score():
    with pytest.raises(UsageError, match="at least 10 images"):
        logits_to_score(logits(9))
    with pytest.raises(NumericalError, match="not finite"):
        logits_to_score(torch.full((20, 3), torch.inf))
