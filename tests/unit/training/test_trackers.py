"""Trackers beside metrics.jsonl: TensorBoard itself reads what was sent; no step comes twice, however a run was resumed."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dmpctl.errors import MissingError
from dmpctl.runs.rundir import RunDir
from dmpctl.training import trackers
from dmpctl.training.trackers import Trackers
from dmpctl.types import Silent
from tests.helpers import patch_run


def sent(run, name="loss"):
    """(step, value) of a figure over all event files of a run, as TensorBoard finds them."""
    found = []
    for path in sorted((run / "tensorboard" / "dmpctl").glob("events.*")):
        events = EventAccumulator(str(path)).Reload()
        if name in events.Tags()["scalars"]:
            found += [(event.step, event.value) for event in events.Scalars(name)]
    return found


def test_every_line_is_sent_once_over_a_kill_and_a_resume(tmp_path):
    run = tmp_path / "run"
    patch_run(run, iters=8, track="tensorboard", save_every=3)
    assert [step for step, _ in sent(run)] == list(range(1, 9))
    for path in (run / "checkpoints").glob("step-0000008"):  # as if it had been killed after step 8, before that checkpoint
        path.rename(tmp_path / "gone")
    patch_run(run, iters=12, track="tensorboard", save_every=3)
    assert [step for step, _ in sent(run)] == list(range(1, 13))
    assert [line["step"] for line in RunDir(run).metrics.lines()] == list(range(1, 13))
    assert [value for _, value in sent(run)] == pytest.approx([line["loss"] for line in RunDir(run).metrics.lines()], rel=1e-6)
    assert [value for _, value in sent(run, "lr/0")] == pytest.approx(
        [line["lr"][0] for line in RunDir(run).metrics.lines()], rel=1e-6
    )


def test_a_tracker_that_fails_is_said_once_and_left_out(tmp_path, monkeypatch):
    class Failing:
        def __init__(self, *args, **kwargs):
            pass

        def start(self):
            raise ConnectionError("no such host")

    said = []

    class Said(Silent):
        def say(self, message):
            said.append(message)

    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "wandb", Failing)
    with RunDir(tmp_path / "run") as run:
        tracked = Trackers(Said())
        tracked.start("wandb,tensorboard", run, {"lr": 0.1})
        tracked.log(1, {"loss": 2.0, "lr": [0.1]})
        tracked.finish()
    assert said == ["warning: wandb failed and is left out (ConnectionError: no such host); metrics.jsonl has everything"]
    assert sent(tmp_path / "run") == [(1, 2.0)]


def test_a_resumed_run_is_the_same_one_to_its_trackers_whose_talk_is_no_result(tmp_path, monkeypatch, capsys):
    given = []

    class Remembering:
        def __init__(self, project, **options):
            given.append((project, options["id"], options["resume"]))

        def start(self):
            print("talk")  # noqa: T201

        def store_init_configuration(self, values): ...
        def log(self, values, step): ...
        def finish(self): ...

    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "wandb", Remembering)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    for iters in (3, 6):
        patch_run(tmp_path / "run", iters=iters, track="wandb")
    assert given[0] == given[1]
    assert capsys.readouterr().out == ""
    assert given[0] == ("dmpctl", json.loads((tmp_path / "run" / "trackers.json").read_text())["id"], "allow")


def test_a_tracker_that_is_not_installed_is_a_sentence_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="--track trackio: its package is not installed") as failure:
        patch_run(tmp_path / "run", track="trackio")
    assert failure.value.hint == "python -m pip install 'dmpctl[trackio]'"
    assert not (tmp_path / "run" / "config.json").exists()
