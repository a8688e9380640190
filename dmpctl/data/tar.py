"""Tar files in WebDataset's layout as a source: key.jpg beside key.cls, key.txt or key.json; nothing is unpacked."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from dmpctl.data.columns import CAPTIONS, LABELS, NO_LABEL, Columns, captions_in
from dmpctl.data.parquet import stamps
from dmpctl.errors import MissingError, UsageError
from dmpctl.images.scan import EXTENSIONS, printable, reason_of
from dmpctl.images.stored import Labels, OnBad, StoredImages

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


@dataclass(slots=True)
class Sample:
    """All members with one key. `parts`: (offset, size) of each extension."""

    shard: int
    key: str
    wrong: str | None = None
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    image: str | None = None


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


class Samples:
    """The samples of some tar files as a store, in the order of the shards' names, then of their members.

    A label is key.cls, or "label" of key.json; a caption is key.txt, or "text" or "caption" of key.json. `columns.label` and
    `columns.caption` name another extension, or another word of the JSON. A sample without a label among others is bad.
    """

    def __init__(self, paths: Sequence[Path], shown: str, columns: Columns) -> None:
        self.shown, self._paths, self._columns = shown, paths, columns
        self._samples: list[Sample] = []
        for number, path in enumerate(paths):
            self._samples += self._indexed(number, path)
        if not any(sample.image for sample in self._samples) and not any(sample.wrong for sample in self._samples):
            raise UsageError(f"no images in {shown}: looked for {', '.join(EXTENSIONS)}", "check --data")
        self._numbers = [self._number(sample) for sample in self._samples]
        self._labelled = any(number > NO_LABEL for number in self._numbers)

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        sample = self._samples[index]
        member = f":{sample.key}{'.' + sample.image if sample.image else ''}" if sample.key else ""
        return printable(f"{self._paths[sample.shard].name}{member}")

    def wrong(self, index: int) -> str | None:
        sample = self._samples[index]
        unlabelled = "no label" if self._labelled and self._numbers[index] <= NO_LABEL else None
        return sample.wrong or unlabelled

    def open(self, index: int) -> IO[bytes]:
        sample = self._samples[index]
        return io.BufferedReader(Slice(self._paths[sample.shard], *sample.parts[sample.image or ""]))

    def looked_at(self, good: Sequence[int]) -> Sequence[int]:
        """All of them, however many there are."""
        return good

    def labels(self, kept: Sequence[int]) -> Labels:
        count = max((self._numbers[index] for index in range(len(self))), default=NO_LABEL) + 1
        return Labels(torch.tensor([max(self._numbers[index], 0) for index in kept]), count)

    def label(self, index: int) -> int:
        """Not asked for: `labels` knows all of them."""
        return self._numbers[index]

    def captions(self, index: int) -> tuple[str, ...]:
        sample = self._samples[index]
        extension = self._columns.caption or "txt"
        if extension in sample.parts:
            return (self._text(sample, extension).strip(),)
        words = (self._columns.caption,) if self._columns.caption else CAPTIONS
        document = self._document(sample)
        return next((captions_in(document[word]) for word in words if word in document), ())

    def identity(self, kept: Sequence[int], digests: Sequence[bytes] | None) -> Iterator[bytes]:
        """Each sample's key, label and content; the shards' names, sizes and times of change where they were not read."""
        for row, index in enumerate(kept):
            version = b"" if digests is None else digests[row]
            yield b"\0" + os.fsencode(self._samples[index].key) + f"\0{self._numbers[index]}\0".encode() + version
        if digests is None:
            yield from stamps(self._paths)

    def _indexed(self, number: int, path: Path) -> list[Sample]:
        """The samples of one shard; what is wrong with the shard itself is one more, without a key."""
        samples: dict[str, Sample] = {}
        try:
            for member in members(path):
                folder, base = os.path.split(member.name)
                stem, _, extension = base.partition(".")
                if base.startswith(".") or not extension or (not member.regular and "." + extension.lower() not in EXTENSIONS):
                    continue
                key = os.path.join(folder, stem)
                sample = samples.setdefault(key, Sample(number, key))
                _add(sample, extension.lower(), member)
        except (BrokenTar, OSError) as error:
            samples["\0"] = Sample(number, "", wrong=reason_of(error))
        wanted = {"cls", "txt", "json", self._columns.label, self._columns.caption}
        for sample in samples.values():
            if sample.key and not sample.image and not sample.wrong:
                sample.wrong = "no image among its members"
            sample.parts = {name: part for name, part in sample.parts.items() if name in wanted or name == sample.image}
        return list(samples.values())

    def _number(self, sample: Sample) -> int:
        """The label of a sample, NO_LABEL without."""
        extension = self._columns.label or "cls"
        value: object
        if extension in sample.parts:
            value = self._text(sample, extension).strip()
        else:
            document = self._document(sample) if "json" in sample.parts else {}
            words = (self._columns.label,) if self._columns.label else (*LABELS, "cls")
            value = next((document[word] for word in words if word in document), None)
        if value is None or sample.wrong:
            return NO_LABEL
        if not str(value).isdecimal():
            sample.wrong = f"its label is {printable(str(value)[:40])!r}, not a number"
            return NO_LABEL
        return int(str(value))

    def _text(self, sample: Sample, extension: str) -> str:
        offset, size = sample.parts[extension]
        with self._paths[sample.shard].open("rb") as file:
            file.seek(offset)
            return file.read(min(size, MOST_TEXT)).decode("utf-8", "replace")

    def _document(self, sample: Sample) -> dict[str, object]:
        """The JSON of a sample, {} if there is none or it is no object."""
        try:
            value = json.loads(self._text(sample, "json")) if "json" in sample.parts else {}
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}


def _add(sample: Sample, extension: str, member: Member) -> None:
    if extension in sample.parts:
        sample.wrong = f"two members called .{printable(extension)}"
    sample.parts[extension] = (member.offset, member.size)
    if "." + extension in EXTENSIONS:
        if sample.image not in (None, extension):
            sample.wrong = "more than one image"
        sample.image = extension
        if not member.regular:
            sample.wrong = "not a regular file"
        elif not member.size:
            sample.wrong = sample.wrong or "empty"


class TarImages(StoredImages):
    """A tar file, or a folder of them, in WebDataset's layout, read where they lie.

    `size`, `channels` and `on_bad` as for StoredImages. Raises UsageError for tar files without images, IntegrityError for
    one that is broken (under "skip" its whole samples are used), and what StoredImages raises.
    """

    def __init__(
        self,
        path: Path,
        size: int | None = None,
        channels: int | None = None,
        on_bad: OnBad = "fail",
        columns: Columns | None = None,
    ) -> None:
        shown = printable(str(path))
        paths = [path] if path.is_file() else sorted(path.glob("*.tar"), key=os.fsencode)
        if not paths:
            raise MissingError(f"there is no tar file in {shown}", "check --data")
        super().__init__(Samples(paths, shown, columns or Columns()), printable(path.stem), size, channels, on_bad)
