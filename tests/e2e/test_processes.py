"""Two processes on one CPU: the numbers of one, and no hang however one of them ends. A start costs seconds: few, full tests."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from dmpctl.files import sha256_of
from dmpctl.runs import checkpoint
from dmpctl.runs.rundir import RunDir
from dmpctl.sampling.pictures import read_png
from tests.helpers import copied, digit_folder, environment, patch_run, pretrain_run, run_cli, tensors_of

TWO = ("--cpu", "--num-processes", 2)
STEPS = ("--batch-size", 12, "--save-every", 4, "--keep-last", 9, "--log-every", 1, "--no-evaluate")
GIVEN = {"batch_size": 12, "save_every": 4, "keep_last": 9}


class Started:
    """A command in the background whose processes can be found: their launcher keeps its notes under `tmp`."""

    def __init__(self, *args: object, cwd: Path, tmp: Path) -> None:
        tmp.mkdir(exist_ok=True)
        self.tmp = tmp
        command = [sys.executable, "-m", "dmpctl", *map(str, args)]
        env = environment() | {"TMPDIR": str(tmp)}
        self.process = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def until(self, there) -> None:
        """Wait for something, while the command runs."""
        limit = time.monotonic() + 240
        while not there():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < limit
            time.sleep(0.02)

    def pid(self, rank: int) -> int:
        return int(next(self.tmp.glob(f"dmpctl-*/attempt-0/rank-{rank}.pid")).read_text())

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in self.tmp.glob("dmpctl-*/attempt-*/rank-*.pid")]

    def end(self) -> tuple[int, str, str]:
        pids = self.pids()
        out, err = self.process.communicate(timeout=240)
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        return self.process.returncode, out, err


def logged(run: Path, lines: int):
    path = run / "metrics.jsonl"
    return lambda: path.is_file() and path.read_bytes().count(b"\n") >= lines


def close(one: Path, other: Path, scale: float) -> None:
    """Equal patches within rounding: gradients are summed in another order, and AdamW divides small ones by small ones."""
    a, b = tensors_of(one / "patch.safetensors"), tensors_of(other / "patch.safetensors")
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.abs().max() > 0 or name == "w_noise"
        torch.testing.assert_close(b[name], value, rtol=0, atol=scale)


@pytest.mark.parametrize(
    ("given", "scale"),
    [
        (
            {
                "gate": "topk",
                "topk": 4,
                "balance": "shazeer",
                "load_weight": 0.5,
                "importance_weight": 0.5,
                "lr_schedule": "cosine",
            },
            1e-5,
        ),
        pytest.param({"method": "full", "lr": 1e-4, "ema": 0.9, "grad_clip": 0.01}, 1e-5, marks=pytest.mark.slow),
    ],
)
def test_two_processes_are_one(tmp_path, given, scale):
    """Order, noise, gate noise, balance of the whole batch, norm and average: the same training within rounding."""
    patch_run(tmp_path / "one", iters=12, **GIVEN, **given)
    flags = [part for name, value in given.items() for part in ("--" + name.replace("_", "-"), value)]
    done = run_cli("patch", "--run", tmp_path / "two", "--iters", 12, *STEPS, *TWO, *flags, cwd=tmp_path)
    assert done.code == 0, done.err
    close(tmp_path / "one", tmp_path / "two", scale)
    one, two = (RunDir(tmp_path / name).metrics.lines() for name in ("one", "two"))
    assert [line["step"] for line in two] == [line["step"] for line in one] == list(range(1, 13))
    for name in ("loss", "mse", "grad_norm", *({"importance", "load"} & set(one[0]))):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=2e-4)
    assert json.loads((tmp_path / "two" / "provenance.json").read_text())["sessions"][0]["processes"] == 2


@pytest.mark.slow
def test_two_processes_resume_to_the_bit_and_on_one(tmp_path):
    """Ended by a signal to one rank alone, which both obey; then to the end at two, and at one."""
    straight = run_cli("patch", "--run", tmp_path / "straight", "--iters", 300, *STEPS, *TWO, cwd=tmp_path)
    assert straight.code == 0, straight.err
    run = tmp_path / "run"
    started = Started("patch", "--run", run, "--iters", 300, *STEPS, *TWO, cwd=tmp_path, tmp=tmp_path / "tmp")
    started.until(logged(run, 20))
    os.kill(started.pid(1), signal.SIGTERM)
    code, out, err = started.end()
    assert (code, out) == (143, ""), err
    assert "error: stopped by SIGTERM, saved at step " in err
    assert f"hint: go on with: dmpctl patch --run {run}" in err
    assert not list((tmp_path / "tmp").glob("dmpctl-*"))
    reached = checkpoint.load(checkpoint.complete(run / "checkpoints")[-1]).step
    assert 20 <= reached < 300
    copied(run, tmp_path / "alone")
    done = run_cli("patch", "--run", run, "--iters", 300, *STEPS, *TWO, cwd=tmp_path)
    assert done.code == 0, done.err
    assert sha256_of(run / "patch.safetensors") == sha256_of(tmp_path / "straight" / "patch.safetensors")
    patch_run(tmp_path / "alone", iters=300, **GIVEN)
    close(tmp_path / "straight", tmp_path / "alone", 1e-3)  # 300 steps of other rounding


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (signal.SIGKILL, "error: rank 1 (pid {pid}) was ended by SIGKILL"),
        (signal.SIGSTOP, "error: rank 1 (pid {pid}) hangs: the others waited"),
    ],
)
def test_a_rank_that_dies_or_hangs_ends_the_others(tmp_path, number, sentence):
    run = tmp_path / "run"
    line = ("patch", "--run", run, "--iters", 100000, *STEPS, *TWO, "--rank-timeout", 4)
    started = Started(*line, cwd=tmp_path, tmp=tmp_path / "tmp")
    started.until(logged(run, 3))
    pid = started.pid(1)
    os.kill(pid, number)
    code, out, err = started.end()  # without a timeout of ranks, it would not
    assert (code, out) == (1, "")
    assert sentence.format(pid=pid) in err
    assert "Traceback" not in err
    for path in checkpoint.complete(run / "checkpoints"):
        checkpoint.load(path)


@pytest.mark.slow
def test_a_rank_that_fails_is_named_with_its_cause(tmp_path):
    """An image that breaks behind a good header is met by one rank; the other would wait for it."""
    photos = digit_folder(tmp_path / "photos", 64)
    broken = photos / "000021.png"
    broken.write_bytes(broken.read_bytes()[:60])
    line = ("pretrain", "--data", photos, "--run", tmp_path / "run", "--hidden-size", 16, "--depth", 1, "--num-heads", 2)
    done = run_cli(*line, "--iters", 50, "--batch-size", 4, "--channels", 1, *TWO, cwd=tmp_path)
    assert done.code == 4, done.err
    assert "000021.png" in done.err
    assert done.err.count("error: ") == 1


@pytest.mark.slow
def test_what_cannot_be_is_one_sentence(tmp_path):
    done = run_cli("patch", "--run", tmp_path / "run", "--batch-size", 13, *TWO, cwd=tmp_path)
    assert done.code == 2
    assert "error: a batch of 13 does not divide over 2 processes x 1 parts" in done.err
    assert done.err.count("error: ") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_samples_and_distance_are_those_of_one_process(tmp_path, finished):
    """29 images over two processes: uneven shares, no hang; and a distance of the same features."""
    run = copied(finished, tmp_path / "run")
    shown = ("--sampler", "ddim", "--steps", 4, "--sample-batch", 5)
    for form in ("png", "npz"):
        for name, more in (("one", ("--cpu",)), ("two", TWO)):
            line = ("sample", run, "--num-images", 29, "--format", form, "--out", tmp_path / f"{form}-{name}", *shown, *more)
            assert run_cli(*line, cwd=tmp_path).code == 0
    for k in range(29):
        one, two = (read_png(tmp_path / f"png-{name}" / f"{k:06d}.png") for name in ("one", "two"))
        assert (one.int() - two.int()).abs().max() <= 1
    assert {p.name for p in (tmp_path / "npz-two").iterdir()} == {p.name for p in (tmp_path / "npz-one").iterdir()}
    assert (tmp_path / "npz-two" / "29.npz").stat().st_size == (tmp_path / "npz-one" / "29.npz").stat().st_size
    line = ("--max-images", 129, *shown, "--json", "--versus", "backbone")
    found = [
        run_cli("fid", copied(run, tmp_path / name), *line, *more, cwd=tmp_path, env={"DMPCTL_CACHE_DIR": str(tmp_path / name)})
        for name, more in (("alone", ("--cpu",)), ("both", TWO))
    ]
    assert [done.code for done in found] == [0, 0], found
    one, two = (json.loads(done.out) for done in found)
    assert two["value"] == pytest.approx(one["value"], rel=1e-3)
    assert two["n"] == one["n"] == 129
    assert two["versus"]["value"] == pytest.approx(one["versus"]["value"], abs=1e-3)


@pytest.mark.slow
def test_under_torchrun_a_command_takes_part(tmp_path):
    line = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "--",
        "dmpctl",
        "patch",
        "--run",
        tmp_path / "run",
        "--iters",
        8,
    ]
    command = [sys.executable, *map(str, line), *map(str, STEPS), "--cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["sessions"][0]["processes"] == 2
    patch_run(tmp_path / "one", iters=8, **GIVEN)
    close(tmp_path / "one", tmp_path / "run", 1e-5)
    assert done.stdout.count("trained 8 steps") == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "patch"])
def test_a_backbone_shared_out_trains_as_one_that_is_whole(tmp_path, command):
    """FSDP2, in parts of a batch, resumed half-way: pretraining, and a patch beside a frozen backbone."""
    given = {"batch_size": 12, "save_every": 3, "ema": 0.9}
    shape = (
        ("--data", "digits", "--hidden-size", 16, "--depth", 2, "--num-heads", 2) if command == "pretrain" else ("--no-evaluate",)
    )
    line = (command, *shape, "--run", tmp_path / "two", "--batch-size", 12, "--save-every", 3, "--ema", 0.9, *TWO)
    for iters in (4, 8):
        done = run_cli(*line, "--fsdp", "--grad-accum", 2, "--iters", iters, cwd=tmp_path)
        assert done.code == 0, done.err
    if command == "pretrain":
        pretrain_run(tmp_path / "one", iters=8, **given)
    else:
        patch_run(tmp_path / "one", iters=8, **given)
    name = "backbone.safetensors" if command == "pretrain" else "patch.safetensors"
    one, two = (tensors_of(tmp_path / run / name) for run in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_a_command_that_is_killed_leaves_no_process_and_a_second_ctrl_c_does_not_wait(tmp_path):
    line = ("patch", "--run", tmp_path / "run", "--iters", 100000, *STEPS, *TWO)
    started = Started(*line, cwd=tmp_path, tmp=tmp_path / "one")
    started.until(logged(tmp_path / "run", 3))
    pids = started.pids()
    started.process.kill()
    started.process.communicate()
    limit = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert checkpoint.load(checkpoint.complete(tmp_path / "run" / "checkpoints")[-1]).step >= 3  # they have saved before
    started = Started(*line, cwd=tmp_path, tmp=tmp_path / "two")
    started.until(lambda: len(started.pids()) == 2)
    os.kill(started.pid(1), signal.SIGSTOP)  # it will hear nothing
    started.process.send_signal(signal.SIGINT)
    time.sleep(1)
    started.process.send_signal(signal.SIGINT)
    code, _, err = started.end()
    assert code == 130
    assert "error: stopped by SIGINT" in err
    assert "Traceback" not in err


def workers(pid: int) -> list[int]:
    """The processes that this launcher has started to do the work."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    found = []
    for child in path.read_text().split() if path.is_file() else []:
        with suppress(FileNotFoundError, ProcessLookupError):  # others come and go
            if b"dmpctl.cli.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [0.0, 0.05, 0.3, 1.0])
