"""The run directory: who owns it, what it was asked to do, and what it has measured."""

import json
import math
import os
import socket
import sys
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import JsonValue

from dmpctl.errors import IntegrityError, InUse, MissingError, UsageError
from dmpctl.files import locked, plain_json, write_atomic, write_json, writing
from dmpctl.runs.records import Record, read_record
from dmpctl.settings.options import defaults_of
from dmpctl.texts import refuse_other_encoding
from dmpctl.words import differences

SCHEMA_VERSION = 1


class RunConfig(Record):
    """config.json. `science`: flat values that make the run this experiment and no other; `settings`: by section."""

    hint = "name another --run"
    schema_version: int
    command: str
    science: dict[str, JsonValue]
    settings: dict[str, dict[str, JsonValue]]


class Provenance(Record):
    """provenance.json: one entry for each session, with versions, command line and what was found."""

    schema_version: int
    sessions: list[dict[str, JsonValue]]


class MetricsLog:
    """metrics.jsonl: a line for every --log-every steps, an object with its `step`. The last may be torn, by a kill."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, line: Mapping[str, object]) -> None:
        """Write one line at the end."""
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def cut_back(self, step: int) -> None:
        """Drop the lines after `step`: training goes on from there and will write them again."""
        if self._path.is_file():
            kept = [line for line in self._raw() if _step_of(line) <= step]
            write_atomic(self._path, "".join(line + "\n" for line in kept).encode())

    def last_step(self) -> int:
        """Returns the last step that has a line, 0 if none has; a torn line counts for nothing."""
        return int(max((step for step in map(_step_of, self._raw()) if step < math.inf), default=0))

    def lines(self) -> list[dict[str, Any]]:
        """Returns all lines; IntegrityError at a line that is not JSON."""
        try:
            return [json.loads(line) for line in self._raw()]
        except json.JSONDecodeError as error:
            raise IntegrityError(f"{self._path} is not valid JSON lines ({error})") from None

    def _raw(self) -> list[str]:
        return self._path.read_text("utf-8").splitlines() if self._path.is_file() else []


def _step_of(line: str) -> float:
    """The step of a line; infinity for a torn one, so that it lies beyond every step."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return math.inf


class RunDir:
    """One run on disk. Holds its lock while open as a context; reading needs none."""

    def __init__(self, path: Path, main: bool = True) -> None:
        """`main` False: another process of the same command holds the lock and does all the writing."""
        self.path, self.main = path.expanduser().absolute(), main
        self.checkpoints, self.metrics = self.path / "checkpoints", MetricsLog(self.path / "metrics.jsonl")
        self._held = ExitStack()

    def __enter__(self) -> "RunDir":
        """Create the folder and take the lock; UsageError if another command holds it or the folder is something else."""
        if not self.main:
            return self
        refuse_other_encoding(self.path, "the run")
        with writing(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise UsageError(f"{self.path} is a file, a run is a folder", "name another --run")
            names = [p.name for p in self.path.iterdir()] if self.path.is_dir() else []
            # beside a run: an empty folder, or one whose first command was killed before it could say that it is a run
            if "config.json" not in names and not all(n.startswith((".lock", ".config.json.")) for n in names):
                raise UsageError(f"{self.path} is not empty and is no run of dmpctl", "name another --run")
            self.path.mkdir(parents=True, exist_ok=True)
        lock = self.path / ".lock"
        if not self._held.enter_context(locked(lock, wait=False)):
            self._held.close()
            holder, held = " ".join(lock.read_bytes()[:200].decode(errors="replace").split()), lock.with_name(f"{lock.name}.held")
            dead = f"; if it died on another machine: rm {held}" if held.exists() else ""
            raise InUse(f"{self.path} is in use by {holder or 'another command'}", f"wait for it, or name another --run{dead}")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with writing(self.path):
            if lock.read_bytes()[:4] in (b"", b"pid "):  # else the file itself is the lock, where there are no others
                lock.write_text(f"pid {os.getpid()} on {socket.gethostname()} since {now}\n")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._held.close()

    def config(self) -> RunConfig:
        """Returns config.json; MissingError if this is no run, IntegrityError if it lacks something."""
        if not (self.path / "config.json").is_file():
            raise MissingError(f"{self.path} is no run: it has no config.json", "name a run made by dmpctl patch or pretrain")
        return read_record(self.path / "config.json", RunConfig)

    def refuse_other(self, command: str, science: Mapping[str, object], allowed: Collection[str] = ()) -> None:
        """UsageError if the run holds another experiment: `science` is flat name -> value of all that makes it this one.

        `allowed`: names that may change; UsageError for one that does not exist.
        """
        if unknown := sorted(set(allowed) - set(science)):
            raise UsageError(
                f"--allow-change {unknown[0]}: there is no such setting of an experiment", "see science in config.json"
            )
        if (self.path / "config.json").is_file():
            before = self.config()
            if before.command != command:
                raise UsageError(f"{self.path} was made by dmpctl {before.command}, not {command}", "name another --run")
            old = before.science
            newer = {key: value for key, value in defaults_of(command).items() if key in science and key not in old}
            now = plain_json(science)
            kept = {key: now[key] for key in allowed}
            if changed := differences(old | newer | kept, now):
                shown = "; ".join(f"{key}: {there} there, {asked} now" for key, there, asked in changed[:4])
                raise UsageError(
                    f"{self.path} holds another experiment ({shown})",
                    "name another --run, give the settings of that run, or --allow-change what is named here",
                )

    def differences(self, settings: Mapping[str, Mapping[str, object]]) -> list[str]:
        """Returns what a resume asks for otherwise than the run did before: `save_every: 500 before, 50 now`."""
        if not (self.path / "config.json").is_file():
            return []
        sections = (self.config().settings, plain_json(settings))  # names are unique across them
        old, new = ({key: value for section in each.values() for key, value in section.items()} for each in sections)
        return [f"{key}: {a} before, {b} now" for key, a, b in differences({key: old.get(key) for key in new}, new)]

    def begin(
        self, command: str, science: Mapping[str, object], settings: Mapping[str, object], facts: Mapping[str, object]
    ) -> None:
        """Record what the run is asked to do from now on, and the facts of this session beside versions and command line."""
        value = {"schema_version": SCHEMA_VERSION, "command": command, "science": science, "settings": settings}
        write_json(self.path / "config.json", value)
        path = self.path / "provenance.json"
        sessions = read_record(path, Provenance).sessions if path.is_file() else []
        packages = ("dmpctl", "torch", "accelerate", "numpy", "safetensors")
        session = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "argv": ["dmpctl", *sys.argv[1:]],
            "versions": {"python": sys.version.split()[0]} | {name: version_of(name) for name in packages},
            **facts,
        }
        write_json(path, {"schema_version": SCHEMA_VERSION, "sessions": [*sessions, session]})

    def amend(self, facts: Mapping[str, object]) -> None:
        """Add to this session's entry in provenance.json what was only found on the way."""
        path = self.path / "provenance.json"
        *before, last = read_record(path, Provenance).sessions
        write_json(path, {"schema_version": SCHEMA_VERSION, "sessions": [*before, {**last, **facts}]})


def version_of(package: str) -> str:
    """Installed version, "not installed" where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
