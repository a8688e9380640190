"""Signals in every phase, time as a reason to save, steps that are not applied, and what a process takes from its folder."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dmpctl.data.bundled import Digits
from dmpctl.errors import Interrupted, NumericalError
from dmpctl.files import read_json, read_tensors, write_tensors
from dmpctl.measuring.evaluate import fid
from dmpctl.metrics.features.pixels import Pixels
from dmpctl.models import encode
from dmpctl.processes import stop as stopping
from dmpctl.processes import threads
from dmpctl.runs import checkpoint
from dmpctl.runs.rundir import RunDir
from dmpctl.sampling import foresight, generate
from dmpctl.training.patch import patch
from dmpctl.training.trainer import Trainer
from dmpctl.types import Silent
from tests.faults.forked import Forked
from tests.helpers import SMALL, copied, environment, files, patch_run, pretrain_run, same_but_time, settings_for, tensors_of
from tests.latent_helpers import Ramp

LONG = ("--iters", 200_000, "--batch-size", 8, "--log-every", 1, "--no-evaluate", "--cpu")
HANG_UPS = (signal.SIGHUP, signal.SIGQUIT)
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *HANG_UPS)


def logged(run: Path, lines: int = 2):
    path = run / "metrics.jsonl"
    return lambda: path.is_file() and path.read_bytes().count(b"\n") >= lines


@pytest.mark.parametrize("number", [*HANG_UPS, *(pytest.param(one, marks=pytest.mark.slow) for one in STOPS[:3])])
def test_training_is_saved_whatever_ends_it(tmp_path, number):
    run = tmp_path / "run"
    work = Forked("patch", "--run", run, *LONG, cwd=tmp_path)
    work.until(logged(run))
    work.send(number)
    assert work.end() == (130 if number == signal.SIGINT else 143)
    assert f"error: stopped by {number.name}, saved at step " in work.err
    assert checkpoint.load(checkpoint.complete(run / "checkpoints")[-1]).step >= 2


@pytest.mark.parametrize("number", [signal.SIGHUP, pytest.param(signal.SIGQUIT, marks=pytest.mark.slow)])
def test_what_nohup_has_it_ignore_does_not_end_it(tmp_path, number):
    run = tmp_path / "run"
    work = Forked("patch", "--run", run, *LONG, cwd=tmp_path, ignored=(number,))
    work.until(logged(run))
    work.send(number)
    work.until(logged(run, len(run.joinpath("metrics.jsonl").read_text().splitlines()) + 3))
    work.send(signal.SIGTERM)
    assert work.end() == 143
    assert "stopped by SIGTERM" in work.err


def test_sampling_stops_inside_a_batch(tmp_path, finished):
    """A thousand steps of many images are one batch, longer than anybody waits."""
    line = ("sample", finished, "--num-images", 512, "--sample-batch", 512, "--steps", 1000, "--out", "made", "--cpu")
    work = Forked(*line, cwd=tmp_path)
    work.until(lambda: (tmp_path / "made" / "samples.json").is_file())
    work.send(signal.SIGTERM)
    assert work.end() == 143
    assert "error: stopped by SIGTERM" in work.err
    assert not list((tmp_path / "made").glob("*.png"))


def forever(*_: object, **__: object) -> None:
    """A computation that ends only when something from outside ends it."""
    os.kill(os.getpid(), signal.SIGHUP)
    while True:
        time.sleep(0.01)


@pytest.fixture
def impatient(monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    monkeypatch.setattr(stopping, "PATIENCE", 0.05)


def of_sampling(place: Path, monkeypatch) -> None:
    monkeypatch.setattr(generate, "generate", forever)
    generate.sample(settings_for("sample", cpu=True), place / "run", Silent())


def of_features(place: Path, monkeypatch) -> None:
    monkeypatch.setattr(Pixels, "outputs", forever)
    given = {"cpu": True, "cache_dir": place / "cache", "stream": True, "sampler": "ddim", "steps": 2, "max_images": 80}
    fid(settings_for("fid", **given), str(place / "run"), Silent())


def of_latents(place: Path, monkeypatch) -> None:
    monkeypatch.setattr(Ramp, "encode", forever)
    encode.build_latents(Digits(), Ramp(), place / "cache", Silent())


def of_training(place: Path, monkeypatch) -> None:
    real = Trainer._backward
    monkeypatch.setattr(Trainer, "_backward", lambda self, batch: forever() if self.step == 4 else real(self, batch))
    patch_run(place / "made")


@pytest.mark.parametrize(
    ("act", "where"),
    [
        (of_sampling, "after 0 of 64 images"),
        (of_features, r"0 of \d+ images are measured"),
        (of_latents, "0 of 1797 are kept"),
        (of_training, "saved at step 4"),
    ],
)
def test_every_long_computation_can_be_stopped(tmp_path, monkeypatch, impatient, finished, act, where):
    copied(finished, tmp_path / "run")
    with pytest.raises(Interrupted, match=f"stopped by SIGHUP, {where}"):
        act(tmp_path, monkeypatch)
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]


def test_a_step_that_was_given_up_is_taken_again(tmp_path, monkeypatch, impatient):
    with monkeypatch.context() as once, pytest.raises(Interrupted):
        of_training(tmp_path, once)
    for name in ("made", "straight"):
        patch_run(tmp_path / name)
    same_tensors(tmp_path / "made", tmp_path / "straight")


def same_tensors(one: Path, other: Path) -> None:
    ours, theirs = (tensors_of(run / "patch.safetensors") for run in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(value.equal(theirs[name]) for name, value in ours.items())


def test_a_step_that_no_checkpoint_is_before_is_not_called_saved(tmp_path, monkeypatch, impatient):
    monkeypatch.setattr(Trainer, "_backward", forever)
    with pytest.raises(Interrupted, match="before its first step was done"):
        patch_run(tmp_path / "run")
    assert checkpoint.complete(tmp_path / "run" / "checkpoints") == []


def test_time_is_a_reason_to_save_and_changes_nothing(tmp_path):
    """Every moment is due here; a run that is cut off at one of them ends as the undisturbed one, bit for bit."""
    given = {"save_every": 5000, "save_minutes": 1e-9, "keep_last": 9, "iters": 6}
    patch_run(tmp_path / "run", **given)
    steps = [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path / "run" / "checkpoints")]
    assert steps == [1, 2, 3, 4, 5, 6]
    cut = copied(tmp_path / "run", tmp_path / "cut")
    for name in ("patch.safetensors", "patch.json", *(f"checkpoints/step-000000{step}" for step in (5, 6))):
        path = cut / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    patch_run(cut, **given)
    patch_run(tmp_path / "seldom", **(given | {"save_minutes": 10.0}))
    assert len(checkpoint.complete(tmp_path / "seldom" / "checkpoints")) == 1
    for other in ("cut", "seldom"):
        same_tensors(tmp_path / "run", tmp_path / other)
        ours, theirs = (same_but_time(RunDir(tmp_path / each).metrics.lines()) for each in ("run", other))
        assert ours == theirs


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory) -> Path:
    """A backbone whose weights are finite, and whose predictions are not."""
    run = tmp_path_factory.mktemp("overflowing") / "run"
    pretrain_run(run)
    weights = {name: value * 1e30 for name, value in tensors_of(run / "backbone.safetensors").items()}
    path = run.parent / "weights.safetensors"
    write_tensors(path, weights, read_tensors(run / "backbone.safetensors")[1])
    return path


@pytest.mark.parametrize("method", ["dmp", "prompt", "lora", "full"])
def test_a_run_in_which_no_step_was_applied_publishes_nothing(tmp_path, overflowing, method):
    run = tmp_path / "run"
    for _ in range(2):  # and so says the same command again
        with pytest.raises(NumericalError, match="none of 2 steps could be applied") as caught:
            patch_run(run, base=str(overflowing), data="digits", method=method, iters=2)
        assert caught.value.exit_code == 5
        assert not {"patch.safetensors", "patch.json"} & files(run)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    with pytest.raises(NumericalError, match="is no longer finite at step 2") as caught:
        patch_run(tmp_path / "run", iters=2, prompt_lr=1e308)
    assert (caught.value.exit_code, "--prompt-lr" in str(caught.value.hint)) == (5, True)
    assert not [name for name in files(tmp_path / "run") if name.endswith(".safetensors")]


def test_more_processes_than_a_machine_can_run_are_refused(tmp_path, cli):
    refused = cli("patch", "--num-processes", 100_000, "--run", tmp_path / "run", "--cpu")
    assert (refused.code, refused.out) == (2, "")
    assert "--num-processes 100000 are more than this machine can run" in refused.err
    assert cli("patch", "--run", tmp_path / "run", "--batch-size", 10**12, "--cpu", "--no-evaluate").code == 2


def test_skipped_steps_are_shown_and_recorded(tmp_path, monkeypatch):
    """Two of six are not finite; what is counted is right after a resume, too."""
    real = Trainer._backward

    def sometimes(self, batch):
        figures = real(self, batch)
        return figures | ({"loss": figures["loss"] * float("nan")} if self.step in (1, 4) else {})

    monkeypatch.setattr(Trainer, "_backward", sometimes)
    patch_run(tmp_path / "run", iters=3)
    found = patch_run(tmp_path / "run", iters=6)
    assert found.data["skipped_steps"] == 2
    assert "2 of all steps were skipped" in found.lines[0]
    assert [each.get("skipped_steps") for each in read_json(tmp_path / "run" / "provenance.json")["sessions"]] == [1, 2]
    assert [line.get("skipped") for line in RunDir(tmp_path / "run").metrics.lines()] == [None, 1, 1, 1, 2, 2]


EVIL = ("re", "typing", "enum", "json", "torch", "tokenize", "random", "socket", "numpy", "dataclasses", "pathlib", "signal")


@pytest.fixture
def evil(tmp_path) -> Path:
    """A folder of modules that leave a mark where they run."""
    folder = tmp_path / "evil"
    folder.mkdir()
    for name in EVIL:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')\n")
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ("sample", "no-such-run"),
        pytest.param(("doctor",), marks=pytest.mark.slow),
        pytest.param(("patch", *LONG, "--iters", 2, "--num-processes", 2, "--run", "made"), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("python", [("-m",), pytest.param(("-u", "-m"), marks=pytest.mark.slow)])
def test_no_module_of_the_working_directory_runs(tmp_path, evil, words, python):
    command = [sys.executable, *python, "dmpctl", *map(str, words)]
    done = subprocess.run(command, cwd=evil, env=environment(), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == (3 if words[0] == "sample" else 0), done.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


@pytest.mark.slow
def test_nor_in_processes_that_the_console_script_starts(tmp_path, evil):
    script = Path(sys.executable).with_name("dmpctl")
    if not script.is_file():
        pytest.skip("dmpctl is not installed as a script")
    line = [script, "patch", *map(str, LONG), "--iters", "2", "--num-processes", "2", "--run", "made"]
    done = subprocess.run(line, cwd=evil, env=environment(), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", HANG_UPS)
def test_two_processes_are_saved_and_leave_no_folder(tmp_path, number):
    run, tmp = tmp_path / "run", tmp_path / "tmp"
    tmp.mkdir()
    work = Forked("patch", "--run", run, *LONG, "--num-processes", 2, cwd=tmp_path, env={"TMPDIR": str(tmp)})
    work.until(logged(run))
    work.send(number)
    assert work.end() == 143
    assert f"error: stopped by {number.name}, saved at step " in work.err
    assert checkpoint.complete(run / "checkpoints")
    assert not list(tmp.glob("dmpctl-*"))


@pytest.mark.slow
def test_two_processes_under_nohup_go_on(tmp_path):
    run = tmp_path / "run"
    work = Forked("patch", "--run", run, *LONG, "--num-processes", 2, cwd=tmp_path, ignored=(signal.SIGHUP,))
    work.until(logged(run))
    work.send(signal.SIGHUP)
    work.until(logged(run, len(run.joinpath("metrics.jsonl").read_text().splitlines()) + 5))
    work.send(signal.SIGTERM)
    assert work.end() == 143
    assert "stopped by SIGTERM" in work.err


@pytest.mark.slow
def test_a_rank_killed_under_torchrun_is_named(tmp_path):
    run, tmp = tmp_path / "run", tmp_path / "tmp"
    tmp.mkdir()
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "dmpctl", "patch", "--run", str(run)]
    env = environment() | {"TMPDIR": str(tmp)}
    with (tmp_path / "err").open("w") as err:
        work = subprocess.Popen([sys.executable, *launcher, *map(str, LONG)], cwd=tmp_path, env=env, stderr=err)
    limit = time.monotonic() + 240
    while not logged(run)() and time.monotonic() < limit:
        time.sleep(0.02)
    owner = int((run / ".lock").read_text().split()[1])
    children = Path(f"/proc/{work.pid}/task/{work.pid}/children").read_text().split()
    [victim] = [int(child) for child in children if int(child) != owner]
    os.kill(victim, signal.SIGKILL)
    work.wait(240)
    said = (tmp_path / "err").read_text()
    assert f"(pid {victim}) has ended, and the others cannot go on" in said
    assert "internal" not in said
    assert "this is a bug" not in said
    assert not list(tmp.glob("dmpctl-*"))


@pytest.mark.parametrize(
    ("env", "given", "used"), [(None, {}, 1), ("2", {}, 2), (None, {"threads": 3}, 3), ("2", {"threads": 3}, 3)]
)
def test_a_tiny_model_has_one_thread_unless_another_number_is_asked_for(tmp_path, monkeypatch, env, given, used):
    """Recorded; and a number that was only for this model is taken back."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if env:
        monkeypatch.setenv("OMP_NUM_THREADS", env)
    monkeypatch.setattr(threads, "_given", False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)  # as torch itself does, at its start
        patch_run(tmp_path / "run", iters=2, **given)
        assert read_json(tmp_path / "run" / "provenance.json")["sessions"][0]["threads"] == used
        assert torch.get_num_threads() == (3 if given else 2)
        with threads.threads_for(threads.TINY):
            assert torch.get_num_threads() == (3 if given else 2)
    finally:
        torch.set_num_threads(before)


