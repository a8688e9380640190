"""The cache of what was downloaded: where it lies, who may write it, and what is known of each file.

<cache>/files/<row>/<file>, <cache>/index.json, <cache>/locks. Hub repositories lie in the Hub's own cache, shared with all
other programs, unless a cache was named (--cache-dir, DMPCTL_CACHE_DIR): then in <cache>/hub, and what the `datasets` library
prepares in <cache>/datasets.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

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


class Fact(BaseModel):
    """A file as it came; `size` in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    size: int


class Fetched(BaseModel):
    """One row as it was fetched. `revision`: the commit, None for what has none. `files` by their path in the folder.

    `hub`: the folder of the repository in the Hub's cache, None for a file of ours. `wanted`: the row's patterns then.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    licence: str
    fetched: str
    wanted: tuple[str, ...] = ()
    revision: str | None = None
    hub: str | None = None
    files: dict[str, Fact] = {}

    @property
    def folder(self) -> Path:
        """The folder that the files are named in."""
        return files_dir() if self.hub is None else hub_dir() / self.hub / "snapshots" / str(self.revision)


class Accepted(BaseModel):
    """A licence, and when it was accepted."""

    licence: str
    accepted: str


class Index(BaseModel):
    """index.json: rows as they were fetched, and licences that were accepted, by the row's name."""

    schema_version: int = SCHEMA_VERSION
    entries: dict[str, Fetched]
    licences: dict[str, Accepted]


def now() -> str:
    """Returns this moment, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_index() -> Index:
    """Returns the index, empty where there is none; IntegrityError where it cannot be understood."""
    path = cache_dir() / "index.json"
    if not path.is_file():
        return Index(entries={}, licences={})
    found = read_json(path, SCHEMA_VERSION)
    try:
        return Index.model_validate(found)
    except ValidationError:
        raise IntegrityError(f"{path} is damaged", "delete it, then run dmpctl download --verify") from None


@contextmanager
def changing_index() -> Iterator[Index]:
    """Yields the index, to be changed and then written, while no other process does the same."""
    with working_on(".index"):  # no row can be called so
        index = read_index()
        yield index
        index.entries = dict(sorted(index.entries.items()))
        write_json(cache_dir() / "index.json", index.model_dump(mode="json"))


@contextmanager
def working_on(name: str, progress: Progress | None = None, wait: bool = True) -> Iterator[bool]:
    """One process at a time works on `name`; who has to wait says so. Without `wait`: yields whether nobody else does."""
    lock = make_folder(cache_dir() / "locks") / f"{name}.lock"
    busy = None if progress is None else partial(progress.say, f"another process is fetching {name}, waiting for it")
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
