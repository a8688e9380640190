"""Checkpoints in the background: a copy of the moment, in order, and failures that are heard of."""

from threading import Event

import pytest
import torch

from dmpctl.errors import UsageError
from dmpctl.runs import checkpoint
from dmpctl.runs.checkpoint import Saver
from dmpctl.runs.records import Description
from tests.helpers import largest_file


def state(step: int, value: torch.Tensor) -> checkpoint.TrainerState:
    return checkpoint.TrainerState(step, {"a": value}, {"a": value + 1}, {"a": {"exp_avg": value * 2}}, {})


def test_what_is_saved_is_the_moment_of_the_call(tmp_path, monkeypatch):
    """The writer is held back until training has changed everything in place."""
    go, write = Event(), checkpoint.save

    def slow(*args):
        assert go.wait(10)
        return write(*args)

    monkeypatch.setattr(checkpoint, "save", slow)
    weights, fixed = torch.arange(3.0), torch.full((2,), 7.0)
    with Saver(tmp_path, "patch", keep=3) as saver:
        saver.save(state(4, weights), {"fixed": fixed}, Description(schema_version=1))
        weights += 100
        fixed += 100
        go.set()
    path = tmp_path / "step-0000004"
    found = checkpoint.load(path)
    assert found.raw["a"].tolist() == [0, 1, 2]
    assert found.optimizer["a"]["exp_avg"].tolist() == [0, 2, 4]
    published, _ = checkpoint.read_tensors(path / "patch.safetensors")
    assert published["a"].tolist() == [1, 2, 3]  # the average
    assert published["fixed"].tolist() == [7, 7]


def test_a_failure_is_raised_by_the_next_call(tmp_path):

    def saved(steps: int, *, finish: bool) -> None:
        with Saver(tmp_path, "patch", keep=3) as saver:
            for step in range(steps):
                saver.save(state(step, torch.zeros(1)), {}, Description())
            if finish:
                saver.finish()

    for steps, finish in ((1, True), (2, False), (1, False)):
        with largest_file(100), pytest.raises(UsageError, match="File too large"):
            saved(steps, finish=finish)


def test_the_last_ones_stay_and_every_so_many(tmp_path):
    with Saver(tmp_path, "patch", keep=2, keep_every=4) as saver:
        for step in range(1, 10):
            saver.save(state(step, torch.zeros(1)), {}, Description())
    assert [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path)] == [4, 8, 9]
