import sys

import pytest
import torch

from dmpctl.engine.build import resolve_device
from dmpctl.engine.launch import accelerator_for, again_command, science_of
from dmpctl.errors import UsageError
from tests.helpers import settings_for


def test_the_command_that_goes_on_is_the_one_that_was_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/dmpctl", "patch", "--run", "my run"])
    assert again_command() == "dmpctl patch --run 'my run'"


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


def test_many_processes_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="2 processes were asked for"):
        accelerator_for(settings_for("patch", num_processes=2))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="4 processes were asked for"):
        accelerator_for(settings_for("patch"))


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for given in ({}, {"device": "cpu"}, {"cpu": True}):
        assert resolve_device(settings_for("patch", **given).launch) == torch.device("cpu")
    with pytest.raises(UsageError, match=r"--device cuda:1 is not there \(0 found\)"):
        resolve_device(settings_for("patch", device="cuda:1").launch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device(settings_for("patch", device="cuda:1").launch) == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device(settings_for("patch").launch) == torch.device("cuda")


def test_half_precision_on_a_cpu_is_a_sentence():
    with pytest.raises(UsageError, match="--precision fp16"):
        accelerator_for(settings_for("patch", precision="fp16", cpu=True))
