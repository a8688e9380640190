import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.runs.rundir import RunDir, version_of
from tests.helpers import patch_run, write_by_hand

SCIENCE = {"seed": 0, "prompt_lr": 1e-3, "backbone_sha256": "abc", "size": None}


def begun(path: Path, science=None, command="patch", save_every: int = 5) -> None:
    """What a command does with its run before it trains."""
    science = SCIENCE if science is None else science
    with RunDir(path) as run:
        run.refuse_other(command, science)
        run.begin(command, science, {"save": {"save_every": save_every}}, {"device": "cpu"})


def test_a_new_run_holds_its_config(tmp_path):
    begun(tmp_path / "a" / "b")
    config = RunDir(tmp_path / "a" / "b").config().to_json()
    assert config == {"schema_version": 1, "command": "patch", "science": SCIENCE, "settings": {"save": {"save_every": 5}}}
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [".lock", "config.json", "provenance.json"]


def test_a_second_command_is_refused_with_the_pid(tmp_path):
    with RunDir(tmp_path / "run"), pytest.raises(UsageError, match=f"is in use by pid {os.getpid()} on ") as failure:
        RunDir(tmp_path / "run").__enter__()
    assert failure.value.hint == "wait for it, or name another --run"
    begun(tmp_path / "run")  # free again


def test_another_process_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    script = (
        "import sys, pathlib; from dmpctl.runs.rundir import RunDir\n"
        "run = RunDir(pathlib.Path(sys.argv[1])).__enter__(); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match=f"is in use by pid {holder.pid} on "):
            RunDir(tmp_path / "run").__enter__()
    finally:
        holder.kill()
        holder.communicate()
    begun(tmp_path / "run")


def test_a_failure_inside_frees_the_run(tmp_path):
    with pytest.raises(RuntimeError), RunDir(tmp_path / "run"):
        raise RuntimeError
    begun(tmp_path / "run")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"x")
    with pytest.raises(UsageError, match="is not empty and is no run of dmpctl"):
        RunDir(tmp_path).__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["photo.png"]


def test_an_empty_folder_is_taken(tmp_path):
    begun(tmp_path)


def test_a_run_killed_before_its_config_was_there_is_taken(tmp_path):
    (tmp_path / ".lock").write_text("pid 1 on nowhere\n")
    (tmp_path / ".config.json.123").write_text("{")
    begun(tmp_path)


def test_places_where_no_run_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file, a run is a folder"):
        RunDir(tmp_path / "file").__enter__()
    for path in (tmp_path / "file" / "run", Path("/proc/run"), tmp_path / ("x" * 300)):
        with pytest.raises(UsageError, match="cannot write to"):
            RunDir(path).__enter__()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt_lr": 1e-4}, r"prompt_lr: 0.001 there, 0.0001 now"),
        ({"backbone_sha256": "def"}, "backbone_sha256: abc there, def now"),
        ({"size": 8}, "size: None there, 8 now"),
        ({"seed": 1, "prompt_lr": 2.0}, "seed: 0 there, 1 now; prompt_lr: 0.001 there, 2.0 now"),
        ({"new": 1}, "new: None there, 1 now"),
    ],
)
def test_another_experiment_is_refused_by_key_old_and_new(tmp_path, change, sentence):
    begun(tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(UsageError, match=sentence) as failure:
        begun(tmp_path / "run", SCIENCE | change)
    assert "already uses different settings" in failure.value.message
    assert "--run" in failure.value.hint
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_another_command_is_refused(tmp_path):
    begun(tmp_path / "run")
    with pytest.raises(UsageError, match="was made by dmpctl patch, not pretrain"):
        begun(tmp_path / "run", command="pretrain")


def test_other_settings_are_recorded(tmp_path):
    begun(tmp_path / "run")
    begun(tmp_path / "run", save_every=9)
    assert RunDir(tmp_path / "run").config().settings == {"save": {"save_every": 9}}


@pytest.mark.parametrize("key", ["command", "science", "settings"])
def test_a_config_that_lacks_something_is_refused(tmp_path, key):
    begun(tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    del config[key]
    write_by_hand(path, config)
    with pytest.raises(IntegrityError, match=f"config.json lacks {key}"):
        begun(tmp_path / "run")


def test_a_newer_run_is_refused(tmp_path):
    begun(tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 2}))
    with pytest.raises(IntegrityError, match="schema_version 2"):
        begun(tmp_path / "run")


def test_what_is_no_run(tmp_path):
    with pytest.raises(MissingError, match="is no run"):
        RunDir(tmp_path).config()


def test_metrics_are_appended_and_cut(tmp_path):
    with RunDir(tmp_path) as run:
        run.metrics.cut_back(0)  # none yet
        assert run.metrics.lines() == []
        for step in (1, 2, 3, 4):
            run.metrics.append({"step": step, "loss": step / 3})
        run.metrics.cut_back(2)
        run.metrics.append({"step": 3, "loss": 9.0})
        assert run.metrics.lines() == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 2 / 3}, {"step": 3, "loss": 9.0}]
        run.metrics.cut_back(0)
        assert run.metrics.lines() == []


def test_a_torn_line_goes(tmp_path):
    with RunDir(tmp_path) as run:
        run.metrics.append({"step": 1})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "lo')
        assert run.metrics.lines() == [{"step": 1}]
        assert run.metrics.cut_back(5) == []
        run.metrics.append({"step": 2})
        assert run.metrics.lines() == [{"step": 1}, {"step": 2}]


def test_provenance_has_one_entry_per_session(tmp_path, typed):
    typed("/somewhere/dmpctl", "patch", "--iters", "5")
    for _ in range(2):
        begun(tmp_path)
    sessions = json.loads((tmp_path / "provenance.json").read_text())["sessions"]
    assert [session["device"] for session in sessions] == ["cpu", "cpu"]
    assert sessions[0]["argv"] == ["dmpctl", "patch", "--iters", "5"]
    assert sessions[0]["versions"]["torch"] == version_of("torch")
    assert version_of("no-such-package") == "not installed"


def test_a_resume_says_what_is_asked_for_otherwise(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert run.differences({"save": {"save_every": 5}}) == []
    with run:
        run.begin("patch", {}, {"save": {"save_every": 5, "keep_last": 3}}, {})
    assert run.differences({"save": {"save_every": 7, "keep_last": 3}}) == ["save_every: 5 before, 7 now"]


def test_a_change_that_is_allowed_by_name_is_taken_and_recorded(tmp_path: Path) -> None:
    patch_run(tmp_path / "run", iters=3)
    with pytest.raises(UsageError, match=r"prompt_lr: .* there, 0\.5 now") as failure:
        patch_run(tmp_path / "run", prompt_lr=0.5)
    assert "--allow-change" in failure.value.hint
    with pytest.raises(UsageError, match="prompt_lr"):
        patch_run(tmp_path / "run", prompt_lr=0.5, allow_change="gate_lr")
    with pytest.raises(UsageError, match="--allow-change nonsense is no setting of an experiment"):
        patch_run(tmp_path / "run", prompt_lr=0.5, allow_change="prompt-lr,nonsense")
    patch_run(tmp_path / "run", prompt_lr=0.5, allow_change="prompt-lr")
    assert RunDir(tmp_path / "run").metrics.lines()[-1]["lr"][0] == 0.5
    patch_run(tmp_path / "run", prompt_lr=0.5, iters=7)  # from now on it is this experiment
