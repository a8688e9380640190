"""Starts a command in several processes, through torch's elastic launcher, and says in one sentence how they ended.

One process per GPU, over one machine or several; none of it where something else has started this process already.
"""

import json
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from dmpctl.engine.ranks import launched
from dmpctl.errors import DmpError, Interrupted
from dmpctl.files import write_json
from dmpctl.settings.launch import Launch
from dmpctl.settings.model import Settings

GRACE = 8.0  # sec that the others have to end after one has failed, before they are killed
POLL = 0.2  # sec between two looks at the processes
SAVING = 3600  # sec that processes have to save after a signal; schedulers have limits of their own
MEETING = "dmpctl"  # where machines meet, if no scheduler names the job


@dataclass(frozen=True)
class Job:
    """A command with all its settings, resolved once: the processes look at no variable and no settings file.

    `argument` is the positional one, None if there is none; `argv` is what was typed.
    """

    command: str
    settings: Settings
    argument: Any
    argv: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives the same job back."""
        argument = str(self.argument) if isinstance(self.argument, Path) else self.argument
        return {"command": self.command, "settings": self.settings.to_dict(), "argument": argument, "argv": self.argv}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Job":
        return cls(value["command"], Settings.from_dict(value["settings"]), value["argument"], list(value["argv"]))


def processes_to_start(launch: Launch) -> int:
    """How many processes this command starts on this machine: 0 where this one does the work itself."""
    if launched():
        return 0
    wanted = launch.num_processes
    if wanted is None:
        many = launch.device in ("auto", "cuda") and not launch.cpu
        wanted = max(1, torch.cuda.device_count()) if many else 1
    return wanted if wanted > 1 or launch.nodes[1] > 1 else 0


def run_job(job: Job, processes: int) -> int:
    """Run the job in so many processes on this machine; returns its exit code.

    Raises what the first process to fail raised, with its rank, and Interrupted after a signal. No process is left.
    """
    folder = Path(tempfile.mkdtemp(prefix="dmpctl-"))
    write_json(folder / "job.json", job.to_dict())
    failed = True
    try:
        with ending_the_rest(folder):
            caught = _started(job.settings.launch, processes, folder)
        for attempt in folder.glob("attempt-*"):  # after a second Ctrl-C
            kill(_running(attempt))
        code = _outcome(folder, caught)
        failed = False
        return code
    except Interrupted:
        failed = False
        raise
    finally:
        if not failed:  # else the logs are needed
            shutil.rmtree(folder, ignore_errors=True)


def _started(launch: Launch, processes: int, folder: Path) -> "dict[int, Any] | signal.Signals":
    """Start them and wait: those that failed by rank ({}: none did), or the signal that came."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    low, high = launch.nodes
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # shared, a second attempt reads the addresses of the first
    for name in list(logging.root.manager.loggerDict):  # each has a level of its own; we say what failed
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    hosts = {} if launch.node_rank is None else {"is_host": launch.node_rank == 0}
    config = LaunchConfig(
        min_nodes=low,
        max_nodes=high,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex if high == 1 else os.environ.get("SLURM_JOB_ID", MEETING),
        rdzv_backend="c10d",
        rdzv_endpoint=launch.rdzv_endpoint or "localhost:0",
        rdzv_configs=hosts,
        local_addr="localhost" if high == 1 else None,
        max_restarts=launch.max_restarts,
        monitor_interval=POLL,
        shutdown_timeout=SAVING,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        logs_specs=DefaultLogsSpecs(
            log_dir=str(folder / "logs"), redirects={rank: Std.NONE if rank == 0 else Std.ALL for rank in range(processes)}
        ),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "dmpctl.cli.worker", str(folder))
    except ChildFailedError as error:
        return dict(error.failures)
    except SignalException as error:
        return signal.Signals(error.sigval)
    return {}


def _outcome(folder: Path, caught: "dict[int, Any] | signal.Signals") -> int:
    """The exit code of the job, or the failure to raise: the one that was first, not what the others said of its loss."""
    found = outcomes(folder)
    stopped = [outcome for outcome in found if outcome.get("signal")]
    if stopped:
        raise _again(min(stopped, key=lambda outcome: outcome["rank"]))
    if isinstance(caught, signal.Signals):
        raise Interrupted(f"stopped by {caught.name}", caught.value, "the same command goes on with what is there")
    if not caught:
        return max((int(outcome["exit_code"]) for outcome in found), default=0)
    said = [outcome for outcome in found if outcome["message"]]
    said.sort(key=lambda outcome: (outcome["echo"], not outcome["expected"], outcome["at"]))
    killed = {rank: failure for rank, failure in caught.items() if failure.exitcode < 0 and rank not in {o["rank"] for o in said}}
    if said and not (killed and said[0]["echo"]):
        raise _again(said[0], len(said) == len(caught) > 1 and len({outcome["message"] for outcome in said}) == 1)
    where = f"its log: {folder / 'logs'}"
    if killed:
        rank, failure = min(killed.items(), key=lambda item: item[1].timestamp)
        memory = ", which is how a machine out of memory ends one" if failure.signal_name() == "SIGKILL" else ""
        raise DmpError(f"rank {rank} (pid {failure.pid}) was ended by {failure.signal_name()}{memory}", where)
    rank, failure = min(caught.items())
    raise DmpError(f"rank {rank} (pid {failure.pid}) ended with exit code {failure.exitcode} and said nothing", where)


def _again(outcome: Mapping[str, Any], all_alike: bool = False) -> DmpError:
    """The failure that a process wrote down; `all_alike`: all of them say this, so it is nobody's own."""
    who = "" if all_alike or outcome.get("signal") else f"rank {outcome['rank']}: "
    error = DmpError(who + outcome["message"], outcome["hint"])
    error.exit_code = int(outcome["exit_code"])
    return error


def outcomes(folder: Path) -> list[dict[str, Any]]:
    """How the processes of the last attempt ended, as far as they could still say it."""
    attempts = sorted(folder.glob("attempt-*"), key=lambda path: int(path.name.removeprefix("attempt-")))
    if not attempts:
        return []
    return [json.loads(path.read_text("utf-8")) for path in sorted(attempts[-1].glob("rank-*.json"))]


@contextmanager
def ending_the_rest(folder: Path) -> Iterator[None]:
    """Kill processes that still run some seconds after another has failed: one that waits for it may never hear a signal."""
    done = Event()
    thread = Thread(target=_watch, args=(folder, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch(folder: Path, done: Event) -> None:
    since: dict[Path, float] = {}
    while not done.wait(POLL):
        for attempt in folder.glob("attempt-*"):
            if attempt not in since and _has_failed(attempt):
                since[attempt] = time.monotonic()
            if time.monotonic() - since.get(attempt, math.inf) > GRACE:
                kill(_running(attempt))


def _has_failed(attempt: Path) -> bool:
    """Whether a process has said that it failed, or has gone without a word."""
    for path in attempt.glob("rank-*.pid"):
        outcome = path.with_suffix(".json")
        if not outcome.is_file():
            if not alive(_pid_in(path)) and not outcome.is_file():
                return True
        elif json.loads(outcome.read_text("utf-8"))["message"] and not json.loads(outcome.read_text("utf-8")).get("signal"):
            return True
    return False


def _running(attempt: Path) -> list[int]:
    return [pid for pid in map(_pid_in, attempt.glob("rank-*.pid")) if alive(pid)]


def _pid_in(path: Path) -> int:
    return int(path.read_text("utf-8"))


def alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def kill(pids: Iterable[int]) -> None:
    """End processes at once."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
