"""Precision, recall, density, coverage against torch-fidelity and a double loop written from the papers."""

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_prc import prc_features_to_metric

from dmpctl.errors import NumericalError, UsageError
from dmpctl.metrics import prdc
from dmpctl.metrics.prdc import density_coverage, precision_recall, squared_radii


def features(count: int, width: int = 6, shift: float = 0.0, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.fixture(params=[2048, 7])
def _blocks(request, monkeypatch):
    """In one block, and in many with a rest."""
    monkeypatch.setattr(prdc, "BLOCK", request.param)


def radius(x: Tensor, i: int, k: int) -> float:
    return sorted(float((x[i] - x[j]).norm()) for j in range(len(x)) if j != i)[k - 1]


@pytest.mark.usefixtures("_blocks")
def test_precision_and_recall_are_torch_fidelitys():
    real, generated = features(300), features(260, shift=0.8, seed=1)
    theirs = prc_features_to_metric(generated, real, prc_neighborhood=3, prc_batch_size=10000, save_cpu_ram=False, verbose=False)
    found = precision_recall(real, generated)
    assert found.precision == pytest.approx(theirs["precision"], abs=1e-7)
    assert found.recall == pytest.approx(theirs["recall"], abs=1e-7)
    assert 0.1 < found.recall < found.precision < 0.95 or 0.1 < found.precision < 0.95


@pytest.mark.usefixtures("_blocks")
def test_all_four_from_the_papers_one_pair_at_a_time():
    real, generated = features(40), features(30, shift=0.7, seed=1)
    balls = [radius(real, i, 3) for i in range(len(real))]
    own = [radius(generated, i, 3) for i in range(len(generated))]
    inside = [any(float((g - r).norm()) <= balls[i] for i, r in enumerate(real)) for g in generated]
    reached = [any(float((r - g).norm()) <= own[i] for i, g in enumerate(generated)) for r in real]
    found = precision_recall(real, generated)
    assert (found.precision, found.recall) == (sum(inside) / 30, sum(reached) / 40)
    wide = [radius(real, i, 5) for i in range(len(real))]
    hits = [[float((g - r).norm()) < wide[i] for g in generated] for i, r in enumerate(real)]
    other = density_coverage(real, generated)
    assert other.density == pytest.approx(sum(map(sum, hits)) / (5 * 30))
    assert other.coverage == pytest.approx(sum(map(any, hits)) / 40)


def test_a_collapsed_generator_is_precise_and_recalls_nothing():
    real = features(400)
    collapsed = real[:1] + 1e-3 * features(400, seed=2)
    found = precision_recall(real, collapsed)
    assert found.precision == 1.0
    assert found.recall < 0.02
    swapped = precision_recall(collapsed, real)
    assert (swapped.precision, swapped.recall) == (found.recall, found.precision)


def test_equal_sets_are_all_inside():
    x = features(50)
    assert precision_recall(x, x) == prdc.PrecisionRecall(1.0, 1.0, 3)
    assert density_coverage(x, x).coverage == 1.0


def test_long_vectors_keep_their_small_distances():
    """Features far from the origin: in float32 the square of a difference would be lost."""
    x, y = features(60), features(60, shift=0.5, seed=1)
    far = torch.full((6,), 3000.0)
    assert precision_recall(x.double() + far, y.double() + far) == precision_recall(x.double(), y.double())


@pytest.mark.usefixtures("_blocks")
def test_radii_of_points_on_a_line():
    line = torch.arange(20.0)[:, None]
    assert squared_radii(line, 3).tolist() == [9.0, 4.0] + [4.0] * 16 + [4.0, 9.0]


def test_what_makes_no_manifold():
    with pytest.raises(UsageError, match="more than 3 real images, found 3"):
        precision_recall(features(3), features(9))
    with pytest.raises(UsageError, match="width"):
        precision_recall(features(9), features(9, width=5))
    bad = features(9)
    bad[4, 2] = torch.nan
    with pytest.raises(NumericalError, match="generated"):
        density_coverage(features(9), bad)
