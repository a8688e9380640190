"""Tar files in WebDataset's layout: key.jpg beside key.cls, key.txt or key.json; nothing is unpacked."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from dmpctl.errors import MissingError, UsageError
from dmpctl.images.reader import Reader
from dmpctl.images.scan import EXTENSIONS, HIDDEN, reason_of
from dmpctl.tables.columns import CAPTIONS, LABELS, NO_LABEL, UNNAMED, Columns, captions_in, stamps
from dmpctl.texts import decoded
from dmpctl.words import printable

BLOCK = 512
REGULAR, LONG_NAME, PAX, PAX_GLOBAL = (b"0", b"\0", b"7"), b"L", b"x", b"g"
MOST_TEXT = 1 << 20  # bytes of a name, a label, a caption or a JSON


class BrokenTar(ValueError):
    """A tar file that ends too early, or is none."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a tar file: where its bytes lie. `regular` False: a link, a device, a sparse file, ..."""

    name: str
    offset: int
    size: int
    regular: bool


class Slice(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, path: str | Path, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = open(path, "rb", buffering=0), offset, size, 0  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self._size - self._at))
        found = os.pread(self._file.fileno(), wanted, self._offset + self._at)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()


def members(path: Path) -> Iterator[Member]:
    """The members of a tar file (ustar, GNU or pax), from its headers alone. Raises BrokenTar at the first that is none."""
    with path.open("rb") as file:
        end, position, long_name, pax = file.seek(0, os.SEEK_END), 0, b"", dict[str, bytes]()
        while position < end:
            file.seek(position)
            header = file.read(BLOCK)
            if not header.strip(b"\0"):
                return
            size, kind = _checked(header, position), header[156:157]
            if kind in REGULAR and "size" in pax:
                size = int(pax["size"]) if pax["size"].isdigit() else end
            data = position + BLOCK
            position = data + (size + BLOCK - 1) // BLOCK * BLOCK
            if data + size > end:
                raise BrokenTar(f"truncated: it ends at byte {end}, inside of a member")
            if kind in (LONG_NAME, PAX, PAX_GLOBAL):
                if size > MOST_TEXT:
                    raise BrokenTar(f"a name of {size} bytes at byte {data}")
                text = file.read(size)
                long_name = text.rstrip(b"\0") if kind == LONG_NAME else long_name
                pax = _pax(text) if kind == PAX else pax
                continue
            plain = header[:100].split(b"\0")[0]
            if header[257:263] == b"ustar\0" and header[345]:  # POSIX; GNU has other things there
                plain = header[345:500].split(b"\0")[0] + b"/" + plain
            name = os.fsdecode(pax.get("path") or long_name or plain)
            sparse = any(key.startswith("GNU.sparse") for key in pax)
            yield Member(name, data, size, kind in REGULAR and not sparse and not name.endswith("/"))
            long_name, pax = b"", {}
        if end == 0 or end % BLOCK:
            raise BrokenTar("empty" if end == 0 else f"truncated: it ends at byte {end}, inside of a block")


def _checked(header: bytes, position: int) -> int:
    """The size in a header, whose checksum must fit (POSIX 1003.1, pax: ustar interchange format)."""
    if len(header) < BLOCK:
        raise BrokenTar(f"truncated: it ends at byte {position + len(header)}, inside of a header")
    try:
        fits = int(header[148:156].strip(b" \0") or b"0", 8) == sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
        field = header[124:136]
        size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        fits, size = False, 0
    if not fits or size < 0:
        raise BrokenTar("not a tar file" if position == 0 else f"damaged at byte {position}")
    return size


