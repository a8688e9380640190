"""Repositories of the Hugging Face Hub: one commit of them, whole, and every file checked against the Hub's own hash."""

import hashlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from dmpctl.errors import DmpError, IntegrityError, MissingError, UsageError
from dmpctl.files import FULL, make_folder, sha256_of, write_atomic
from dmpctl.settings.assets import AssetRow
from dmpctl.store.cache import Fact, hub_dir, need_room
from dmpctl.store.https import TRANSIENT, Again, with_patience
from dmpctl.types import Progress, ProgressTask

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")  # the first kind that a repository has one of is taken
BESIDE = (".json", ".txt", ".model")  # of a model: its configs and its words
ADDRESS = re.compile(
    r"hf://(?P<dataset>datasets/)?(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>refs/(pr|convert)/[\w.-]+|[\w.-]+))?(/(?P<file>.+))?"
)
T = TypeVar("T")


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository in the cache: `folder` holds `files`."""

    folder: Path
    commit: str
    files: dict[str, Fact]


def parse(address: str) -> AssetRow:
    """hf://[datasets/]OWNER/NAME[@REVISION][/FILE] as a row without a name of its own; UsageError for anything else."""
    found = ADDRESS.fullmatch(address)
    if not found or ".." in address.split("/"):
        raise UsageError(f"{address} is no address on the Hub", "write hf://OWNER/NAME, hf://OWNER/NAME@REVISION or .../FILE")
    name = "hub-" + hashlib.sha256(address.encode()).hexdigest()[:12]
    repo, dataset, revision, file = found["repo"], bool(found["dataset"]), found["revision"], found["file"]
    allow = () if file else ("*",) if dataset else (*(f"*{end}" for end in WEIGHTS), *(f"*{end}" for end in BESIDE))
    kind: Any = "data" if dataset else "backbone"
    return AssetRow(name=name, what=address, kind=kind, repo=repo, dataset=dataset, revision=revision, file=file, allow=allow)


def folder_of(row: AssetRow) -> Path:
    """The folder of the row's repository in the cache, as the Hub's library names it."""
    return hub_dir() / "--".join(["datasets" if row.dataset else "models", *(row.repo or "").split("/")])


def page_of(row: AssetRow) -> str:
    """The page of the row's repository."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return f"{endpoint.rstrip('/')}/{'datasets/' if row.dataset else ''}{row.repo}"


def fetch_repo(row: AssetRow, commit: str | None, progress: Progress) -> Snapshot:
    """The row's files of one commit (None: the one that its revision names now), in the cache and checked.

    MissingError where there is nothing or it is gated, IntegrityError where a file has another hash, UsageError on a full
    disk.
    """
    from huggingface_hub import HfApi, snapshot_download

    kind, endpoint = "dataset" if row.dataset else "model", os.environ.get("HF_ENDPOINT") or None
    api = HfApi(endpoint=endpoint, library_name="dmpctl")
    revision = commit or row.revision
    info = _asked(row, lambda: api.repo_info(row.repo or "", revision=revision, repo_type=kind, files_metadata=True), progress)
    found = {file.rfilename: file for file in getattr(info, "siblings", None) or () if _is_wanted(row, file.rfilename)}
    if not found or (row.file is not None and row.file not in found):
        raise MissingError(f"{page_of(row)} holds no {row.file or ' and no '.join(row.patterns)}", row.alternative)
    folder = folder_of(row) / "snapshots" / str(info.sha)
    absent = sum(file.size or 0 for name, file in found.items() if not (folder / name).is_file())
    need_room(hub_dir(), absent, row.label)
    with progress.track(f"fetching {row.label}", absent, unit="B") as task, _stoppable() as stopped:
        bar = _bar(task, stopped)
        options: dict[str, Any] = {"repo_type": kind, "revision": info.sha, "endpoint": endpoint, "tqdm_class": bar}
        options |= {"allow_patterns": list(row.patterns), "cache_dir": hub_dir(), "library_name": "dmpctl"}
        _asked(row, lambda: snapshot_download(row.repo or "", **options), progress)
    files = {name: _checked(folder / name, file) for name, file in sorted(found.items())}
    if not row.pinned:
        _name_commit(folder_of(row) / "refs" / (row.revision or "main"), str(info.sha), replace=commit is None)
    return Snapshot(folder, str(info.sha), files)


def _name_commit(ref: Path, commit: str, replace: bool) -> None:
    """Say in the Hub's cache which commit a branch is: other programs find it offline then."""
    if replace or not ref.exists():
        make_folder(ref.parent)
        write_atomic(ref, commit.encode())


