"""Starts a command in several processes, through torch's elastic launcher, and says in one sentence how they ended.

One process per GPU, over one machine or several; none of it where something else has started this process already.
"""

import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch

import dmpctl
from dmpctl.errors import DmpError, Interrupted, UsageError
from dmpctl.processes.notes import Assignment, Outcome, outcomes
from dmpctl.processes.peers import runs
from dmpctl.processes.ranks import launched
from dmpctl.processes.stop import heard, hold_signals, let_signals_in
from dmpctl.settings.sections import Launch

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    Failures = dict[int, ProcessFailure]  # by rank

GRACE = 8.0  # sec that the others have to end after one has failed, before they are killed
POLL = 0.2  # sec between two looks at the processes
SAVING = 3600  # sec that processes have to save after a signal; schedulers have limits of their own
WORDS = 2  # lines of the log of a process that failed
MEETING = "dmpctl"  # where machines meet, if no scheduler names the job


def processes_to_start(launch: Launch) -> int:
    """How many processes this command starts on this machine: 0 where this one does the work itself."""
    if launched():
        return 0
    wanted = launch.num_processes
    if wanted is None:
        many = launch.device in ("auto", "cuda") and not launch.cpu
        wanted = max(1, torch.cuda.device_count()) if many else 1
    if wanted > (most := max(torch.cuda.device_count(), 4 * (os.cpu_count() or 1))):
        raise UsageError(f"--num-processes {wanted} are more than this machine can run", f"say --num-processes {most} or fewer")
    return wanted if wanted > 1 or launch.nodes[1] > 1 else 0


def run_in(processes: int, work: Assignment) -> int:
    """Do the work in so many processes on this machine; returns its exit code.

    Raises what the first process to fail raised, with its rank, and Interrupted after a signal. No process is left.
    """
    folder = Path(tempfile.mkdtemp(prefix="dmpctl-"))
    try:
        work.write(folder)
        with ending_the_rest(folder) as hung:
            caught = _started(work.settings.launch, processes, folder)
        return _outcome(folder, caught, hung)
    except DmpError as error:
        if work.settings.console.debug and error.exit_code == DmpError.exit_code:
            sys.stderr.write("\n".join(last_words(folder, rank, 1000) for rank in range(1, processes)) + "\n")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _started(launch: Launch, processes: int, folder: Path) -> "Failures | signal.Signals":
    """Start them and wait: those that failed by rank ({}: none did), or the signal that came."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    low, high = launch.nodes
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ["PYTHONSAFEPATH"] = "1"  # `-m` puts the working directory first, and a torch.py there would run
    home = str(Path(dmpctl.__file__).parents[1])
    if home not in sys.path:  # a clone that is not installed
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), home]))
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # shared, a second attempt reads the addresses of the first
    for name in list(logging.root.manager.loggerDict):  # each has a level of its own; we say what failed
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    hosts = {} if launch.node_rank is None else {"is_host": launch.node_rank == 0}
    wanted: dict[str, Any] = {
        "min_nodes": low,
        "max_nodes": high,
        "nproc_per_node": processes,
        "run_id": uuid.uuid4().hex if high == 1 else os.environ.get("SLURM_JOB_ID", MEETING),
        "rdzv_backend": "c10d",
        "rdzv_endpoint": launch.rdzv_endpoint or "localhost:0",
        "rdzv_configs": hosts,
        "local_addr": "localhost" if high == 1 else None,
        "max_restarts": launch.max_restarts,
        "monitor_interval": POLL,
        "shutdown_timeout": SAVING,
        "signals_to_handle": ",".join(number.name for number in heard()),
        "logs_specs": DefaultLogsSpecs(
            log_dir=str(folder / "logs"), redirects={rank: Std.NONE if rank == 0 else Std.ALL for rank in range(processes)}
        ),
    }
    there = LaunchConfig.__dataclass_fields__  # older releases of torch wait 30 sec after a signal, whatever is asked for
    config = LaunchConfig(**{name: value for name, value in wanted.items() if name in there})
    try:
        elastic_launch(config, sys.executable)("-m", "dmpctl.cli.worker", str(folder), str(os.getpid()))
    except ChildFailedError as error:
        return dict(error.failures)
    except SignalException as error:
        return signal.Signals(error.sigval)
    return {}


def _outcome(folder: Path, caught: "Failures | signal.Signals", hung: Collection[int]) -> int:
    """The exit code of the job, or the failure to raise: the one that was first, not what the others said of its loss.

    `hung`: pids of processes that had to be killed after another's failure.
    """
    found = outcomes(folder)
    stopped = [outcome for outcome in found if outcome.signal]
    if stopped and not _failed_before(min(outcome.at for outcome in stopped), found, caught, hung):
        raise _again(stopped[0])
    if isinstance(caught, signal.Signals):
        raise Interrupted(f"stopped by {caught.name}", caught.value, "the same command goes on with what is there")
    if not caught:
        return max((outcome.exit_code for outcome in found), default=0)
    said = sorted((o for o in found if o.message and not o.signal), key=lambda o: (o.echo, not o.expected, o.at))
    by_launcher_last = sorted(caught.items(), key=lambda item: (item[1].exitcode == -signal.SIGTERM, item[0]))
    died = {rank: failure for rank, failure in by_launcher_last if rank not in {outcome.rank for outcome in said}}
    if said and not (said[0].echo and died):
        alike = len(said) > 1 and len({outcome.message for outcome in said}) == 1
        raise _again(said[0], alike, None if said[0].expected else last_words(folder, said[0].rank))
    rank, failure = next(iter(died.items()), by_launcher_last[0])
    who, where = f"rank {rank} (pid {failure.pid})", last_words(folder, rank)
    if failure.pid in hung:
        raise DmpError(f"{who} hangs: the others waited for it for --rank-timeout seconds", where)
    if failure.exitcode >= 0:
        raise DmpError(f"{who} ended with exit code {failure.exitcode} and said nothing", where)
    memory = ", as where memory runs out" if failure.signal_name() == "SIGKILL" else ""
    raise DmpError(f"{who} was ended by {failure.signal_name()}{memory}", where)


def last_words(folder: Path, rank: int, lines: int = WORDS) -> str:
    """The end of a process's log in the launcher's folder, which is then removed; rank 0 wrote to the terminal."""
    logs = sorted(folder.glob(f"logs/*/attempt_*/{rank}/stderr.log"), key=lambda path: path.stat().st_mtime)
    said = logs[-1].read_text("utf-8", errors="replace").splitlines()[-lines:] if logs else []
    return " / ".join(["run it again with --debug to see all that it said", *map(str.strip, said)])


def _failed_before(stop: float, found: Collection[Outcome], caught: "Failures | signal.Signals", hung: Collection[int]) -> bool:
    """Whether a process had failed or died before a stop at this time: then the launcher sent the signal, to end the others."""
    if any(outcome.message and not outcome.signal and not outcome.echo and outcome.at <= stop for outcome in found):
        return True
    heard, died = {outcome.rank for outcome in found}, {} if isinstance(caught, signal.Signals) else caught
    return any(
        rank not in heard and failure.exitcode != -signal.SIGTERM and failure.pid not in hung for rank, failure in died.items()
    )


def _again(outcome: Outcome, all_alike: bool = False, hint: str | None = None) -> DmpError:
    """The failure that a process wrote down; `all_alike`: all say this, so it is nobody's own. `hint` None: its own."""
    hint, who = hint or outcome.hint, "" if all_alike else f"rank {outcome.rank}: "
    error = Interrupted(outcome.message, outcome.signal, hint) if outcome.signal else DmpError(who + outcome.message, hint)
    error.exit_code = outcome.exit_code
    return error


