"""kill -9 of a real `dmpctl patch` at a few moments: the same command finishes, equal to the undisturbed run bit for bit."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dmpctl.files import sha256_of
from dmpctl.runs import checkpoint
from dmpctl.runs.rundir import RunDir
from tests.helpers import environment, files, patch_run, run_cli, same_but_time

ITERS, EVERY = 240, 3
LINE = ("--iters", ITERS, "--batch-size", 8, "--save-every", EVERY, "--keep-last", 2, "--log-every", 1, "--no-evaluate", "--cpu")
GIVEN = {"iters": ITERS, "save_every": EVERY, "keep_last": 2}


def killed(run: Path, cwd: Path, lines: int, delay: float) -> bool:
    """Start the command and kill it `delay` seconds after it has logged `lines` lines; False if it ended before."""
    command = [sys.executable, "-m", "dmpctl", "patch", "--run", str(run), *map(str, LINE)]
    process = subprocess.Popen(command, cwd=cwd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, limit = run / "metrics.jsonl", time.monotonic() + 240
    while process.poll() is None and time.monotonic() < limit:
        if metrics.is_file() and metrics.read_bytes().count(b"\n") >= lines:
            time.sleep(delay)
            break
        time.sleep(0.001)
    ended = process.poll() is not None
    process.kill()
    process.wait()
    return not ended


@pytest.mark.slow
def test_kill_at_any_moment(tmp_path):
    patch_run(tmp_path / "straight", **GIVEN)
    moments = random.Random(20240)
    run, reached, kills = tmp_path / "run", 1, 0
    for _ in range(3):
        at = reached + moments.randrange(5, 60)
        kills += killed(run, tmp_path, at, moments.uniform(0, 0.03))
        for path in checkpoint.complete(run / "checkpoints"):
            assert checkpoint.load(path).step % EVERY == 0  # whatever the moment, all that is there is whole
        reached = checkpoint.complete(run / "checkpoints")[-1].name.removeprefix("step-")
        reached = int(reached)
        # A save begins when the one before is on disk: of the two newest, one may still be in memory, one not yet begun.
        assert reached >= at - 2 * EVERY
    assert kills == 3
    assert not (run / "patch.safetensors").exists()
    done = run_cli("patch", "--run", run, *LINE, cwd=tmp_path)
    assert done.code == 0, done.err
    assert sha256_of(run / "patch.safetensors") == sha256_of(tmp_path / "straight" / "patch.safetensors")
    assert same_but_time(RunDir(run).metrics.lines()) == same_but_time(RunDir(tmp_path / "straight").metrics.lines())
    left = {name for name in files(run) if not name.startswith(".")}
    assert left == {name for name in files(tmp_path / "straight") if not name.startswith(".")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "more"), [("INT", 130, ()), ("TERM", 143, ()), ("USR1", 75, ("--requeue",)), ("TERM", 75, ("--requeue",))]
)
def test_a_signal_to_the_real_process(tmp_path, number, code, more):
    """It saves, says how to go on, and ends with its documented code."""
    import signal

    run = tmp_path / "run"
    command = [sys.executable, "-m", "dmpctl", "patch", "--run", str(run), *map(str, LINE), *more]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 240
    while not (run / "metrics.jsonl").is_file() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    process.send_signal(getattr(signal, f"SIG{number}"))
    out, err = process.communicate(timeout=240)
    assert (process.returncode, out) == (code, "")
    assert f"error: stopped by SIG{number}, saved at step " in err
    assert f"hint: go on with: dmpctl patch --run {run}" in err
    assert "Traceback" not in err
    assert checkpoint.load(checkpoint.complete(run / "checkpoints")[-1]).step < ITERS
