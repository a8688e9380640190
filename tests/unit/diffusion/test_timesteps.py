"""Importance-sampled timesteps: scipy's chi-square on what is drawn, and means that stay what they are."""

import pytest
import torch
from scipy.stats import chisquare

from dmpctl.diffusion.timesteps import FLOOR, TimestepDensity
from dmpctl.errors import NumericalError

ERRORS = {0: 1.0, 10: 0.5, 40: 0.1, 99: 0.0}


def density() -> TimestepDensity:
    return TimestepDensity.from_errors(ERRORS, 100)


def drawn(count: int, seed: int = 0) -> torch.Tensor:
    return density().draw(torch.rand(count, generator=torch.Generator().manual_seed(seed)))


def test_timesteps_are_drawn_as_often_as_the_density_says() -> None:
    share = torch.diff(density().cumulative, prepend=torch.zeros(1))
    counts = torch.bincount(drawn(200_000), minlength=100)
    assert chisquare(counts.numpy(), (share * 200_000).numpy()).pvalue > 1e-3
    uniform = torch.full((100,), 2000.0)
    assert chisquare(counts.numpy(), uniform.numpy()).pvalue < 1e-12


def test_the_density_follows_the_errors_and_keeps_a_floor() -> None:
    share = torch.diff(density().cumulative, prepend=torch.zeros(1)) * 100
    assert share[0] == share.max()
    assert torch.all(share[:11].diff() < 0)
    assert float(share.min()) == pytest.approx(FLOOR / (1 + FLOOR))


def test_a_weighted_mean_is_the_mean_under_uniform_timesteps() -> None:
    values = torch.arange(100).double().square()
    share = torch.diff(density().cumulative, prepend=torch.zeros(1))
    assert float((share * density().weights * values).sum()) == pytest.approx(float(values.mean()), rel=1e-6)
    t = drawn(400_000)
    found, error = (density().weights[t] * values[t]).mean(), (density().weights[t] * values[t]).std() / 400_000**0.5
    assert abs(found - values.mean()) < 4 * error


def test_weighting_by_the_errors_takes_noise_out_of_their_mean() -> None:
    errors = torch.tensor([float(value) for value in torch.linspace(1, 0, 100) ** 3])
    found = TimestepDensity.from_errors({t: float(e) for t, e in enumerate(errors)}, 100)
    t = found.draw(torch.rand(50_000, generator=torch.Generator().manual_seed(1)))
    assert (found.weights[t] * errors[t]).var() < 0.3 * errors.var()


def test_the_ends_of_the_unit_interval_are_timesteps() -> None:
    assert density().draw(torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 99]


@pytest.mark.parametrize("errors", [{0: 0.0, 99: 0.0}, {0: float("nan"), 99: 1.0}, {0: -1.0, 99: 1.0}])
def test_errors_that_say_nothing_are_refused(errors: dict[int, float]) -> None:
    with pytest.raises(NumericalError, match="which timesteps matter"):
        TimestepDensity.from_errors(errors, 100)
