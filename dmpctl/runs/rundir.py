"""The run directory: who owns it, what it was asked to do, and what it has measured."""

import json
import mmap
import os
import socket
import sys
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any
from zlib import crc32

from pydantic import JsonValue

from dmpctl.errors import Damaged, InUse, MissingError, UsageError
from dmpctl.files import locked, plain_json, put_aside, write_atomic, write_json, writing
from dmpctl.runs.records import Record, read_record
from dmpctl.settings.methods import METHODS
from dmpctl.settings.options import defaults_of
from dmpctl.texts import refuse_other_encoding
from dmpctl.words import differences, nearest_or

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
    """metrics.jsonl: a line for every --log-every steps, an object with its `step` and a checksum of the rest of the line.

    The last line may be torn, by a kill: it counts for nothing. A resume reads from the end.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, line: Mapping[str, object]) -> None:
        """Write one line at the end."""
        body = json.dumps(line)[:-1]
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(f'{body}, "crc": "{crc32(body.encode()):08x}"}}\n')

    def cut_back(self, step: int) -> list[str]:
        """Drop the lines after `step`, which will be written again. Returns a sentence where damaged ones are among them: the
        file as it was is then kept beside it."""
        keep, damaged = 0, 0
        with closing(self._backwards()) as lines:
            for start, line in lines:
                found = _line_in(line)
                if found is not None and found["step"] <= step:
                    keep = start + len(line)
                    break
                damaged += found is None and line.endswith(b"\n")
        if damaged:
            aside = put_aside(self._path)
            write_atomic(self._path, aside.read_bytes()[:keep])
            return [f"{self._path} has {damaged} damaged lines at its end, which are kept in {aside.name}"]
        if self._path.is_file():
            with writing(self._path):
                os.truncate(self._path, keep)
        return []

    def last_step(self) -> int:
        """Returns the last step that has a line, 0 if none has."""
        with closing(self._backwards()) as lines:
            return int(next((found["step"] for _, line in lines if (found := _line_in(line)) is not None), 0))

    def read(self, damaged: Callable[[int], None]) -> Iterator[dict[str, Any]]:
        """Yields the lines, one by one; calls `damaged` with the number of each that is not what was written."""
        if self._path.is_file():
            with self._path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if (found := _line_in(line)) is not None:
                        yield found
                    elif line.endswith(b"\n"):
                        damaged(number)

    def lines(self) -> list[dict[str, Any]]:
        """Returns all lines; Damaged at one that is not what was written."""
        damaged = list[int]()
        found = list(self.read(damaged.append))
        if damaged:
            raise Damaged(f"{self._path} is damaged at line {damaged[0]}", "move it away to go on without it")
        return found

    def _backwards(self) -> Generator[tuple[int, bytes], None, None]:
        """Yields each line with where it begins in the file, the last one first."""
        if self._path.is_file() and self._path.stat().st_size:
            with self._path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                end = len(data)
                while end > 0:
                    start = data.rfind(b"\n", 0, end - 1) + 1
                    yield start, data[start:end]
                    end = start


def _line_in(line: bytes) -> dict[str, Any] | None:
    """Returns the figures of a line, without its checksum, which older ones lack; None if it is damaged, or torn."""
    body, mark, end = line.rpartition(b', "crc": "')
    if mark and end != b'%08x"}\n' % crc32(body):
        return None
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("step"), int | float):
        return None
    found.pop("crc", None)
    return found


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
        if unknown := sorted(set(allowed) - set(science) - {"iters"}):
            hint = nearest_or(unknown[0], science, "see science in config.json")
            raise UsageError(f"--allow-change {unknown[0]}: there is no such setting of an experiment", hint)
        if (self.path / "config.json").is_file():
            before = self.config()
            if before.command != command:
                raise UsageError(f"{self.path} was made by dmpctl {before.command}, not {command}", "name another --run")
            old = before.science
            newer = {key: value for key, value in defaults_of(command).items() if key in science and key not in old}
            now = plain_json(science)
            kept = {key: now[key] for key in allowed if key in now}
            changed = differences(old | newer | kept, now)
            if method := [each for each in changed if each[0] == "method"]:  # whose options differ because it does
                shared = {name for kind in METHODS.values() for name in kind.model_fields}
                changed = method + [each for each in changed if each[0] not in shared]
            if changed:
                shown = "; ".join(f"{key}: {there} there, {asked} now" for key, there, asked in changed[:4])
                raise UsageError(
                    f"{self.path} already uses different settings ({shown})",
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
