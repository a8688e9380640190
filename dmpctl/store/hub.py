"""Repositories of the Hugging Face Hub: one commit of them, whole, and every file checked against the Hub's own hash."""

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import FULL, make_folder, sha256_of, write_atomic
from dmpctl.processes.stop import SIGNALS, handled_by
from dmpctl.settings.assets import AssetRow
from dmpctl.store.addresses import HubAddress
from dmpctl.store.cache import Fact, hub_dir, need_room
from dmpctl.store.https import TRANSIENT, Again, with_patience
from dmpctl.store.registry import address_of
from dmpctl.types import Progress, ProgressTask

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

T = TypeVar("T")


def fetch_repo(row: AssetRow, commit: str | None, progress: Progress) -> tuple[dict[str, Fact], str]:
    """Fetches the row's files of one commit (None: that of its revision now) into the cache; returns their facts and the commit.

    MissingError where there is nothing or it is gated, IntegrityError where a file has another hash, UsageError on a full
    disk.
    """
    from huggingface_hub import HfApi, snapshot_download

    at, endpoint = address_of(row), os.environ.get("HF_ENDPOINT") or None
    kind, revision = "dataset" if at.dataset else "model", commit or at.revision
    api = HfApi(endpoint=endpoint, library_name="dmpctl")
    info = _asked(row, lambda: api.repo_info(at.repo, revision=revision, repo_type=kind, files_metadata=True), progress)
    listed = {file.rfilename: file for file in getattr(info, "siblings", None) or ()}
    found = {name: file for name, file in sorted(listed.items()) if any(fnmatch(name, pattern) for pattern in row.patterns)}
    if not found or (row.file is not None and row.file not in found):
        raise MissingError(f"{at.page} holds no {row.file or ' and no '.join(row.patterns)}", row.alternative)
    sha = str(info.sha)
    folder = snapshot_of(at, sha)
    absent = sum(file.size or 0 for name, file in found.items() if not (folder / name).is_file())
    need_room(hub_dir(), absent, row.label)
    with progress.track(f"fetching {row.label}", absent, unit="B") as task, _stoppable() as stopped:
        bar = _bar(task, stopped)

        def download() -> str:
            return snapshot_download(
                at.repo,
                repo_type=kind,
                revision=sha,
                cache_dir=hub_dir(),
                allow_patterns=list(row.patterns),
                endpoint=endpoint,
                library_name="dmpctl",
                tqdm_class=bar,
            )

        _asked(row, download, progress)
    files = {name: _checked(folder / name, file) for name, file in found.items()}
    ref = hub_dir() / at.folder / "refs" / (at.revision or "main")
    if not row.pinned and (commit is None or not ref.exists()):  # which commit a branch is: others find it offline then
        make_folder(ref.parent)
        write_atomic(ref, sha.encode())
    return files, sha


def snapshot_of(at: HubAddress, commit: str | None) -> Path:
    """The folder of one commit of a repository in the cache."""
    return hub_dir() / at.folder / "snapshots" / str(commit)


def _checked(path: Path, file: "RepoSibling") -> Fact:
    """The hash of a file that has come; IntegrityError, and the file is removed, where the Hub knows another one."""
    if not path.is_file():
        raise MissingError(f"{path} did not come", "run the same command again")
    digest, size = sha256_of(path), path.stat().st_size
    expected, actual = (file.lfs.sha256, digest) if file.lfs is not None else (file.blob_id, _git_hash(path))
    if expected not in (None, actual):
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise IntegrityError(f"{path} has hash {actual}, expected {expected}", "it was removed: run the same command again")
    return Fact(sha256=digest, size=size)


def _git_hash(path: Path) -> str:
    """Returns the hash that git gives to a file of these bytes."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _asked(row: AssetRow, call: Callable[[], T], progress: Progress) -> T:
    """The answer of the Hub, asked again where that may help; its failures as one sentence."""
    instead = f"take {row.alternative} instead" if row.alternative else None

    def once() -> T:
        try:
            return call()
        except Exception as error:
            raise failure(address_of(row), error, instead) from None

    return with_patience(row.label, once, progress)


def failure(
    at: HubAddress, error: Exception, instead: str | None = None, shown: str | None = None, again: str = "run the same command"
) -> Exception:
    """Returns our sentence for an error of the Hub's libraries, in downloads, in data and in `push`.

    Again where it may pass; `error` itself where it is no matter of the Hub. `instead`: what else there is, None: nothing known.
    `shown`: what messages call it, None: its page. `again`: the command that fetches it.
    """
    from huggingface_hub import errors

    cause: Exception = error
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        cause = error.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    page, shown, more = at.page, shown or at.page, f"; {instead}" if instead else ""
    token = f"open {page}, accept its terms, then set HF_TOKEN (or run hf auth login){more}"
    match cause:
        case errors.LocalTokenNotFoundError():
            return MissingError(f"{page} needs a token, and there is none", "set HF_TOKEN, or run hf auth login")
        case errors.GatedRepoError():
            return MissingError(f"{shown} is gated: its terms must be accepted first", token)
        case errors.RevisionNotFoundError():
            return MissingError(f"{page} has no revision {at.revision or 'main'}", "name another revision")
        case errors.RepositoryNotFoundError():
            check = "check the name, or set HF_TOKEN" + ("" if at.dataset else f"; a data set is hf://datasets/{at.repo}")
            return MissingError(f"there is no {page}, or it is private", instead or check)
        case errors.EntryNotFoundError() if status == 404:
            return MissingError(f"{page} lacks a file that it lists", "run the same command again")
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            return MissingError(f"{shown} is not in the cache, and the Hub is not reached", f"fetch it: {again}")
    if status in (401, 403):
        return MissingError(f"{page} refuses access (HTTP {status})", token)
    if isinstance(cause, OSError) and cause.errno in FULL:
        return UsageError(f"cannot write to {hub_dir()}: {cause.strerror}", "free some space, or name another --cache-dir")
    if status in TRANSIENT or (status is None and (of_network(cause) or isinstance(cause, OSError | RuntimeError))):
        return Again(f"HTTP {status}" if status else f"the connection broke ({type(cause).__name__})")
    return MissingError(f"cannot fetch {page} (HTTP {status})", "try again later") if status else cause


def of_network(error: Exception) -> bool:
    """Whether a library between here and the Hub says that it was not reached; an answer of the Hub is none."""
    from huggingface_hub.errors import HfHubHTTPError

    libraries = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    reached = isinstance(error, HfHubHTTPError)
    return not reached and (isinstance(error, ConnectionError) or bool(libraries & {"httpx", "httpx2", "requests"}))


@contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """A signal sets the event, too: the library's threads look at it, and would else finish their files first."""
    stopped = threading.Event()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()
        if callable(handler := before[signal.Signals(number)]):
            handler(number, frame)
        raise KeyboardInterrupt

    with handled_by(stop):
        yield stopped


def _bar(task: ProgressTask, stopped: threading.Event) -> type:
    """Returns a tqdm as far as the library uses one: several bars count the same bytes, the furthest of them is shown."""
    lock, shown = threading.Lock(), 0

    class Bar:
        def __init__(self, *_: object, unit: str = "it", total: int | None = None, **__: object) -> None:
            self.n, self.total, self.format_dict, self._bytes = 0, total, dict[str, object](), unit == "B"

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
