"""The cache of what was downloaded: where it lies, who may write it, and what is known of each file.

<cache>/files/<row>/<file>, <cache>/index.json, <cache>/locks. Hub repositories lie in the Hub's own cache, shared with all
other programs, unless a cache was named (--cache-dir, DMPCTL_CACHE_DIR): then in <cache>/hub, and what the `datasets` library
prepares in <cache>/datasets.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dmpctl.errors import IntegrityError, UsageError
from dmpctl.files import amount, locked, make_folder, read_json, write_json
from dmpctl.types import Progress

SCHEMA_VERSION = 1
VARIABLE = "DMPCTL_CACHE_DIR"  # --cache-dir sets it, too
MARGIN = 64 << 20  # bytes of disk that a download leaves free


def cache_dir() -> Path:
    """$DMPCTL_CACHE_DIR, else $XDG_CACHE_HOME/dmpctl, by default ~/.cache/dmpctl."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dmpctl"


def files_dir() -> Path:
    """Where files from https lie, one folder per row."""
    return cache_dir() / "files"


def own_hub() -> bool:
    """Whether Hub repositories lie inside our cache."""
    return bool(os.environ.get(VARIABLE))


def hub_dir() -> Path:
    """Where Hub repositories lie: inside a cache that was named, else where HF_HOME and HF_HUB_CACHE say."""
    if own_hub():
        return cache_dir() / "hub"
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


@dataclass(frozen=True)
class Fact:
    """What is known of one file; `size` in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Entry:
    """One row as it was fetched. `revision`: the commit, None for what has none. `files` by their path in `folder`."""

    source: str
    licence: str
    fetched: str
    wanted: tuple[str, ...] = ()
    revision: str | None = None
    hub: str | None = None  # folder of the repository in the Hub's cache, None for a file of ours
    files: dict[str, Fact] = field(default_factory=dict)


@dataclass
class Index:
    """index.json. `licences`: row -> licence and date of its acceptance."""

    entries: dict[str, Entry]
    licences: dict[str, dict[str, str]]


def now() -> str:
    """This moment, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_index() -> Index:
    """The index, empty where there is none; IntegrityError where it cannot be understood."""
    path = cache_dir() / "index.json"
    if not path.is_file():
        return Index({}, {})
    found = read_json(path, SCHEMA_VERSION)
    try:
        return Index({name: _entry(value) for name, value in found["entries"].items()}, dict(found["licences"]))
    except (KeyError, TypeError, AttributeError):
        raise IntegrityError(f"{path} is damaged", "delete it, then run dmpctl download --verify") from None


def _entry(value: Mapping[str, Any]) -> Entry:
    files = {name: Fact(**fact) for name, fact in value["files"].items()}
    return Entry(**{**value, "files": files, "wanted": tuple(value["wanted"])})


@contextmanager
def changing_index() -> Iterator[Index]:
    """The index, to be changed and then written, while no other process does the same."""
    with working_on(".index"):  # no row can be called so
        index = read_index()
        yield index
        entries = {name: asdict(entry) for name, entry in sorted(index.entries.items())}
        value = {"schema_version": SCHEMA_VERSION, "entries": entries, "licences": index.licences}
        write_json(cache_dir() / "index.json", value)


@contextmanager
def working_on(name: str, progress: Progress | None = None, wait: bool = True) -> Iterator[bool]:
    """One process at a time works on `name`; who has to wait says so. Without `wait`: yields whether nobody else does."""
    lock = make_folder(cache_dir() / "locks") / f"{name}.lock"

    def busy() -> None:
        if progress is not None:
            progress.say(f"another process is fetching {name}, waiting for it")

    with locked(lock, wait, busy) as free:
        yield free


def need_room(folder: Path, need: int, what: str) -> None:
    """UsageError where `need` bytes for `what` do not fit on the disk of `folder`, with a margin."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if need + MARGIN > free:
        raise UsageError(
            f"{what} needs {amount(need)} in {folder}, {amount(free)} are free",
            "free some space, or name another place with --cache-dir",
        )
