"""The Frechet distance against closed forms and other people's code; its certainty against repeated experiments."""

import math
from statistics import mean

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.stats import norm
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dmpctl.errors import NumericalError, UsageError
from dmpctl.metrics import frechet
from dmpctl.metrics.features.pixels import Pixels
from dmpctl.metrics.frechet import (
    FOR_A_DIFFERENCE,
    Factor,
    features_to_fid,
    has_interval,
    moments_to_fid,
    noise_floor,
    paired_difference,
    paired_gains,
    verdict,
)
from dmpctl.metrics.moments import FeatureMoments, features_to_moments
from dmpctl.types import Silent


def gaussian(mean: Tensor, covariance: Tensor, count: int = 1000) -> FeatureMoments:
    """Moments with exactly this mean and covariance."""
    return FeatureMoments(count, mean.double(), covariance.double() * (count - 1))


def normal(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cloud(count: int, width: int, seed: int, mix: int = 0) -> Tensor:
    """Correlated, skewed features: like those of a network they are not Gaussian and not negative."""
    return (normal(count, width, seed) @ normal(width, width, mix) / width**0.5 + 0.4).relu()


def moments(features: Tensor) -> FeatureMoments:
    return features_to_moments([features])


def spd(width: int, seed: int) -> Tensor:
    return torch.cov(normal(4 * width, width, seed).T)


# closed forms


def test_equal_covariances_leave_the_distance_of_the_means():
    a, b, covariance = normal(1, 9, 1)[0], normal(1, 9, 2)[0], spd(9, 3)
    assert moments_to_fid(gaussian(a, covariance), gaussian(b, covariance)) == pytest.approx(float((a - b).square().sum()))


def test_commuting_covariances():
    axes = torch.linalg.qr(normal(8, 8, 1)).Q
    s, t = torch.arange(1.0, 9).double(), torch.linspace(5, 0.1, 8).double()
    a, b = (gaussian(torch.zeros(8), axes @ torch.diag(v.square()) @ axes.T) for v in (s, t))
    assert moments_to_fid(a, b) == pytest.approx(float((s - t).square().sum()), rel=1e-12)


@pytest.mark.parametrize(("m1", "s1", "m2", "s2"), [(0.0, 1.0, 3.0, 0.5), (-1.0, 2.0, -1.0, 2.5), (2.0, 0.0, 1.0, 4.0)])
def test_one_dimension(m1, s1, m2, s2):
    a, b = (gaussian(torch.tensor([m]), torch.tensor([[s * s]], dtype=torch.float64)) for m, s in ((m1, s1), (m2, s2)))
    assert moments_to_fid(a, b) == pytest.approx((m1 - m2) ** 2 + (s1 - s2) ** 2, rel=1e-12)


@pytest.mark.parametrize("count", [20, 64, 2000])
def test_a_set_is_at_no_distance_from_itself(count):
    x = moments(cloud(count, 64, 1))
    assert 0 <= moments_to_fid(x, x) < 1e-10


def test_it_is_symmetric_and_a_factor_stands_for_its_moments():
    a, b = moments(cloud(300, 16, 1)), moments(cloud(200, 16, 2, mix=1))
    value = moments_to_fid(a, b)
    assert moments_to_fid(b, a) == pytest.approx(value, rel=1e-12)
    assert moments_to_fid(Factor.of(a), b) == moments_to_fid(a, Factor.of(b)) == value
    factor = Factor.of(a)
    assert Factor.of(factor) is factor


# other people's code


def test_it_is_scipys_sqrtm_route():
    a, b = moments(cloud(900, 24, 1)), moments(cloud(700, 24, 2, mix=1))
    root = scipy.linalg.sqrtm((a.covariance() @ b.covariance()).numpy()).real
    expected = float((a.mean - b.mean).square().sum() + a.covariance().trace() + b.covariance().trace()) - 2 * np.trace(root)
    assert moments_to_fid(a, b) == pytest.approx(expected, rel=1e-9)


def test_it_is_torch_fidelitys():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = cloud(900, 24, 1).float(), cloud(700, 24, 2, mix=1).float()
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), verbose=False)
    assert moments_to_fid(moments(a), moments(b)) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)


def test_it_is_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(nn.Identity):
        num_features = 24

    a, b = cloud(900, 24, 1), cloud(700, 24, 2, mix=1)
    theirs = FrechetInceptionDistance(feature=Given())
    theirs.update(a, real=False)
    theirs.update(b, real=True)
    assert moments_to_fid(moments(a), moments(b)) == pytest.approx(float(theirs.compute()), rel=1e-5)


