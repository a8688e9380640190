"""One of the processes of a command, started by `processes.launcher`: `python -m dmpctl.cli.worker FOLDER LAUNCHER_PID`.

FOLDER/job.json says what to do. How it ends goes into FOLDER/attempt-A/rank-R.json; nothing is said on the terminal but by
rank 0, and a failure by the launcher alone.
"""

import ctypes
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from dmpctl.cli.app import SIGINT, end
from dmpctl.cli.calls import perform
from dmpctl.cli.commands import COMMANDS
from dmpctl.errors import DmpError, Interrupted
from dmpctl.files import make_folder, write_atomic
from dmpctl.processes.notes import Assignment, Outcome
from dmpctl.processes.peers import loss
from dmpctl.processes.stop import hold_signals, let_signals_in
from dmpctl.processes.streams import keep_streams, result_lost


def end_with(launcher: int) -> None:
    """The launcher starts us in a session of our own: without this, killing it would leave us at work (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != launcher:  # it went before we could ask
            sys.exit(0)


def work(folder: Path) -> int:
    """Do the work and say how it ended; returns this process's exit code: 0 after a stop, or it would be started again."""
    rank, attempt = int(os.environ["RANK"]), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    place = make_folder(folder / f"attempt-{attempt}") / f"rank-{rank}.json"
    write_atomic(place.with_suffix(".pid"), str(os.getpid()).encode())
    outcome, code, debug = Outcome(rank=rank), 0, False
    try:
        let_signals_in()
        asked = Assignment.read(folder)
        debug = asked.settings.console.debug
        sys.argv[:] = asked.argv
        from dmpctl.processes.ranks import leave

        try:
            done = perform(COMMANDS[asked.command], asked.settings, asked.argument)
        except Interrupted:
            leave()  # after a failure the others may never come to do so, too
            raise
        leave()
        outcome = Outcome(rank=rank, exit_code=done or result_lost())
    except Interrupted as stop:
        outcome = _said(rank, stop, stop.signal_number)
    except DmpError as error:
        outcome, code = _said(rank, error), error.exit_code
        _trace(error, debug)
    except KeyboardInterrupt:
        outcome = Outcome(rank=rank, message="stopped by SIGINT at once", signal=int(signal.SIGINT), exit_code=SIGINT)
    except BaseException as error:
        outcome, code = _unexpected(rank, error), DmpError.exit_code
        _trace(error, debug or rank > 0)  # ranks above 0 write to a log, which the launcher names
    hold_signals()  # what is to be said is said, and the end is near
    outcome.model_copy(update={"at": time.time()}).write(place)
    return code


def _said(rank: int, error: DmpError, number: int = 0) -> Outcome:
    return Outcome(rank=rank, message=error.message, hint=error.hint, exit_code=error.exit_code, signal=number)


def _unexpected(rank: int, error: BaseException) -> Outcome:
    """Anything but a DmpError: our bug, or (`echo`) the loss of another process as seen from here."""
    if (echo := loss(error)) is not None:
        return Outcome(rank=rank, expected=False, echo=True, message=echo.message, hint=echo.hint, exit_code=echo.exit_code)
    text, hint = f"{type(error).__name__}: {error}".rstrip(": "), "run it again with --debug to see where"
    return Outcome(rank=rank, expected=False, message=text, hint=hint, exit_code=DmpError.exit_code)


def _trace(error: BaseException, wanted: bool) -> None:
    if wanted:
        sys.stderr.write("".join(traceback.format_exception(error)))


if __name__ == "__main__":
    launcher, folder = int(sys.argv[2]), Path(sys.argv[1])
    keep_streams()
    end_with(launcher)
    ended = work(folder)
    if os.getppid() != launcher:  # killed, it cannot remove this
        shutil.rmtree(folder, ignore_errors=True)
    end(ended)
