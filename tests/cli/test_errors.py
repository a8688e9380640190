"""Every expected failure is one sentence, a hint and its documented exit code."""

import os
import subprocess
import sys

import pytest

from dmpctl.errors import DmpError, IntegrityError, Interrupted, MissingError, NumericalError, ThresholdError, UsageError
from dmpctl.types import Report


def failing(error: BaseException):
    def body(*_):
        secret = "a local value"  # noqa: F841
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("s", "h"), 2),
        (MissingError("s", "h"), 3),
        (IntegrityError("s", "h"), 4),
        (NumericalError("s", "h"), 5),
        (ThresholdError("s", "h"), 6),
        (Interrupted("s", 2, "h"), 130),
        (Interrupted("s", 15, "h"), 143),
        (DmpError("s", "h"), 1),
    ],
)
def test_exit_codes(dmpctl_, engine, error, code):
    engine("training.patch", "patch", failing(error))
    assert dmpctl_("patch") == (code, "", "error: s\nhint: h\n")


def test_no_hint_no_line(dmpctl_, engine):
    engine("training.patch", "patch", failing(MissingError("s")))
    assert dmpctl_("patch")[2] == "error: s\n"


def test_a_bug_is_one_sentence_without_a_traceback(dmpctl_, engine):
    engine("training.patch", "patch", failing(ValueError("one\n  two")))
    code, out, err = dmpctl_("patch")
    assert (code, out) == (1, "")
    assert err.splitlines()[0] == "error: internal: ValueError: one two"
    assert "--debug" in err.splitlines()[1]
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize("how", ["flag", "variable", "file"])
def test_debug_shows_the_traceback_without_locals(dmpctl_, engine, monkeypatch, tmp_path, how):
    engine("training.patch", "patch", failing(MissingError("s")))
    line = ["patch"]
    if how == "flag":
        line.append("--debug")
    elif how == "variable":
        monkeypatch.setenv("DMPCTL_DEBUG", "1")
    else:
        (tmp_path / "x.toml").write_text("debug = true\n")
        line += ["--config", str(tmp_path / "x.toml")]
    code, _, err = dmpctl_(*line)
    assert code == 3
    assert "Traceback" in err
    assert "a local value" not in err.replace('secret = "a local value"', "")
    assert err.endswith("error: s\n")


@pytest.mark.parametrize(
    ("stop", "code", "err"),
    [
        (SystemExit("what a library says"), 1, "error: what a library says\n"),
        (SystemExit(), 0, ""),
        (SystemExit(0), 0, ""),
        (SystemExit(7), 7, ""),
    ],
)
def test_a_library_that_stops_the_program(dmpctl_, engine, stop, code, err):
    engine("training.patch", "patch", failing(stop))
    assert dmpctl_("patch") == (code, "", err)


def test_tokens_are_never_shown(dmpctl_, engine, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "sesame-open")
    engine("training.patch", "patch", failing(ValueError("hf_abcdefgh12345 and sesame-open")))
    err = dmpctl_("patch", "--debug")[2]
    assert "Traceback" in err
    assert "hf_abc" not in err
    assert "sesame" not in err


def test_ctrl_c(dmpctl_, engine):
    engine("training.patch", "patch", failing(KeyboardInterrupt()))
    assert dmpctl_("patch")[0] == 130


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (("patch", "--itrs", "5"), "dmpctl patch has no option --itrs"),
        (("patch", "--prompt-lrr=5"), "dmpctl patch has no option --prompt-lrr"),
        (("patch", "--zzzzzz"), "dmpctl patch has no option --zzzzzz"),
        (("patch", "--iters"), "--iters takes a whole number of 1 or more, nothing follows it"),
        (("patch", "more"), "dmpctl patch takes no argument, found more"),
        (("ptch",), "there is no command ptch"),
        (("sample",), "dmpctl sample needs RUN: Run (or checkpoint) with the patch"),
        (("patch", "--gate", "sofd"), "--gate takes one of soft, topk, hard, uniform or random, found 'sofd'"),
        (("patch", "--iters", "0"), "--iters takes a whole number of 1 or more, found '0'"),
        (("--debug", "patch"), "dmpctl has no option --debug before the command"),
    ],
)
def test_usage_errors(dmpctl_, line, sentence):
    code, out, err = dmpctl_(*line)
    assert (code, out) == (2, "")
    assert err.splitlines()[0] == f"error: {sentence}"
    assert len(err.splitlines()) <= 2


def test_options_before_the_command_are_pointed_behind_it(dmpctl_):
    assert "hint: options follow the command: dmpctl patch --debug" in dmpctl_("--debug", "patch")[2]


def test_a_missing_settings_file(dmpctl_, tmp_path):
    code, _, err = dmpctl_("patch", "--config", str(tmp_path / "no.toml"))
    assert code == 3
    assert "hint: " in err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_is_no_failure_to_talk_about(unbuffered):
    line = [sys.executable, "-m", "dmpctl", "patch", "--print-config", "--json"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


def test_the_module_ends_with_the_code():
    found = subprocess.run([sys.executable, "-m", "dmpctl", "ptch"], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.startswith("error: there is no command ptch")


def test_failures_leave_stdout_to_results(dmpctl_, engine):
    engine("training.patch", "patch", lambda *_: Report({"fine": True}))
    code, out, err = dmpctl_("patch", "--json")
    assert (code, err) == (0, "")
    assert out.startswith("{")
