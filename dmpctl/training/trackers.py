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
from pydantic import BaseModel

from dmpctl.errors import MissingError
from dmpctl.files import read_json, write_json
from dmpctl.runs.rundir import RunDir
from dmpctl.types import Progress
from dmpctl.words import redacted

SCHEMA_VERSION = 1
NAME = "trackers.json"  # in the run directory
PROJECT = "dmpctl"


class Trackers:
    """The trackers of one run on its main process; none by default. They may fail, training goes on without them."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._open, self._sent = progress, dict[str, GeneralTracker](), 0

    def start(self, names: str | None, run: RunDir, settings: Mapping[str, object]) -> None:
        """Begin, or go on, in the trackers that are named (None: none) with flat JSON-able `settings`."""
        if names is None:
            return
        known = sent_before(run)
        self._sent = known.step
        for name in dict.fromkeys(names.split(",")):
            self._guarded(name, partial(self._start, name, run, known.id, settings))

    def _start(self, name: str, run: RunDir, identity: str, settings: Mapping[str, object]) -> None:
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"logging_dir": run.path / "tensorboard"},
            "wandb": {"dir": str(run.path), "name": run.path.name, "id": identity, "resume": "allow"},
            "trackio": {"name": f"{run.path.name}-{identity}", "resume": "allow"},
        }
        tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, **options[name])
        tracker.start()
        if self._sent == 0:
            plain = {
                key: value if isinstance(value, int | float | bool) else redacted(str(value)) for key, value in settings.items()
            }
            tracker.store_init_configuration(plain)
        self._open[name] = tracker

    def log(self, step: int, figures: Mapping[str, float | list[float]]) -> None:
        """Send a step's figures, a list as one figure for each entry; a step that was sent before is left out."""
        if step <= self._sent:
            return
        sent: dict[str, float] = {}
        for name, value in figures.items():
            each = {f"{name}/{n}": one for n, one in enumerate(value)} if isinstance(value, list) else {name: value}
            sent |= {key: float(one) for key, one in each.items()}
        for name, tracker in list(self._open.items()):
            self._guarded(name, partial(tracker.log, sent, step=step))

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
            what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self._progress.say(f"warning: {name} failed and is left out ({what}); metrics.jsonl has everything")


def refuse_missing(names: str | None) -> None:
    """MissingError for a tracker whose package is not installed."""
    for name in (names or "").split(","):
        if name and find_spec(name) is None:
            raise MissingError(f"--track {name}: its package is not installed", f"python -m pip install 'dmpctl[{name}]'")


class Sent(BaseModel, frozen=True):
    """trackers.json: the `id` that the run has in trackers, and the last `step` that they were sent."""

    schema_version: int = SCHEMA_VERSION
    id: str
    step: int = 0


def sent_before(run: RunDir) -> Sent:
    """Reads trackers.json; without trackers.json a new `id` at step 0."""
    path = run.path / NAME
    return Sent(**read_json(path, SCHEMA_VERSION)) if path.is_file() else Sent(id=uuid.uuid4().hex[:8])


def remember(run: RunDir) -> None:
    """Write down what trackers were sent, before metrics.jsonl is cut back to a checkpoint."""
    known = sent_before(run)
    write_json(run.path / NAME, known.model_copy(update={"step": max(run.metrics.last_step(), known.step)}).model_dump())
