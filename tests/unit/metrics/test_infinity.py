"""FID-infinity on Gaussians whose distance is known."""

from statistics import mean

import pytest
import torch

from dmpctl.errors import UsageError
from dmpctl.metrics.frechet import features_to_fid
from dmpctl.metrics.infinity import fid_infinity
from dmpctl.metrics.moments import features_to_moments

WIDTH = 24
TRUE = 0.3**2 * WIDTH


def drawn(count: int, shift: float, seed: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_it_lies_nearer_to_the_truth_than_the_plain_distance():
    reference = features_to_moments([drawn(200_000, 0.0, 0)])
    plain, infinite = [], []
    for seed in range(1, 7):
        x = drawn(1200, 0.3, seed)
        plain.append(features_to_fid(x, reference).value - TRUE)
        infinite.append(fid_infinity(x, reference, seed=seed).value - TRUE)
    assert mean(plain) > 0.1
    assert abs(mean(infinite)) < 0.5 * mean(plain)


def test_it_says_how_well_a_line_fits_and_is_fixed_by_its_seed():
    reference, x = features_to_moments([drawn(5000, 0.0, 0)]), drawn(2000, 0.3, 1)
    found = fid_infinity(x, reference, seed=5)
    assert (found.fewest, found.most) == (200, 2000)
    assert 0.5 < found.r_squared <= 1
    assert found == fid_infinity(x, reference, seed=5)
    assert found != fid_infinity(x, reference, seed=6)


def test_its_error_is_the_spread_of_repeated_experiments():
    """Subsets of one sample share images: the error of the line's fit is a fraction of this."""
    reference = features_to_moments([drawn(200_000, 0.0, 0)])
    found = [fid_infinity(drawn(400, 0.3, seed), reference, seed=seed) for seed in range(40)]
    spread = torch.tensor([each.value for each in found]).std()
    assert sum(each.standard_error for each in found) / 40 == pytest.approx(float(spread), rel=0.3)


def test_too_few_images_are_refused():
    reference = features_to_moments([drawn(100, 0.0, 0)])
    with pytest.raises(UsageError, match="more than 48 images"):
        fid_infinity(drawn(48, 0.0, 1), reference)
