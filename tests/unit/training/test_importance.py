"""Importance-sampled timesteps in a run: measured once, the same after a resume, refused without a frozen backbone."""

import json

import pytest

from dmpctl.errors import UsageError
from tests.helpers import patch_run, pretrain_run

IMPORTANCE = {"timestep_sampling": "importance"}


def weights(run):
    return (run / "patch.safetensors").read_bytes()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    patch_run(tmp_path / "whole", **IMPORTANCE)
    patch_run(tmp_path / "parts", **IMPORTANCE, iters=3)
    measured = (tmp_path / "parts" / "timesteps.json").stat().st_mtime_ns
    patch_run(tmp_path / "parts", **IMPORTANCE)
    assert (tmp_path / "parts" / "timesteps.json").stat().st_mtime_ns == measured
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_the_density_is_what_training_draws_from(tmp_path):
    """With all the error at one end, a run sees other timesteps: another patch than with uniform ones, or another profile."""
    patch_run(tmp_path / "uniform")
    patch_run(tmp_path / "importance", **IMPORTANCE)
    assert weights(tmp_path / "uniform") != weights(tmp_path / "importance")
    assert not (tmp_path / "uniform" / "timesteps.json").exists()
    errors = json.loads((tmp_path / "importance" / "timesteps.json").read_text())["errors"]
    assert len(errors) == 25
    assert errors["19"] > 5 * errors["979"]


def test_the_kind_of_timesteps_belongs_to_the_experiment(tmp_path):
    patch_run(tmp_path / "run", iters=3)
    with pytest.raises(UsageError, match="timestep_sampling"):
        patch_run(tmp_path / "run", **IMPORTANCE)


def test_pretraining_has_no_backbone_to_ask(tmp_path):
    with pytest.raises(UsageError, match="frozen backbone"):
        pretrain_run(tmp_path / "run", **IMPORTANCE)