def test_fewer_images_than_features_is_exact():
    """Against 50 digits, where tr (S_a S_b)^1/2 is the nuclear norm of X_a X_b^T (sqrtm is off by 6e-7 here)."""
    a, b = cloud(9, 40, 1), cloud(14, 40, 2, mix=1)
    with mpmath.workdps(50):
        x, y = (mpmath.matrix(f.tolist()) for f in (a, b))
        mean = [mpmath.matrix([[mpmath.fsum(f[:, j]) / f.rows for j in range(f.cols)]]) for f in (x, y)]
        x, y = (
            mpmath.matrix([[(f[i, j] - m[0, j]) / mpmath.sqrt(f.rows - 1) for j in range(f.cols)] for i in range(f.rows)])
            for f, m in zip((x, y), mean, strict=True)
        )
        traces = mpmath.fsum(v * v for v in x) + mpmath.fsum(v * v for v in y)
        shift = mpmath.fsum(v * v for v in mean[0] - mean[1])
        exact = float(shift + traces - 2 * mpmath.fsum(mpmath.svd_r(x * y.T, compute_uv=False)))
    assert moments_to_fid(moments(a), moments(b)) == pytest.approx(exact, rel=1e-12)


# constant features: pixels of digits


def digits() -> Tensor:
    images = torch.from_numpy(load_digits().images * 15.9375).to(torch.uint8)[:, None]
    return Pixels(1, 8)(images)


def test_constant_pixels_change_neither_distance_nor_error():
    x = digits()
    real, fake = x[:900], x[900:] + 0.05 * (x[900:] > -1) * normal(len(x) - 900, 64, 1).float()
    alive = x.std(dim=0) > 0
    assert 0 < (~alive).sum() < 8
    full = features_to_fid(fake, moments(real), debias=True)
    reduced = features_to_fid(fake[:, alive], moments(real[:, alive]), debias=True)
    assert full.value == pytest.approx(reduced.value, rel=1e-10)
    assert full.standard_error == pytest.approx(reduced.standard_error, rel=1e-8)
    assert full.debiased == pytest.approx(reduced.debiased, rel=1e-8)


def test_a_pixel_that_only_one_side_ever_lights():
    """That pixel adds its squared mean and its variance, and nothing to the certainty of a set in which it is constant."""
    x = digits()
    dead = int((x.std(dim=0) == 0).nonzero()[0])
    lit = x[900:].clone()
    lit[:, dead] += torch.arange(len(lit)) % 2
    plain, changed = features_to_fid(x[:900], moments(x[900:])), features_to_fid(x[:900], moments(lit))
    column = lit[:, dead].double() + 1
    assert changed.value - plain.value == pytest.approx(float(column.mean() ** 2 + column.var()), rel=1e-6)
    assert changed.standard_error == pytest.approx(plain.standard_error, rel=1e-8)


def test_a_generator_that_makes_one_image_only():
    x = digits()
    same = x[:1].expand(200, -1)
    real = moments(x)
    estimate = features_to_fid(same, real)
    expected = float((x[0].double() - real.mean).square().sum() + real.covariance().trace())
    assert estimate.value == pytest.approx(expected, rel=1e-12)
    assert estimate.standard_error == 0


# certainty


def by_finite_differences(x: Tensor, reference: FeatureMoments, step: float = 1e-5) -> Tensor:
    """Derivative of the distance when the sample's distribution is shifted a little towards each of its images [N]."""
    base = moments(x)
    mean, covariance = base.mean, base.covariance()

    def at(row: Tensor, by: float) -> float:
        c = row - mean
        return moments_to_fid(gaussian(mean + by * c, (1 - by) * covariance + by * (1 - by) * torch.outer(c, c)), reference)

    return torch.tensor([(at(row, step) - at(row, -step)) / (2 * step) for row in x], dtype=torch.float64)


def test_standard_error_is_that_of_the_derivative():
    x, y, reference = cloud(60, 5, 1), cloud(60, 5, 2), moments(cloud(500, 5, 3, mix=1))
    dx, dy = by_finite_differences(x, reference), by_finite_differences(y, reference)
    assert features_to_fid(x, reference).standard_error == pytest.approx(float(dx.std()) / 60**0.5, rel=1e-5)
    paired = paired_difference(x, y, reference)
    assert paired.standard_error == pytest.approx(float((dx - dy).std()) / 60**0.5, rel=1e-5)