def _pax(text: bytes) -> dict[str, bytes]:
    """Records "length key=value\\n" of a pax header."""
    records = {}
    while text:
        length, _, _ = text.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(text):
            break
        key, _, value = text[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value
        text = text[int(length) :]
    return records


@dataclass(slots=True)
class Sample:
    """All members with one key. `parts`: (offset, size) of each extension; `image`: its image's extension; NO_LABEL: no label.

    `wrong`: the reason why it cannot be used, None: it may be good.
    """

    shard: Path
    key: str
    wrong: str | None = None
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    image: str | None = None
    label: int = NO_LABEL

    def add(self, extension: str, member: Member) -> None:
        """Take a member in, and note what is wrong with it."""
        if extension in self.parts:
            self.wrong = f"two members called .{printable(extension)}"
        self.parts[extension] = (member.offset, member.size)
        if "." + extension in EXTENSIONS:
            if self.image not in (None, extension):
                self.wrong = "more than one image"
            self.image = extension
            if not member.regular:
                self.wrong = "not a regular file"
            elif not member.size:
                self.wrong = self.wrong or "empty"

    def text(self, extension: str) -> str:
        """The content of one member; UsageError where it is not UTF-8."""
        offset, size = self.parts[extension]
        with self.shard.open("rb") as file:
            file.seek(offset)
            return decoded(file.read(min(size, MOST_TEXT)), printable(f"{self.shard}:{self.key}.{extension}"))

    def said(self, extension: str, words: Sequence[str]) -> object:
        """The text of the member with this extension, else the JSON's value of the first of `words` there; None without."""
        if extension in self.parts:
            return self.text(extension).strip()
        try:
            document = json.loads(self.text("json")) if "json" in self.parts else {}
        except (ValueError, RecursionError):
            self.wrong = self.wrong or "its .json is none"
            return None
        return next((document[word] for word in words if word in document), None) if isinstance(document, dict) else None


class TarReader(Reader):
    """The samples of a tar file, or of a folder of them, in the order of the shards' names, then of their members.

    A label is key.cls, or "label" of key.json; a caption is key.txt, or "text" or "caption" of key.json. `columns.label` and
    `columns.caption` name another extension, or another word of the JSON. A sample without a label among others is bad; of a
    broken tar file the whole samples can be used. MissingError without a tar file, UsageError for tar files without images.
    """

    def __init__(self, path: Path, columns: Columns = UNNAMED, shards: Sequence[Path] | None = None) -> None:
        """`shards`: the tar files of the folder `path`, None: those that lie in it."""
        super().__init__(printable(path.stem), printable(str(path)))
        self._paths = [path] if path.is_file() else list(shards or sorted(path.glob("*.tar"), key=os.fsencode))
        if not self._paths:
            raise MissingError(f"there is no tar file in {self.shown}", "check --data")
        self._columns = columns
        self._samples = [sample for path in self._paths for sample in self._samples_in(path)]
        if not any(sample.image or sample.wrong for sample in self._samples):
            raise UsageError(f"no images in {self.shown}: looked for {', '.join(EXTENSIONS)}", "check --data")
        for sample in self._samples:
            value = sample.said(columns.label or "cls", (columns.label,) if columns.label else (*LABELS, "cls"))
            if value is None or sample.wrong:
                continue
            if str(value).isdecimal():
                sample.label = int(str(value))
            else:
                sample.wrong = f"its label is {printable(str(value)[:40])!r}, not a number"
        self._num_classes = max(sample.label for sample in self._samples) + 1
        self.labels_from = f"{columns.label or '.cls or .json'} of each image"
        captioned = next((index for index, sample in enumerate(self._samples) if sample.image and not sample.wrong), None)
        if captioned is not None and self.captions(captioned):
            self.captions_from = f"{columns.caption or '.txt or .json'} of each image"

    def __len__(self) -> int:
        return len(self._samples)

    def name_of(self, index: int) -> str:
        sample = self._samples[index]
        member = f":{sample.key}{'.' + sample.image if sample.image else ''}" if sample.key else ""
        return printable(f"{sample.shard.name}{member}")

    def wrong(self, index: int) -> str | None:
        sample = self._samples[index]
        return sample.wrong or ("no label" if self._num_classes and sample.label == NO_LABEL else None)

    def open(self, index: int) -> IO[bytes]:
        sample = self._samples[index]
        return io.BufferedReader(Slice(sample.shard, *sample.parts[sample.image or ""]))

    def labels(self, kept: Sequence[int]) -> tuple[Tensor, int]:
        return torch.tensor([max(self._samples[index].label, 0) for index in kept]), self._num_classes

    def captions(self, index: int) -> tuple[str, ...]:
        named = self._columns.caption
        return captions_in(self._samples[index].said(named or "txt", (named,) if named else CAPTIONS))

    def identity(self, kept: Sequence[int], digests: Sequence[bytes] | None) -> Iterator[bytes]:
        """Each sample's key, label and content; the shards' names, sizes and times of change where they were not read."""
        for row, index in enumerate(kept):
            sample, version = self._samples[index], b"" if digests is None else digests[row]
            yield b"\0" + os.fsencode(sample.key) + f"\0{sample.label}\0".encode() + version
        if digests is None:
            yield from stamps(self._paths)

    def _samples_in(self, shard: Path) -> list[Sample]:
        """The samples of one shard; damage to the shard itself is one more, without a key."""
        wanted = {"cls", "txt", "json", self._columns.label, self._columns.caption}
        samples: dict[str, Sample] = {}
        try:
            for member in members(shard):
                folder, base = os.path.split(member.name)
                stem, _, extension = base.partition(".")
                kind = "." + extension.lower()
                if base.startswith(".") or not extension or (not member.regular and kind not in EXTENSIONS):
                    self.unused.setdefault(HIDDEN if base.startswith(".") else "other members", []).append(
                        f"{shard.name}:{member.name}"
                    )
                    continue
                if kind not in EXTENSIONS and kind[1:] not in wanted:
                    self.unused.setdefault(kind, []).append(f"{shard.name}:{member.name}")
                key = os.path.join(folder, stem)
                samples.setdefault(key, Sample(shard, key)).add(extension.lower(), member)
        except (BrokenTar, OSError) as error:
            samples["\0"] = Sample(shard, "", wrong=reason_of(error))
        for sample in samples.values():
            if sample.key and not sample.image and not sample.wrong:
                sample.wrong = "no image among its members"
            sample.parts = {name: part for name, part in sample.parts.items() if name in wanted or name == sample.image}
        return list(samples.values())