def test_a_signal_to_processes_that_are_being_started_leaves_one_sentence_and_no_process(tmp_path, number, after):
    """While they import, a signal would end them with a traceback: it waits until they can take it."""
    started = Started("patch", "--run", tmp_path / "run", "--iters", 100000, *STEPS, *TWO, cwd=tmp_path, tmp=tmp_path / "tmp")
    started.until(lambda: workers(started.process.pid))
    time.sleep(after)
    pids = workers(started.process.pid)
    started.process.send_signal(number)
    code, _, err = started.end()
    assert code == 128 + number, err
    assert f"error: stopped by {number.name}" in err
    assert "Traceback" not in err
    limit = time.monotonic() + 120
    while (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not left


@pytest.mark.slow
def test_a_rank_that_dies_is_started_again_where_that_is_allowed(tmp_path):
    straight = run_cli("patch", "--run", tmp_path / "straight", "--iters", 60, *STEPS, *TWO, cwd=tmp_path)
    assert straight.code == 0, straight.err
    run = tmp_path / "run"
    started = Started("patch", "--run", run, "--iters", 60, *STEPS, *TWO, "--max-restarts", 2, cwd=tmp_path, tmp=tmp_path / "tmp")
    started.until(logged(run, 6))
    os.kill(started.pid(1), signal.SIGKILL)
    code, _, err = started.end()
    assert code == 0, err
    assert sha256_of(run / "patch.safetensors") == sha256_of(tmp_path / "straight" / "patch.safetensors")
    assert len(json.loads((run / "provenance.json").read_text())["sessions"]) == 2


@pytest.mark.slow
def test_two_machines_are_one_world(tmp_path):
    """The same command twice, as on two machines that share a disk, meeting on this one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    line = ("patch", "--run", tmp_path / "run", "--iters", 12, *STEPS, "--cpu", "--num-processes", 1, "--nnodes", 2)
    line = (*line, "--rdzv-endpoint", f"localhost:{port}")
    nodes = [Started(*line, "--node-rank", n, cwd=tmp_path, tmp=tmp_path / f"tmp{n}") for n in range(2)]
    ended = [node.end() for node in nodes]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["sessions"][0]["processes"] == 2
    patch_run(tmp_path / "one", iters=12, **GIVEN)
    close(tmp_path / "one", tmp_path / "run", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "more"), [(signal.SIGINT, 130, ()), (signal.SIGUSR1, 75, ("--requeue",))])
def test_a_signal_to_the_launcher_is_obeyed_by_all(tmp_path, number, code, more):
    run = tmp_path / "run"
    started = Started("patch", "--run", run, "--iters", 100000, *STEPS, *TWO, *more, cwd=tmp_path, tmp=tmp_path / "tmp")
    started.until(logged(run, 5))
    started.process.send_signal(number)
    found, out, err = started.end()
    assert (found, out) == (code, ""), err
    assert f"error: stopped by {number.name}, saved at step " in err
    assert err.count("error: ") == 1
    checkpoint.load(checkpoint.complete(run / "checkpoints")[-1])


SCRIPT = """
import sys
from pathlib import Path
from dmpctl.training import patch
from dmpctl.models.backbone import load_backbone
from dmpctl.runs.rundir import RunDir
from dmpctl.codecs.identity import Identity
from dmpctl.data.bundled import Digits
from tests.helpers import SMALL, settings_for, trainer_of

settings = settings_for("patch", run=Path(sys.argv[1]), **SMALL)
loaded = load_backbone(settings.base)
session = patch.session_of(settings, loaded, Identity(), Digits())
trainer = trainer_of(session, settings, RunDir(settings.run.run))
reduced = trainer.module._get_ddp_logging_data()["total_parameter_size_bytes"]
own = sum(p.numel() * p.element_size() for p in session.subject.module.parameters() if p.requires_grad)
assert not any(p.requires_grad for p in loaded.model.parameters())
sys.stdout.write(f"{trainer.ranks.world} {reduced} {own}\\n")  # whole: print writes the end of the line by itself
"""


@pytest.mark.slow
def test_what_is_reduced_between_processes_is_the_patch_alone(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", tmp_path / "script.py", tmp_path / "x"]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = {tuple(map(int, line.split())) for line in done.stdout.splitlines()}
    [(world, reduced, own)] = found
    assert world == 2
    assert reduced == own < 10_000  # a backbone has 78 816 bytes