def only_weights(snapshot: Snapshot, address: str) -> Path:
    """The one file of weights in a repository; UsageError where there are several to choose from."""
    for end in WEIGHTS:
        names = [name for name in snapshot.files if name.endswith(end)]
        if len(names) == 1:
            return snapshot.folder / names[0]
        if names:
            raise UsageError(f"{address} holds {len(names)} files of weights", f"name one: {address}/{names[0]}")
    raise MissingError(f"{address} holds no weights ({', '.join(WEIGHTS)})", "name another repository")


def _is_wanted(row: AssetRow, name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in row.patterns)


def _checked(path: Path, file: Any) -> Fact:
    """The hash of a file that has come; IntegrityError, and the file is removed, where the Hub knows another one."""
    if not path.is_file():
        raise MissingError(f"{path} did not come", "run the same command again")
    digest, size = sha256_of(path), path.stat().st_size
    lfs = file.lfs.sha256 if file.lfs is not None else None
    expected, actual = (lfs, digest) if lfs else (file.blob_id, git_hash(path))
    if expected not in (None, actual):
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise IntegrityError(f"{path} has hash {actual}, expected {expected}", "it was removed: run the same command again")
    return Fact(digest, size)


def git_hash(path: Path) -> str:
    """What git calls a file of these bytes."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _asked(row: AssetRow, call: Callable[[], T], progress: Progress) -> T:
    """The answer of the Hub, asked again where that may help; its failures as one sentence."""

    def once() -> T:
        try:
            return call()
        except DmpError:
            raise
        except Exception as error:
            raise said(row, error) from None

    answer: T = with_patience(row.label, once, progress)
    return answer


def said(row: AssetRow, error: Exception) -> Exception:
    """A failure of the Hub's library: Again where it may pass, else ours; what is no matter of the Hub stays what it is."""
    from huggingface_hub import errors

    page = page_of(row)
    cause: Exception = error
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        cause = error.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    token = f"open {page}, accept its terms, then set HF_TOKEN (or run hf auth login)"
    match cause:
        case errors.LocalTokenNotFoundError():
            return MissingError(f"{page} needs a token, and there is none", "set HF_TOKEN, or run hf auth login")
        case errors.GatedRepoError():
            return MissingError(f"{page} is gated: its terms must be accepted first", token)
        case errors.RevisionNotFoundError():
            return MissingError(f"{page} has no revision {row.revision or 'main'}", "name another revision")
        case errors.RepositoryNotFoundError():
            another = f"take {row.alternative} instead" if row.alternative else None
            check = "check the name, or set HF_TOKEN" + ("" if row.dataset else f"; a data set is hf://datasets/{row.repo}")
            return MissingError(f"there is no {page}, or it is private", another or check)
        case errors.EntryNotFoundError() if status == 404:
            return MissingError(f"{page} lacks a file that it lists", "run the same command again")
    if status in (401, 403):
        return MissingError(f"{page} refuses access (HTTP {status})", token)
    if isinstance(cause, OSError) and cause.errno in FULL:
        return UsageError(f"cannot write to {hub_dir()}: {cause.strerror}", "free some space, or name another --cache-dir")
    of_network = any(kind.__module__.split(".")[0] in ("httpx", "httpx2", "requests") for kind in type(cause).__mro__)
    if status in TRANSIENT or (status is None and (of_network or isinstance(cause, OSError | RuntimeError))):
        return Again(f"HTTP {status}" if status else f"the connection broke ({type(cause).__name__})")
    return MissingError(f"cannot fetch {page} (HTTP {status})", "try again later") if status else cause


@contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, too: the library's threads look at it, and would else finish their files first."""
    stopped = threading.Event()

    def stop(number: int, frame: object) -> None:
        stopped.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _bar(task: ProgressTask, stopped: threading.Event) -> type:
    """What the library takes for a tqdm: several bars count the same bytes, the furthest of them is shown."""
    lock, shown = threading.Lock(), 0

    class Bar:
        def __init__(self, *_: object, unit: str = "it", total: int | None = None, **__: object) -> None:
            self.n, self.total, self.format_dict, self._bytes = 0, total, dict[str, Any](), unit == "B"

        def update(self, n: float | None = 1) -> None:
            nonlocal shown
            if stopped.is_set():
                raise KeyboardInterrupt
            self.n += int(n or 0)
            with lock:
                if self._bytes and self.n > shown:
                    task.advance(self.n - shown)
                    shown = self.n

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None

    return Bar