@pytest.fixture(scope="module")
def repeated():
    """300 experiments: a generator, a slightly better one on the same seeds, and their true distances."""
    width, count = 8, 400
    mix, real_mix = normal(width, width, 1), normal(width, width, 1) + 0.3 * normal(width, width, 2)
    shift = torch.full((width,), 0.5, dtype=torch.float64)
    reference = Factor.of(gaussian(torch.zeros(width), real_mix.T @ real_mix))
    paired, debiased = [], []
    for seed in range(300):
        better = normal(count, width, 100 + seed) @ mix + shift
        worse = better + 0.1 * normal(count, width, 10_000 + seed) + 0.02
        paired.append(paired_difference(better, worse, reference))
        debiased.append(features_to_fid(better, reference, debias=True).debiased)
    noise = 0.1**2 * torch.eye(width, dtype=torch.float64)
    true_better = moments_to_fid(gaussian(shift, mix.T @ mix), reference)
    true_worse = moments_to_fid(gaussian(shift + 0.02, mix.T @ mix + noise), reference)
    return paired, np.array(debiased), true_better, true_worse


def test_standard_error_is_the_spread_of_repeated_experiments(repeated):
    spread = np.std([p.a.value for p in repeated[0]], ddof=1)
    assert np.mean([p.a.standard_error for p in repeated[0]]) == pytest.approx(spread, rel=0.15)


def test_paired_standard_error_is_the_spread_of_repeated_differences(repeated):
    paired = repeated[0]
    spread = np.std([p.value for p in paired], ddof=1)
    typical = np.mean([p.standard_error for p in paired])
    assert typical == pytest.approx(spread, rel=0.15)
    assert typical < 0.25 * math.hypot(paired[0].a.standard_error, paired[0].b.standard_error)


def test_paired_z_covers_the_truth_as_often_as_it_says(repeated):
    paired, _, true_better, true_worse = repeated
    scores = np.array([(p.value - (true_better - true_worse)) / p.standard_error for p in paired])
    assert 0.91 < np.mean(np.abs(scores) < norm.ppf(0.975)) < 0.985


def test_jackknife_takes_the_bias_away(repeated):
    paired, debiased, truth, _ = repeated
    plain = np.array([p.a.value for p in paired])
    tolerance = 3 * plain.std() / len(plain) ** 0.5
    assert plain.mean() - truth > 3 * tolerance
    assert abs(debiased.mean() - truth) < tolerance
    assert debiased.std() < 1.2 * plain.std()


def test_paired_difference_reports_both_sides():
    a, b, reference = cloud(200, 6, 1), cloud(200, 6, 2), moments(cloud(300, 6, 3))
    paired = paired_difference(a, b, reference)
    assert paired.a == features_to_fid(a, reference, debias=True)
    assert paired.b == features_to_fid(b, reference, debias=True)
    assert paired.value == paired.a.debiased - paired.b.debiased
    found, gains = paired_gains(a, b, reference)
    assert found == paired
    assert float(gains.mean()) == pytest.approx(paired.value)
    assert float(gains.std()) / 200**0.5 == pytest.approx(paired.standard_error)
    assert paired.z == paired.value / paired.standard_error
    assert paired.p_value == pytest.approx(2 * (1 - norm.cdf(abs(paired.z))), rel=1e-9)
    assert (paired.n, paired.n_reference) == (200, 300)
    swapped = paired_difference(b, a, reference)
    assert (swapped.value, swapped.z, swapped.p_value) == pytest.approx((-paired.value, -paired.z, paired.p_value))


def test_a_set_does_not_differ_from_itself():
    x, reference = cloud(200, 6, 1), moments(cloud(300, 6, 3))
    paired = paired_difference(x, x.clone(), reference)
    assert (paired.value, paired.standard_error, paired.z, paired.p_value) == (0, 0, 0, 1)


def test_no_certainty_is_claimed_for_too_few_images():
    """A difference takes two images per feature, a distance by itself three."""
    reference = moments(cloud(300, 32, 3))
    for count, alone, paired in ((64, False, False), (65, False, True), (96, False, True), (97, True, True)):
        assert (has_interval(count, 32), has_interval(count, 32, FOR_A_DIFFERENCE)) == (alone, paired)
        x, y = cloud(count, 32, 1), cloud(count, 32, 2)
        estimate, gap = features_to_fid(x, reference, debias=True), paired_difference(x, y, reference)
        for side in (estimate, gap.a):
            assert [side.standard_error is not None, side.debiased is not None] == [alone] * 2
        assert [each is not None for each in (gap.standard_error, gap.z, gap.p_value)] == [paired] * 3
        assert estimate.value == pytest.approx(moments_to_fid(moments(x), reference), rel=1e-12)


def test_neither_dtype_nor_blocks_matter(monkeypatch):
    x, reference = cloud(500, 6, 1).float(), moments(cloud(300, 6, 3))
    whole = features_to_fid(x, reference, debias=True)
    monkeypatch.setattr(frechet, "BLOCK", 64)
    blocks = features_to_fid(x.double(), reference, debias=True)
    assert blocks.standard_error == pytest.approx(whole.standard_error, rel=1e-12)
    assert blocks.debiased == pytest.approx(features_to_fid(x, reference, debias=True).debiased, rel=1e-9)
    assert blocks.value == pytest.approx(moments_to_fid(moments(x), reference), rel=1e-12)


