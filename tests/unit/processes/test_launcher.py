"""What is said of several processes: the first cause, not what its loss looked like to the others. Real ones: tests/e2e."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dmpctl.errors import DmpError, Interrupted
from dmpctl.files import make_folder
from dmpctl.processes.launcher import _outcome, alive
from dmpctl.processes.notes import Outcome, outcomes


@dataclass
class Failure:
    """As torch's launcher tells of one."""

    pid: int
    exitcode: int
    timestamp: int = 0

    def signal_name(self) -> str:
        return signal.Signals(-self.exitcode).name


def said(folder: Path, rank: int, attempt: int = 0, **outcome: Any) -> None:
    """How a process says that it ended."""
    Outcome(**{"rank": rank, "at": rank, **outcome}).write(make_folder(folder / f"attempt-{attempt}") / f"rank-{rank}.json")


LOST = {"message": "lost the other processes", "expected": False, "echo": True, "exit_code": 1, "at": 0}


def raised(folder: Path, caught: Any, hung: tuple[int, ...] = ()) -> DmpError:
    with pytest.raises(DmpError) as failure:
        _outcome(folder, caught, hung)
    return failure.value


def test_the_cause_is_named_and_not_its_echo(tmp_path):
    said(tmp_path, 0, **LOST)
    said(tmp_path, 1, message="the disk is full", hint="free some space", exit_code=2)
    error = raised(tmp_path, {0: Failure(10, 1), 1: Failure(11, 2)})
    assert (error.message, error.hint, error.exit_code) == ("rank 1: the disk is full", "free some space", 2)


def test_one_that_was_killed_is_the_cause_of_what_the_others_say(tmp_path):
    said(tmp_path, 0, **LOST)
    log = make_folder(tmp_path / "logs" / "none" / "attempt_0" / "1") / "stderr.log"
    log.write_text("first\nTraceback\n  here\nlast\n")
    error = raised(tmp_path, {0: Failure(10, 1), 1: Failure(11, -9)})
    assert error.message == "rank 1 (pid 11) was ended by SIGKILL, as where memory runs out"
    assert error.hint.endswith("--debug to see all that it said / here / last")
    assert "hangs" in raised(tmp_path, {0: Failure(10, 1), 1: Failure(11, -9)}, hung=(11,)).message


def test_a_bug_of_one_is_shown_and_one_of_all_without_a_rank(tmp_path):
    said(tmp_path, 1, message="ValueError: x", expected=False, exit_code=1)
    error = raised(tmp_path, {0: Failure(10, -15), 1: Failure(11, 1)})
    assert error.message == "rank 1: ValueError: x"
    assert "--debug" in error.hint
    for rank in range(2):
        said(tmp_path / "all", rank, message="no such data", hint="check --data", exit_code=3)
    error = raised(tmp_path / "all", {0: Failure(10, 3), 1: Failure(11, 3)})
    assert (error.message, error.hint, error.exit_code) == ("no such data", "check --data", 3)


def test_a_stop_is_that_of_rank_0_whatever_the_launcher_caught(tmp_path):
    for rank in (1, 0):
        said(tmp_path, rank, message=f"stopped by SIGTERM, saved at step 7 by {rank}", exit_code=75, signal=15)
    for caught in ({}, signal.SIGTERM, {1: Failure(11, -15)}):
        error = raised(tmp_path, caught)
        assert isinstance(error, Interrupted)
        assert (error.message, error.exit_code) == ("stopped by SIGTERM, saved at step 7 by 0", 75)
    assert raised(tmp_path / "early", signal.SIGINT).exit_code == 130


def test_a_stop_that_the_launcher_asked_for_is_not_the_cause(tmp_path):
    """It ends the others with SIGTERM when one has failed, or has died without a word; they then say that they were stopped."""
    stopped = {"message": "stopped by SIGTERM", "exit_code": 143, "signal": 15}
    said(tmp_path, 0, **stopped, at=5)
    said(tmp_path, 1, message="the disk is full", hint="free some space", exit_code=2, at=4)
    error = raised(tmp_path, {0: Failure(10, 0), 1: Failure(11, 2)})
    assert (error.message, error.exit_code) == ("rank 1: the disk is full", 2)
    said(tmp_path / "died", 0, **stopped)
    assert raised(tmp_path / "died", {1: Failure(11, -9)}).message.startswith("rank 1 (pid 11) was ended by SIGKILL")
    assert raised(tmp_path / "died", {1: Failure(11, -9)}, hung=(11,)).exit_code == 143


def test_what_fails_while_it_stops_does_not_hide_the_stop(tmp_path):
    said(tmp_path, 0, message="stopped by SIGTERM, saved", exit_code=143, signal=15, at=4)
    said(tmp_path, 1, message="ValueError: x", expected=False, exit_code=1, at=5)
    assert raised(tmp_path, {1: Failure(11, 1)}).message == "stopped by SIGTERM, saved"


def test_a_threshold_that_was_not_met_is_passed_on_and_only_the_last_attempt_counts(tmp_path):
    said(tmp_path, 0, message="lost", exit_code=1)
    said(tmp_path, 0, attempt=10, exit_code=6)
    said(tmp_path, 1, attempt=10)
    assert _outcome(tmp_path, {}, ()) == 6
    assert [outcome.rank for outcome in outcomes(tmp_path)] == [0, 1]
    assert _outcome(tmp_path / "none", {}, ()) == 0


def test_one_that_says_nothing_is_named_by_its_code(tmp_path):
    assert raised(tmp_path, {1: Failure(11, 3)}).message == "rank 1 (pid 11) ended with exit code 3 and said nothing"


def test_one_that_the_launcher_ended_is_not_the_cause(tmp_path):
    for died in ({0: Failure(10, -15), 1: Failure(11, -6)}, {1: Failure(11, -6), 2: Failure(12, -15)}):
        assert raised(tmp_path, died).message == "rank 1 (pid 11) was ended by SIGABRT"
    assert raised(tmp_path, {0: Failure(10, -15)}).message == "rank 0 (pid 10) was ended by SIGTERM"


def test_only_processes_of_ours_are_alive():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert alive(child.pid)
    child.communicate(b"\n")
    assert not alive(child.pid)
    if sys.platform == "linux":
        assert not alive(os.getppid())  # somebody else's