@contextmanager
def ending_the_rest(folder: Path) -> Iterator[set[int]]:
    """Kill processes that still run some seconds after another has failed: one that waits for it may never hear a signal.

    So after a second Ctrl-C, at once. Gives the pids of those that were killed.
    """
    done, killed = Event(), set[int]()
    heard, hearing = os.pipe()
    os.set_blocking(heard, False)
    os.set_blocking(hearing, False)
    before = signal.set_wakeup_fd(hearing, warn_on_full_buffer=False)  # the launcher's own handlers say nothing to us
    thread = Thread(target=_watch, args=(folder, heard, done, killed), daemon=True)
    thread.start()
    hold_signals()  # by the processes, until they are ready; here the watching thread takes them for this one
    try:
        yield killed
    finally:
        let_signals_in()
        done.set()
        thread.join()
        signal.set_wakeup_fd(before)
        os.close(heard)
        os.close(hearing)


def _watch(folder: Path, heard: int, done: Event, killed: set[int]) -> None:
    since: dict[Path, float] = {}
    interrupts = 0
    while not done.wait(POLL):
        with suppress(BlockingIOError):
            interrupts += os.read(heard, 64).count(signal.SIGINT)
        for attempt in folder.glob("attempt-*"):
            if attempt not in since and _has_failed(attempt):
                since[attempt] = time.monotonic()
            if interrupts > 1 or time.monotonic() - since.get(attempt, math.inf) > GRACE:
                for pid in filter(alive, map(_pid_in, attempt.glob("rank-*.pid"))):
                    killed.add(pid)
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


def _has_failed(attempt: Path) -> bool:
    """Whether a process has said that it failed, or has gone without a word."""
    for path in attempt.glob("rank-*.pid"):
        outcome = path.with_suffix(".json")
        if not outcome.is_file():
            if not alive(_pid_in(path)) and not outcome.is_file():
                return True
        elif (said := Outcome.read(outcome)).message and not said.signal:
            return True
    return False


def alive(pid: int) -> bool:
    """Whether this is a process of ours that runs."""
    return runs(pid, os.getpid())


def _pid_in(path: Path) -> int:
    return int(path.read_text("utf-8"))