def test_the_jackknife_takes_away_what_falls_as_a_parabola_in_one_over_n(monkeypatch):
    """Of a made-up distance 3 + 40 / n + 500 / n^2, 3 is left; groups differ by one image in size."""
    parts = frechet._group_moments(cloud(4003, 3, 1))
    assert sorted(part.count for part in parts) == [400] * 7 + [401] * 3
    monkeypatch.setattr(frechet, "moments_to_fid", lambda sample, _: 3 + 40 / sample.count + 500 / sample.count**2)
    found = frechet._debiased(parts, None, 3 + 40 / 4003 + 500 / 4003**2, Silent())
    assert found == pytest.approx(3, abs=1e-6)


def test_the_order_of_images_does_not_make_the_groups():
    """Sorted by class, or with the class changing with every image: groups are drawn."""
    reference = moments(cloud(300, 3, 3))
    x = cloud(2000, 3, 1)
    x[::2] += 4  # a stride of ten would give groups of one class each
    found, shuffled = (features_to_fid(each, reference, debias=True) for each in (x, x[torch.randperm(2000)]))
    assert abs(found.debiased - shuffled.debiased) < found.standard_error


def test_noise_floor_is_that_of_as_many_real_images():
    x = cloud(300, 5, 1)
    floors = [noise_floor(x, 200, seed) for seed in range(20)]
    assert floors[3] == noise_floor(x, 200, 3)
    assert len(set(floors)) == 20
    assert mean(floors) < 0.1 * moments_to_fid(moments(x), moments(cloud(300, 5, 1, mix=1)))
    assert mean(floors) > mean(noise_floor(x, 2000, seed) for seed in range(20)) > 0
    assert noise_floor(x, 200_000, 0) < 0.01 * mean(floors)


# words


@pytest.mark.parametrize(
    ("difference", "error", "said"),
    [
        (-0.20, 0.1, "improved"),
        (-0.19, 0.1, "no significant change"),
        (0.0, 0.1, "no significant change"),
        (0.19, 0.1, "no significant change"),
        (0.20, 0.1, "worse"),
        (0.0, 0.0, "no significant change"),
        (-1e-9, 0.0, "improved"),
        (1e-9, 0.0, "worse"),
    ],
)
def test_verdict(difference, error, said):
    assert verdict(difference, error) == said


def test_a_verdict_names_no_change_below_the_least():
    assert verdict(-0.2, 0.01, least=0.3) == "too small a change to name"
    assert verdict(-0.2, 0.01, least=0.2) == "improved"
    assert verdict(0.001, 0.01, least=0.2) == "no significant change"


def test_verdict_at_another_confidence():
    assert verdict(-0.2, 0.1, confidence=0.99) == "no significant change"
    assert verdict(-0.26, 0.1, confidence=0.99) == "improved"


@pytest.mark.parametrize(("difference", "error"), [(float("nan"), 0.1), (0.1, float("nan")), (0.1, -0.1)])
def test_no_verdict_from_what_is_not_a_number(difference, error):
    with pytest.raises(NumericalError):
        verdict(difference, error)


# refusals


def test_refusals():
    x, reference = cloud(50, 6, 1), moments(cloud(300, 6, 3))
    with pytest.raises(UsageError, match=r"width 5 .* width 6"):
        features_to_fid(x[:, :5], reference)
    with pytest.raises(UsageError, match=r"width 6 .* width 5"):
        moments_to_fid(reference, moments(x[:, :5]))
    with pytest.raises(UsageError, match="at least 2"):
        features_to_fid(x[:1], reference)
    with pytest.raises(UsageError, match="row by row"):
        paired_difference(x, x[:49], reference)
    assert features_to_fid(x[:20], reference, debias=True).debiased is None
    with pytest.raises(UsageError, match="at least 2"):
        noise_floor(x, 1, seed=0)
    x[7, 2] = float("nan")
    with pytest.raises(NumericalError, match="1 of 50"):
        features_to_fid(x, reference)


def test_what_is_no_covariance_is_refused():
    with pytest.raises(NumericalError, match="negative eigenvalue"):
        Factor.of(gaussian(torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])))
    with pytest.raises(NumericalError, match="not finite"):
        Factor.of(gaussian(torch.zeros(2), torch.full((2, 2), float("inf"))))


def test_a_distance_that_overflows_is_refused_not_called_zero():
    a, b = gaussian(torch.full((2,), 1e200, dtype=torch.float64), torch.eye(2)), gaussian(torch.zeros(2), torch.eye(2))
    with pytest.raises(NumericalError, match="the distance is inf"):
        moments_to_fid(a, b)
