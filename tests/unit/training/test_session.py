"""When two runs are the same experiment."""

import pytest

from dmpctl.training.session import science_of
from tests.helpers import settings_for


def test_more_steps_are_the_same_experiment_but_under_a_decay():
    few, many = (science_of(settings_for("patch", iters=iters)) for iters in (10, 20))
    assert few == many
    few, many = (science_of(settings_for("patch", iters=iters, lr_schedule="cosine")) for iters in (10, 20))
    assert (few.pop("iters"), many.pop("iters")) == (10, 20)
    assert few == many


@pytest.mark.parametrize(
    "free", [{"save_every": 1}, {"num_workers": 1}, {"run": "x"}, {"steps": 3}, {"quiet": True}, {"cpu": True}]
)
def test_what_does_not_change_the_result_is_free(free):
    assert science_of(settings_for("patch", **free)) == science_of(settings_for("patch"))


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"gate_lr": 1.0}, {"batch_size": 3}, {"ema": 0.5}, {"grad_clip": 1.0}, {"hflip": True}]
)
def test_what_changes_the_result_is_another_experiment(changed):
    assert science_of(settings_for("patch", **changed)) != science_of(settings_for("patch"))
