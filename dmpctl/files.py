"""Files that are either the old one or the new one, never half of each; and their seals. Nothing is pickled.

Every JSON record, and every file of tensors that describes itself, holds a seal: the sha256 of all the rest of it. Whoever reads
one through `read_json` or `read_tensors` is told of a change (Damaged). Files of others, and older ones, have none.
"""

import errno
import hashlib
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dmpctl.errors import Damaged, IntegrityError, MissingError, UsageError
from dmpctl.words import redacted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)  # of a file system that has none
SEAL = "sealed"  # key of a record, and of the metadata of tensors
LARGEST_JSON = 2**28  # bytes of a record
LONGEST_NUMBER = 24  # characters of a whole number
BY_HAND = 'bring it back from a copy; if you changed it yourself, take its "sealed" away'


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

    Without `wait` it may not be. `busy` is called before waiting for another process; None: nothing is said. On a file system
    that has no locks, a file beside it stands for one (`path`.held); one that a dead process of this machine left is taken over.
    UsageError where the file cannot be made.
    """
    from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

    lock: BaseFileLock = FileLock(path)
    with writing(path), suppress(Timeout), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # filelock's, where it does the same by itself
        try:
            lock.acquire(blocking=False)
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            lock = SoftFileLock(path.with_name(f"{path.name}.held"))
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


def plain_json(value: Mapping[str, object]) -> dict[str, Any]:
    """Returns an object as its file has it: JSON's own types, texts without secrets. ValueError for NaN or infinity."""
    found = _without_secrets(json.loads(json.dumps(value, allow_nan=False)))
    return {key: item for key, item in found.items() if key != SEAL}


def _without_secrets(value: Any) -> Any:  # what JSON gives
    match value:
        case dict():
            return {redacted(key): _without_secrets(item) for key, item in value.items()}
        case list():
            return [_without_secrets(item) for item in value]
    return redacted(value) if isinstance(value, str) else value


