"""A folder of images as a source: every bad file is named, and none is ever replaced by another image.

A small folder (HELD_FILES, HELD_BYTES) is decoded as a whole at the start and held in memory. A larger one has its headers
read at the start and is decoded as it is used: a file that is broken behind its header then stops the run, by name.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor

from dmpctl.data.scan import BROKEN, EXTENSIONS, FORMATS, Entry, Header, attempt, printable, read_header, reason_of, scan
from dmpctl.data.transforms import to_square
from dmpctl.errors import IntegrityError, MissingError, UsageError

HELD_FILES, HELD_BYTES = 20_000, 2**30
NAMED = 3  # bad files that an error names

T = TypeVar("T")
Bad = tuple[str, str]  # a file, relative and printable, and what is wrong with it


class ImageFolder:
    """PNG, JPEG, WebP and BMP files under a folder; its first-level sub-folders are classes if every image lies in one.

    An image becomes uint8 [C, size, size] by `transforms.to_square`; one whose short side is under size / 2 is bad.
    `size` None: the side that all images share. `channels` None: 1 if all files are grey, else 3. Bad files raise
    IntegrityError under `on_bad` "fail"; under "skip" they are left out and listed in `bad`.
    Raises MissingError if there is no such folder, UsageError if it has no images or no common size.
    """

    mirror = True

    def __init__(
        self,
        path: str | Path,
        size: int | None = None,
        channels: int | None = None,
        on_bad: Literal["fail", "skip"] = "fail",
    ) -> None:
        shown = printable(str(path))
        entries = scan(_folder(path))
        if not entries:
            raise UsageError(f"no images in {shown}: looked for {', '.join(EXTENSIONS)}", "check --data")
        self._top = os.path.realpath(path)
        self.name = printable(os.path.basename(self._top))
        self.bad: list[Bad] = []
        good, _ = self._sort_out(entries, [entry.wrong or entry for entry in entries])
        good, headers = self._sort_out(good, attempt(read_header, [self._path(entry) for entry in good]))
        self._size = size or (common_side(headers, shown) if headers else 1)
        self._channels = channels or (1 if all(header.grey for header in headers) else 3)
        good, _ = self._sort_out(good, [too_small(header, self._size) or header for header in headers])
        good, self._held, versions = self._decoded(good)
        self.bad.sort()
        if self.bad and (on_bad == "fail" or not good):
            raise refused(self.bad, len(entries), shown)
        self._entries = good
        self.classes = classes_of([entry.name for entry in entries], [entry.name for entry in good])
        number = {name: label for label, name in enumerate(self.classes)}
        self._labels = torch.tensor([number.get(entry.name.split("/")[0], 0) for entry in good])
        self.fingerprint = fingerprint_of(good, versions, self.classes, (self._channels, self._size))

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0 if the images do not lie in class folders."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self._entries)

    def item(self, index: int) -> tuple[Tensor, int]:
        """Image uint8 [C, S, S] and label (0 without classes). Raises IntegrityError if the file can no longer be decoded."""
        label = int(self._labels[index])
        if self._held is not None:
            return self._held[index], label
        entry = self._entries[index]
        try:
            return read_image(self._path(entry), self._size, self._channels), label
        except BROKEN as error:
            name = printable(self._path(entry))
            raise IntegrityError(f"{name} cannot be decoded: {reason_of(error)}", "repair it, or take it away") from None

    def images(self) -> Tensor | None:
        """All images, uint8 [N, C, S, S], not copied; None if the folder is too large to be held in memory."""
        return self._held

    def labels(self) -> Tensor:
        """All labels, int64 [N], not copied."""
        return self._labels

    def _path(self, entry: Entry) -> str:
        return os.path.join(self._top, entry.name)

    def _sort_out(self, entries: Sequence[Entry], results: Sequence[T | str]) -> tuple[list[Entry], list[T]]:
        """Entries with a result, and their results; those with a reason instead are noted as bad."""
        good: list[Entry] = []
        kept: list[T] = []
        for entry, result in zip(entries, results, strict=True):
            if isinstance(result, str):
                self.bad.append((printable(entry.name), result))
            else:
                good.append(entry)
                kept.append(result)
        return good, kept

    def _decoded(self, entries: list[Entry]) -> tuple[list[Entry], Tensor | None, list[bytes]]:
        """The entries that can be used, their images [N, C, S, S] if they are few enough to hold, and a version of each.

        A version is the sha256 of the file's content where it was read, else its time of change.
        """
        if len(entries) > HELD_FILES or len(entries) * self._channels * self._size**2 > HELD_BYTES:
            return entries, None, [str(entry.mtime_ns).encode() for entry in entries]
        images = torch.empty(len(entries), self._channels, self._size, self._size, dtype=torch.uint8)

        def read(row: int) -> tuple[int, bytes]:
            path = self._path(entries[row])
            images[row] = read_image(path, self._size, self._channels)
            with open(path, "rb") as file:
                return row, hashlib.file_digest(file, "sha256").digest()

        good, rows = self._sort_out(entries, attempt(read, range(len(entries))))
        if len(good) < len(entries):
            images = images[[row for row, _ in rows]]
        return good, images, [digest for _, digest in rows]


def _folder(path: str | Path) -> Path:
    if os.path.isdir(path):
        return Path(path)
    shown = printable(str(path))
    if os.path.exists(path):
        raise UsageError(f"{shown} is a file, not a folder of images", "name the folder that it lies in")
    raise MissingError(f"there is no folder {shown}", "check --data")


def classes_of(names: Iterable[str], usable: Iterable[str]) -> tuple[str, ...]:
    """The first-level sub-folders among the files' names, sorted, if every usable file lies in one; else none.

    A sub-folder with nothing but bad files counts too: leaving files out must not renumber the labels.
    """
    if not all("/" in name for name in usable):
        return ()
    return tuple(sorted({name.split("/")[0] for name in names if "/" in name}, key=os.fsencode))


def common_side(headers: Sequence[Header], shown: str) -> int:
    """The side in pixels that all images share. Raises UsageError if they differ or are not square."""
    sizes = Counter((header.width, header.height) for header in headers).most_common()
    (width, height), _ = sizes[0]
    if len(sizes) == 1 and width == height:
        return width
    found = ", ".join(f"{w}x{h} ({times} of them)" for (w, h), times in sizes[:NAMED]) + (", ..." if len(sizes) > NAMED else "")
    raise UsageError(f"the images in {shown} are not squares of one size: found {found}", "say --size N to crop and resize them")


def too_small(header: Header, size: int) -> str | None:
    """Why an image is too small for `size`, None if it is not: it would be enlarged more than twice."""
    if 2 * min(header.width, header.height) >= size:
        return None
    return f"too small: {header.width}x{header.height} for size {size}"


def refused(bad: Sequence[Bad], total: int, shown: str) -> IntegrityError:
    """The error that names the first bad files and counts all of them."""
    first = ", ".join(f"{name} ({reason})" for name, reason in bad[:NAMED]) + (", ..." if len(bad) > NAMED else "")
    hint = "leave them out with --on-bad skip, or repair them" if len(bad) < total else "none is left: check --data"
    return IntegrityError(f"{len(bad)} of {total} images in {shown} cannot be used: {first}", hint)


def read_image(path: str, size: int, channels: int) -> Tensor:
    """uint8 [C, size, size] of one file. Raises one of BROKEN."""
    with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        return to_square(image, size, channels)


def fingerprint_of(entries: Sequence[Entry], versions: Sequence[bytes], classes: Sequence[str], shape: tuple[int, int]) -> str:
    """sha256 over the items' shape, the classes, and each file's name, size and version."""
    digest = hashlib.sha256(repr(shape).encode())
    for name in classes:
        digest.update(b"\0" + os.fsencode(name))
    for entry, version in zip(entries, versions, strict=True):
        digest.update(b"\0" + os.fsencode(entry.name) + b"\0" + str(entry.bytes).encode() + b"\0" + version)
    return digest.hexdigest()