def test_doctor_says_how_threads_wait(tmp_path):
    for env, words in (({}, "which wait passively"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "which wait actively")):
        work = Forked("doctor", cwd=tmp_path, env=env)
        assert work.end() == 0, work.err
        assert words in work.out


class Noted(Silent):
    """Keeps what is said and begun, in order."""

    def __init__(self) -> None:
        self.noted: list[str] = []

    def say(self, message: str) -> None:
        self.noted.append(message)

    def track(self, what, *_, **__):
        self.noted.append(what)
        return self


@pytest.mark.parametrize("long", [True, False])
def test_images_that_take_long_are_announced_with_what_makes_it_shorter(tmp_path, monkeypatch, finished, most_loss_images, long):
    """Before training for `patch`, before its images for `sample` and `fid`; not a word where it is short."""
    most_loss_images(20)
    if long:
        monkeypatch.setattr(foresight, "LONG", 0.0)
    run, made = copied(finished, tmp_path / "run"), tmp_path / "made"
    tiny = {"cpu": True, "sampler": "ddim", "steps": 2}
    measured = {"max_images": 80, "stream": True, "cache_dir": tmp_path / "cache"}
    for count, first, what in (
        ("2 x 80", "training the patch", lambda p: patch(settings_for("patch", run=made, eval_images=80, **SMALL | tiny), p)),
        ("64", "sampling", lambda p: generate.sample(settings_for("sample", **tiny), run, p)),
        ("80", None, lambda p: fid(settings_for("fid", **measured, **tiny), str(run), p)),
    ):
        progress = Noted()
        what(progress)
        said = [line for line in progress.noted if "will take about" in line]
        assert len(said) >= long
        assert bool(said) == long
        if long:
            assert said[0].startswith(f"{count} images in 2 steps will take about 0:00:00 on cpu; for less: fewer --")
            assert first is None or progress.noted.index(said[0]) < progress.noted.index(first)
