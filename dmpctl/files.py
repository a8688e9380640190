"""Files that are either the old one or the new one, never half of each; and their hashes. Nothing is pickled."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmpctl.errors import IntegrityError, MissingError, UsageError

if TYPE_CHECKING:
    from torch import Tensor


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Wraps code that writes `path`: a full disk, or a place that cannot be written to, becomes a UsageError."""
    try:
        yield
    except OSError as error:
        hint = "free some space: what was finished before is still good" if error.errno in FULL else "name another place"
        raise UsageError(f"cannot write to {path}: {error.strerror or error}", hint) from None


def amount(size: float) -> str:
    """Returns bytes for people: `95.6 MB`, powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def run_of(path: Path) -> Path:
    """Returns the run or checkpoint whose file `path` is, such as RUN/patch.safetensors; any other path as it is."""
    own = ("patch.safetensors", "patch.json", "config.json", "backbone.json")
    here = (path.parent / "patch.json").is_file()  # else the run of its backbone
    named = path.name in own or (path.name == "backbone.safetensors" and not here)
    inside = here or (path.parent / "backbone.json").is_file()
    return path.parent if named and inside and path.is_file() else path


def make_folder(path: Path) -> Path:
    """Returns the folder, made if it is not there; UsageError where it cannot be made."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def locked(path: Path, wait: bool = True, busy: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold the lock file `path`, which the system gives up when a process dies; yields whether it is held.

    Without `wait` it may not be. `busy` is called before waiting for another process; None: nothing is said.
    UsageError where the file cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    with writing(path), suppress(Timeout):
        lock.acquire(blocking=False)
    if wait and not lock.is_locked:
        if busy is not None:
            busy()
        lock.acquire()
    try:
        yield lock.is_locked
    finally:
        lock.release()


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_bytes(data: bytes) -> str:
    """Returns the sha256 of bytes, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_json(value: Mapping[str, object]) -> str:
    """Returns the sha256 of a JSON object, whatever the order of its keys."""
    return sha256_of_bytes(json.dumps(value, sort_keys=True).encode())


def fsync(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `path` so that a crash leaves the old file or the new one; UsageError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink()
        fsync(path.parent)


def json_to_bytes(value: Mapping[str, object]) -> bytes:
    """Returns readable JSON, its keys in their order; ValueError for NaN or infinity, which JSON has not."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Atomically write JSON."""
    write_atomic(path, json_to_bytes(value))


def read_json(path: Path, schema_version: int | None = None) -> dict[str, Any]:
    """Read a JSON object; `schema_version`: the newest this code reads, None for files without one.

    Raises MissingError if the file is not there, IntegrityError if it is not such an object or is newer.
    """
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise MissingError(f"{path} is not there") from None
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{path} is not valid JSON ({error})") from None
    return json_object(text, str(path), schema_version)


def json_object(text: str, what: str, schema_version: int | None = None) -> dict[str, Any]:
    """Parse a JSON object, which an error calls `what`. IntegrityError if it is none, or newer than `schema_version`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise IntegrityError(f"{what} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise IntegrityError(f"{what} should hold a JSON object, found {type(value).__name__}")
    found = value.get("schema_version")
    if schema_version is not None and not (isinstance(found, int) and 1 <= found <= schema_version):
        raise IntegrityError(f"{what} has schema_version {found}, this dmpctl reads up to {schema_version}", "upgrade dmpctl")
    return value


def tensors_to_bytes(tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> bytes:
    """Returns safetensors bytes with a sorted header: equal content gives equal bytes (and so equal hashes)."""
    from safetensors.torch import save

    data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata=dict(metadata or {}))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if metadata:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)
    return len(packed).to_bytes(8, "little") + packed + data[8 + length :]


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> str:
    """Atomically write a safetensors file; returns its sha256."""
    data = tensors_to_bytes(tensors, metadata)
    write_atomic(path, data)
    return sha256_of_bytes(data)


def tensor_names(path: Path) -> set[str]:
    """Returns the names of the tensors in a safetensors file; reads its header alone. Raises as `read_tensors`."""
    with _safetensors(path) as file:
        return set(file.keys())


def read_tensors(path: Path) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Returns tensors (on the CPU) and metadata of a safetensors file.

    Raises MissingError if it is not there, IntegrityError if it is corrupt.
    """
    with _safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:  # safe_open, whose methods have no types
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MissingError(f"{path} is not there")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path} is not a readable safetensors file ({error})") from None
