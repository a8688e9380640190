"""Trackers beside metrics.jsonl (`--track tensorboard,wandb,trackio`), through accelerate.

A resumed run goes on in the same ones. What a killed run had sent beyond its last checkpoint comes again, bit for bit, and
is left out: no step is sent twice.
"""

import sys
import uuid
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from dmpctl.errors import MissingError
from dmpctl.files import read_json, write_json
from dmpctl.runs.rundir import RunDir
from dmpctl.types import Progress

SCHEMA_VERSION = 1
NAME = "trackers.json"  # in the run directory
PROJECT = "dmpctl"


class Trackers:
    """The trackers of one run on its main process; none by default. They may fail, training goes on without them."""

    def __init__(self) -> None:
        self._open: dict[str, GeneralTracker] = {}
        self._sent = 0
        self._progress: Progress | None = None

    def start(self, names: str | None, run: RunDir, settings: Mapping[str, Any], progress: Progress) -> None:
        """Begin, or go on, in the trackers that are named (None: none) with flat JSON-able `settings`."""
        self._progress = progress
        if names is None:
            return
        known = seen_before(run)
        self._sent = int(known["step"])
        for name in dict.fromkeys(names.split(",")):
            self._guarded(name, partial(self._start, name, run, known["id"], settings))

    def _start(self, name: str, run: RunDir, identity: str, settings: Mapping[str, Any]) -> None:
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"logging_dir": run.path / "tensorboard"},
            "wandb": {"dir": str(run.path), "name": run.path.name, "id": identity, "resume": "allow"},
            "trackio": {"name": f"{run.path.name}-{identity}", "resume": "allow"},
        }
        tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, **options[name])
        tracker.start()
        if self._sent == 0:
            tracker.store_init_configuration({key: value if _plain(value) else str(value) for key, value in settings.items()})
        self._open[name] = tracker

    def log(self, line: Mapping[str, Any]) -> None:
        """Send one line of metrics.jsonl, lists as one figure for each entry; what was sent before is left out."""
        step = int(line["step"])
        if step <= self._sent:
            return
        figures: dict[str, float] = {}
        for name, value in line.items():
            many = isinstance(value, list)
            figures |= {f"{name}/{n}": float(one) for n, one in enumerate(value)} if many else {name: float(value)}
        figures.pop("step")
        for name, tracker in list(self._open.items()):
            self._guarded(name, partial(tracker.log, figures, step=step))

    def finish(self) -> None:
        """Let them write what they hold."""
        for name, tracker in list(self._open.items()):
            self._guarded(name, tracker.finish)

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        """A tracker is somebody else's service: its failure is said once, and it is left out from then on."""
        try:
            with redirect_stdout(sys.stderr):  # stdout is for results
                act()
        except Exception as error:
            self._open.pop(name, None)
            if self._progress is not None:
                what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                self._progress.say(f"warning: {name} failed and is left out ({what}); metrics.jsonl has everything")


def _plain(value: Any) -> bool:
    return isinstance(value, int | float | str | bool)


def refuse_missing(names: str | None) -> None:
    """MissingError for a tracker whose package is not installed."""
    for name in (names or "").split(","):
        if name and find_spec(name) is None:
            raise MissingError(f"--track {name}: its package is not installed", f"python -m pip install 'dmpctl[{name}]'")


def seen_before(run: RunDir) -> dict[str, Any]:
    """trackers.json: the `id` that the run has in trackers, and the last `step` that they were sent."""
    path = run.path / NAME
    return read_json(path, SCHEMA_VERSION) if path.is_file() else {"id": uuid.uuid4().hex[:8], "step": 0}


def remember(run: RunDir) -> None:
    """Write down what trackers were sent, before metrics.jsonl is cut back to a checkpoint."""
    known = seen_before(run)
    step = max(run.last_logged(), int(known["step"]))
    write_json(run.path / NAME, {"schema_version": SCHEMA_VERSION, "id": known["id"], "step": step})
