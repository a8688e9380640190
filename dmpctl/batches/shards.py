"""Items kept on disk in memory-mapped safetensors shards, with a manifest: how latents and text conditions are cached.

`<root>/<kind>/<sha256 of the key>/` holds manifest.json, shard-00000.safetensors, ... and two empty lock files. A shard counts
once the manifest names it. Its sha256 is compared when it is opened (about 1.5 GB/s on one core), and again when it has been
touched. A shard that fails is missing, never read.
"""

import fcntl
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmpctl.errors import Damaged, IntegrityError, MissingError, UsageError
from dmpctl.files import NO_LOCKS, locked, read_json, sha256_of, sha256_of_json, write_json, write_tensors, writing

SCHEMA_VERSION = 1
MOST_ITEMS, MOST_BYTES = 4096, 2**26  # of one shard: as much as an interruption can cost, and as is held in memory


def per_shard_of(item_bytes: int) -> int:
    """Items in a shard of at most MOST_ITEMS and about MOST_BYTES."""
    return max(1, min(MOST_ITEMS, MOST_BYTES // item_bytes))


class ShardEntry(BaseModel, frozen=True):
    """One shard's file as the manifest knows it."""

    sha256: str
    bytes: int


Entries = dict[int, ShardEntry]  # by the number of the shard
ENTRIES = TypeAdapter(Entries)
Scalar = str | int | float | bool


class Shards:
    """`count` items of one key, `per_shard` in each file but the last. `about` is for people, and no part of the key.

    Several processes may write disjoint shards at once (see `Claims`). The folder is made by who fills it.
    """

    def __init__(
        self, root: Path, kind: str, key: Mapping[str, Scalar], count: int, per_shard: int, about: Mapping[str, Scalar]
    ) -> None:
        self.key: dict[str, Scalar] = {"schema_version": SCHEMA_VERSION, "kind": kind, **key}
        self.key |= {"count": count, "per_shard": per_shard}
        self.digest = sha256_of_json(self.key)
        self.folder = root / kind / self.digest
        self.count, self.per_shard, self.about = count, per_shard, dict(about)
        self.damaged: set[str] = set()  # names of files that were found so
        self._seen: dict[int, tuple[ShardEntry, int]] = {}  # shards that were hashed, with their time of change

    def __len__(self) -> int:
        return -(-self.count // self.per_shard)

    def items(self, shard: int) -> range:
        """The items that a shard holds."""
        return range(shard * self.per_shard, min(self.count, (shard + 1) * self.per_shard))

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def finished(self) -> set[int]:
        """The shards that are there and whole; each is hashed once. What is not is forgotten, and stands in `damaged`.

        IntegrityError if the manifest is of another key.
        """
        good, bad = set[int](), Entries()
        for shard, entry in self._entries().items():
            path = self.path(shard)
            try:
                status = path.stat()
            except OSError:
                continue
            seen = (entry, status.st_mtime_ns)
            if status.st_size == entry.bytes and (self._seen.get(shard) == seen or sha256_of(path) == entry.sha256):
                self._seen[shard] = seen
                good.add(shard)
            else:
                bad[shard] = entry
                self.damaged.add(path.name)
        if bad:
            with suppress(UsageError):  # a cache that can only be read finds it again the next time
                self._record({}, bad)
        return good

    def write(self, shard: int, tensors: Mapping[str, Tensor]) -> None:
        """Put a shard in place and into the manifest; for the process that has claimed it. UsageError on a full disk."""
        path = self.path(shard)
        self._sweep(path.name)
        digest = write_tensors(path, tensors, {"key": self.digest, "shard": str(shard)})
        status = path.stat()
        entry = ShardEntry(sha256=digest, bytes=status.st_size)
        self._seen[shard] = entry, status.st_mtime_ns
        self._record({shard: entry}, {})

    def tensors(self) -> list[dict[str, Tensor]]:
        """The tensors of every shard, mapped, not read; IntegrityError where one is missing or of another key."""
        missing = sorted(set(range(len(self))) - self.finished())
        if missing:
            raise IntegrityError(f"{self.folder} lacks {self.path(missing[0]).name} ({len(missing)} of {len(self)} shards)")
        return [self._mapped(shard) for shard in range(len(self))]

    def _mapped(self, shard: int) -> dict[str, Tensor]:
        path = self.path(shard)
        try:
            with safe_open(path, "pt") as file:
                if not {"key": self.digest, "shard": str(shard)}.items() <= (file.metadata() or {}).items():
                    raise IntegrityError(f"{path} is another shard than its name says", f"delete {self.folder}")
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: torch cannot map it
            raise IntegrityError(f"{path} cannot be read ({error})", f"delete {self.folder}") from None

    def _entries(self) -> Entries:
        """The shards that the manifest names; none if it is not there, or is damaged."""
        try:
            manifest = read_json(self.folder / "manifest.json", SCHEMA_VERSION)
            entries = ENTRIES.validate_python(manifest.get("shards"))
        except MissingError:
            return {}
        except (Damaged, ValidationError):
            self.damaged.add("manifest.json")
            return {}
        if manifest.get("key") != self.key:
            raise IntegrityError(f"{self.folder} holds something else than its name says", "delete that folder")
        return entries

    def _record(self, new: Entries, bad: Entries) -> None:
        """Add entries to the manifest, and drop those of `bad` that are still what they were."""
        with locked(self.folder / ".manifest.lock"):  # one process at a time writes the manifest
            kept = {shard: entry for shard, entry in self._entries().items() if bad.get(shard) != entry}
            entries = {str(shard): entry.model_dump() for shard, entry in sorted((kept | new).items())}
            self._sweep("manifest.json")
            value = {"schema_version": SCHEMA_VERSION, "key": self.key, "about": self.about, "shards": entries}
            write_json(self.folder / "manifest.json", value)

    def _sweep(self, name: str) -> None:
        """Take away what a killed process has left of a file; whoever may write it now holds its lock."""
        for path in self.folder.glob(f".{name}.*"):
            path.unlink(missing_ok=True)


class Claims:
    """The shards that this process makes: a lock on one byte each, which the system takes back when a process dies.

    One instance in a process at a time: such locks belong to the process, and closing the file gives them all up.
    """

    # not files.locked: that needs a file for each shard, and a shared disk may have thousands

    def __init__(self, shards: Shards) -> None:
        self._path = shards.folder / ".shards.lock"

    def __enter__(self) -> "Claims":
        with writing(self._path):
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._handle)

    def take(self, shard: int) -> bool:
        """Whether the shard is ours now; False where another process has it."""
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
        except OSError as error:
            return error.errno in NO_LOCKS  # then two may make the same shard: each is put in place by one rename
        return True

    def give_back(self, shard: int) -> None:
        with suppress(OSError):  # there are no locks here
            fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, shard)


class Rows:
    """Rows that lie in several tensors [n, ...], `per` in each but the last, read as if they were one."""

    def __init__(self, parts: Sequence[Tensor], per: int) -> None:
        self._parts, self._per = parts, per

    def gather(self, rows: Tensor) -> Tensor:
        """[B, ...] of int64 [B] that are not negative: one copy, out of the mapped file."""
        places = zip((rows // self._per).tolist(), (rows % self._per).tolist(), strict=True)
        return torch.stack([self._parts[part][row] for part, row in places])