def json_to_bytes(value: Mapping[str, object]) -> bytes:
    """Returns readable JSON, its keys in their order, and its seal; ValueError for NaN or infinity, which JSON has not."""
    plain = plain_json(value)
    return (json.dumps(plain | {SEAL: sha256_of_json(plain)}, indent=1) + "\n").encode()


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Atomically write JSON, sealed and without secrets."""
    write_atomic(path, json_to_bytes(value))


def read_json(path: Path, schema_version: int | None = None) -> dict[str, Any]:
    """Read a JSON object; `schema_version`: the newest this code reads, None for files without one.

    Raises MissingError if the file is not there, Damaged if it is not such an object or not what was written,
    IntegrityError if it is newer or too large.
    """
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise IntegrityError(f"{path} is {amount(size)} large, which no record is")
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise MissingError(f"{path} is not there") from None
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise Damaged(f"{path} is not valid JSON ({error})", "bring it back from a copy") from None
    return json_object(text, str(path), schema_version)


def parse_json(text: str | bytes, what: str) -> Any:
    """Parse JSON, which an error calls `what`. Damaged where it is none, too deep, or has numbers that nothing here can hold."""
    try:
        return json.loads(text, parse_int=_whole_number, parse_float=_number, parse_constant=_number)
    except (ValueError, RecursionError) as error:
        why = "it is too deep" if isinstance(error, RecursionError) else error
        raise Damaged(f"{what} is not valid JSON ({why})", "bring it back from a copy") from None


def _whole_number(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:LONGEST_NUMBER]} is not finite")
    return number


def json_object(text: str, what: str, schema_version: int | None = None) -> dict[str, Any]:
    """Parse a JSON object, which an error calls `what`. Raises as `read_json`."""
    value = parse_json(text, what)
    if not isinstance(value, dict):
        raise Damaged(f"{what} should hold a JSON object, found {type(value).__name__}", "bring it back from a copy")
    found, seal = value.get("schema_version"), value.pop(SEAL, None)
    if schema_version is not None and not (isinstance(found, int) and 1 <= found <= schema_version):
        newer = isinstance(found, int) and found > schema_version
        kind, hint = (IntegrityError, "upgrade dmpctl") if newer else (Damaged, BY_HAND)
        raise kind(f"{what} has schema_version {found}, this dmpctl reads up to {schema_version}", hint)
    if seal is not None and seal != sha256_of_json(value):
        raise Damaged(f"{what} is damaged: it is not what was written", BY_HAND)
    return value


def put_aside(path: Path) -> Path:
    """Rename a damaged file or folder, so that it counts no more and can be looked at; returns its new path, NAME.damaged."""
    names = (path.with_name(f"{path.name}.damaged{f'-{n}' if n else ''}") for n in itertools.count())
    aside = next(name for name in names if not name.exists())
    with writing(path):
        path.rename(aside)
    return aside


def array_header(stream: IO[bytes], what: str) -> tuple[tuple[int, ...], bool, "np.dtype[Any]"]:
    """Shape, whether columns come first, and dtype of a npy file, whose numbers follow in `stream`.

    Damaged where it cannot be read; IntegrityError for objects, which would have to be unpickled.
    """
    from numpy.lib import format as npy

    try:
        version = npy.read_magic(stream)
        shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(stream)
    except (ValueError, TypeError, SyntaxError, LookupError, ArithmeticError, RecursionError, MemoryError) as error:
        raise Damaged(f"{what} holds an array that cannot be read ({error})", "copy the file again") from None
    if dtype.hasobject:
        raise IntegrityError(f"{what} holds pickled objects, which are never loaded")
    return shape, fortran, dtype


def map_array(path: Path, dtype: "type[np.generic]", rows: int) -> "NDArray[Any]":
    """The array of a npy file, `rows` of this `dtype`, as a memory map that can be written to.

    Damaged where the file holds another, or fewer or more bytes than it says: numpy would make a short one longer, with zeros.
    """
    import numpy as np

    with path.open("rb") as file:
        shape, fortran, found = array_header(file, str(path))
        start, size = file.tell(), file.seek(0, os.SEEK_END)
    if found != dtype or shape[:1] != (rows,) or fortran or size != start + math.prod(shape) * found.itemsize:
        raise Damaged(f"{path} is damaged: {amount(size)} for {found} {list(shape)}", "delete it")
    return np.memmap(path, dtype, "r+", start, shape)


def tensors_to_bytes(tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> bytes:
    """Returns safetensors bytes with a sorted header: equal content gives equal bytes (and so equal hashes).

    With `metadata` (texts without secrets) it is sealed; without, its sha256 stands in a record beside it.
    """
    from safetensors.torch import save

    about = {key: redacted(value) for key, value in (metadata or {}).items()}
    data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata=about)
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), memoryview(data)[8 + length :]
    if about:
        header["__metadata__"] = about
        header["__metadata__"] = dict(sorted({**about, SEAL: _seal_of(header, [body])}.items()))
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)
    return b"".join((len(packed).to_bytes(8, "little"), packed, body))


def _seal_of(header: Mapping[str, object], body: Iterable[bytes | memoryview]) -> str:
    """The sha256 of a safetensors file without its seal."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for part in body:
        digest.update(part)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> str:
    """Atomically write a safetensors file; returns its sha256."""
    data = tensors_to_bytes(tensors, metadata)
    write_atomic(path, data)
    return sha256_of_bytes(data)


def tensor_names(path: Path) -> set[str]:
    """Returns the names of the tensors in a safetensors file; reads its header alone. Raises as `read_tensors`."""
    with _safetensors(path) as file:
        return set(file.keys())


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file; no tensor is read. IntegrityError for what is none."""
    with _safetensors(path) as file:
        return file.metadata() or {}


def read_tensors(path: Path) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Returns tensors (on the CPU) and metadata of a safetensors file, without its seal.

    Raises MissingError if it is not there, Damaged if it is corrupt or not what was written.
    """
    with _safetensors(path) as file:
        metadata = dict(file.metadata() or {})
        seal = metadata.pop(SEAL, None)
        if seal is not None and (found := _seal_in(path)) != seal:
            raise Damaged(f"{path} is damaged: sha256 {found}, expected {seal}", "make it again, or copy it again")
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def _seal_in(path: Path) -> str:
    """The seal that a file of tensors should have."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))  # safetensors has looked at it
        header["__metadata__"].pop(SEAL)
        return _seal_of(header, iter(lambda: file.read(2**22), b""))


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:  # safe_open, whose methods have no types
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MissingError(f"{path} is not there")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path} is not a readable safetensors file ({error})", "make it again, or copy it again") from None
