"""Output is not the work: whatever stdout and stderr are, the files are those of an undisturbed command."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tests.faults.forked import Forked
from tests.helpers import copied, digit_folder, environment, files, made_once, pretrain_run, tensors_of

STUDY = """
[compare]
run = "study"
seeds = [1]
eval_images = 80
[stages]
flat = "{backbone}"
[settings]
data = "digits"
iters = 2
batch_size = 8
log_every = 1
sampler = "ddim"
steps = 2
[variants.dmp]
method = "dmp"
"""
TINY = ("--cpu", "--sampler", "ddim", "--steps", 2)
ENDS = {  # exit code of finished work, by what stdout was
    "out.txt": 0,
    "closed": 2,
    "/dev/full": 2,
    "broken": 141,
}
FORMS = {"plain": ((), {}), "json": (("--json",), {}), "rich": ((), {"CI": "", "TERM": "xterm"})}


@pytest.fixture(scope="module")
def given(tmp_path_factory, finished) -> Path:
    """Runs, a folder of pictures and a study that commands here work on; copied, not written to."""

    def make(root: Path) -> None:
        pretrain_run(root / "backbone")
        digit_folder(root / "photos", 90)
        copied(finished, root / "run")

    return made_once(tmp_path_factory, "streams", make)


def line(command: str, given: Path, place: Path) -> tuple[object, ...]:
    """A tiny command that leaves files in `place`."""
    place.mkdir(parents=True, exist_ok=True)
    match command:
        case "patch":
            return ("patch", "--run", "made", "--iters", 3, "--batch-size", 8, "--log-every", 1, "--no-evaluate", *TINY)
        case "pretrain":
            shape = ("--hidden-size", 16, "--depth", 1, "--num-heads", 2)
            return ("pretrain", "--data", "digits", "--run", "made", "--iters", 3, "--batch-size", 8, *shape, "--cpu")
        case "sample":
            return ("sample", given / "run", "--num-images", 4, "--out", "made", *TINY)
        case "fid":
            copied(given / "run", place / "made")
            reference = ("--reference", given / "photos", "--max-images", 80, "--cache-dir", "cache")
            return ("fid", "made", *reference, "--save-stats", "made/stats.safetensors", *TINY)
    (place / "study.toml").write_text(STUDY.format(backbone=given / "backbone"))
    return ("compare", "study.toml", "--cpu")


def made(place: Path) -> set[str]:
    """Files that the work has left, without the streams; features lie under a name of their content."""
    return {name for name in files(place) if name.split("/")[0] in ("made", "study") and ".lock" not in name}


@pytest.fixture(scope="module")
def undisturbed(given, tmp_path_factory):
    """Files that each command leaves where nothing disturbs it."""
    known: dict[str, set[str]] = {}

    def of(command: str) -> set[str]:
        if command not in known:
            place = tmp_path_factory.mktemp("undisturbed")
            done = Forked(*line(command, given, place), cwd=place)
            assert done.end() == 0, done.err
            assert done.out
            known[command] = made(place)
            assert known[command]
        return known[command]

    return of


def disturbed(command: str, given: Path, place: Path, undisturbed, form: str = "plain", **streams) -> Forked:
    flags, env = FORMS[form]
    done = Forked(*line(command, given, place), *flags, cwd=place, env=env, **streams)
    code, out = done.end(), streams.get("stdout", "out.txt")
    assert made(place) == undisturbed(command)
    assert code == ENDS[out], done.err
    assert "Traceback" not in done.err
    assert done.err.count("error: ") == (code == 2 and streams.get("stderr", "err.txt") == "err.txt")
    if code == 2 and "stderr" not in streams:
        assert "error: the result cannot be written to stdout: " in done.err
    if form == "json" and out == "out.txt":
        json.loads(done.out)
    return done


@pytest.mark.parametrize(
    ("command", "streams"),
    [
        ("patch", {"stdout": "closed"}),
        ("patch", {"stderr": "broken"}),
        ("patch", {"stdout": "/dev/full", "stderr": "/dev/full"}),
        ("pretrain", {"stderr": "closed"}),
        ("sample", {"stdout": "/dev/full"}),
        ("sample", {"stderr": "/dev/full"}),
        ("fid", {"encoding": "ascii"}),
        ("fid", {"stdout": "broken"}),
    ],
)
def test_streams_do_not_change_the_work(given, tmp_path, undisturbed, command, streams):
    disturbed(command, given, tmp_path, undisturbed, **streams)


BAD = ("out.txt", "closed", "/dev/full", "broken")


COMMANDS = ("patch", "pretrain", "sample", "fid", "compare")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_stream_under_every_command_in_every_form(given, tmp_path, undisturbed, command, form):
    """Three or two of all 32 pairs of streams to each, every pair once."""
    every = list(product(BAD, ("err.txt", *BAD[1:]), ("utf-8", "ascii")))
    first = len(COMMANDS) * list(FORMS).index(form) + COMMANDS.index(command)
    for number, (out, err, encoding) in enumerate(every[first :: len(COMMANDS) * len(FORMS)]):
        streams = {"stdout": out, "encoding": encoding} | ({} if err == "err.txt" else {"stderr": err})
        disturbed(command, given, tmp_path / str(number), undisturbed, form, **streams)


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}])
@pytest.mark.parametrize("words", [("--version",), ("fid", "--help"), ("patch", "--print-config", "--run", "größe±"), ("größe",)])
def test_letters_that_a_stream_lacks_are_written_as_numbers(tmp_path, env, words):
    command = [sys.executable, "-m", "dmpctl", *words]
    done = subprocess.run(command, env=environment() | env, cwd=tmp_path, capture_output=True, timeout=300, check=False)
    refused = words == ("größe",) or ("größe±" in words and "LC_ALL" in env)  # there it is no name in UTF-8
    assert done.returncode == (2 if refused else 0), done.stderr
    done.stdout.decode("ascii")
    assert b"internal" not in done.stderr


SHELL = [(">&-", 2), ("> /dev/full", 2), ("2>&-", 0), ("2> /dev/full", 0), ("<&- >&- 2>&-", 2)]


@pytest.mark.parametrize(("stream", "code"), SHELL)
def test_a_shell_that_closes_streams(tmp_path, stream, code):
    words = f'"{sys.executable}" -m dmpctl patch --print-config {stream}'
    done = subprocess.run(["sh", "-c", words], env=environment(), cwd=tmp_path, capture_output=True, timeout=300, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.count(b"error: ") == (code == 2 and "2>" not in stream)


def test_no_file_of_ours_takes_the_number_of_a_closed_stream(given, tmp_path):
    """Then what a library prints would be written into a checkpoint."""
    done = Forked(*line("patch", given, tmp_path), cwd=tmp_path, stdout="closed", stderr="closed", env={"NOISE": "1"})
    assert done.end() == 2
    assert tensors_of(tmp_path / "made" / "patch.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("stream", "code"), [("> /dev/full", 2), ("2> /dev/full", 0), (">&-", 2), ("2>&1 | head -1", 0)])
def test_two_processes_under_bad_streams(tmp_path, stream, code):
    tiny = "--iters 3 --batch-size 8 --no-evaluate --cpu --num-processes 2 --run made"
    words = f'"{sys.executable}" -m dmpctl patch {tiny} {stream}'
    done = subprocess.run(["sh", "-c", words], env=environment(), cwd=tmp_path, capture_output=True, timeout=500, check=False)
    assert done.returncode == code, done.stderr
    assert tensors_of(tmp_path / "made" / "patch.safetensors")
    assert done.stderr.count(b"error: ") == (code == 2)
    assert not os.path.lexists(tmp_path / "core")
