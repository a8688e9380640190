"""A folder of images as a source."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import torch

from dmpctl.errors import MissingError, UsageError
from dmpctl.images.scan import EXTENSIONS, printable, scan
from dmpctl.images.stored import Labels, OnBad, StoredImages


class Files:
    """The images under a folder as a store; its first-level sub-folders are classes if every image lies in one."""

    def __init__(self, path: str | Path) -> None:
        self.shown = printable(str(path))
        self.entries = scan(_folder(path))
        if not self.entries:
            raise UsageError(f"no images in {self.shown}: looked for {', '.join(EXTENSIONS)}", "check --data")
        self.top = os.path.realpath(path)

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return printable(self.entries[index].name)

    def wrong(self, index: int) -> str | None:
        return self.entries[index].wrong

    def open(self, index: int) -> IO[bytes]:
        return open(os.path.join(self.top, self.entries[index].name), "rb")

    def looked_at(self, good: Sequence[int]) -> Sequence[int]:
        """All of them, however many there are."""
        return good

    def classes(self, kept: Sequence[int]) -> tuple[str, ...]:
        """The names of the classes, sorted; () if the images do not lie in class folders."""
        return classes_of([entry.name for entry in self.entries], [self.entries[index].name for index in kept])

    def labels(self, kept: Sequence[int]) -> Labels:
        number = {name: label for label, name in enumerate(self.classes(kept))}
        values = torch.tensor([number.get(self.entries[index].name.split("/")[0], 0) for index in kept])
        return Labels(values, len(number))

    def label(self, index: int) -> int:
        """Not asked for: `labels` knows all of them."""
        return 0

    def captions(self, index: int) -> tuple[str, ...]:
        """A folder has none."""
        return ()

    def identity(self, kept: Sequence[int], digests: Sequence[bytes] | None) -> Iterator[bytes]:
        """The classes, and each file's name, size and content; its time of change where it was not read."""
        for name in self.classes(kept):
            yield b"\0" + os.fsencode(name)
        for row, index in enumerate(kept):
            entry = self.entries[index]
            version = str(entry.mtime_ns).encode() if digests is None else digests[row]
            yield b"\0" + os.fsencode(entry.name) + b"\0" + str(entry.bytes).encode() + b"\0" + version


class ImageFolder(StoredImages):
    """PNG, JPEG, WebP and BMP files under a folder, with a class for each first-level sub-folder if all lie in one.

    `size`, `channels` and `on_bad` as for StoredImages. Raises MissingError if there is no such folder, UsageError if it has
    no images, and what StoredImages raises.
    """

    def __init__(self, path: str | Path, size: int | None = None, channels: int | None = None, on_bad: OnBad = "fail") -> None:
        files = Files(path)
        super().__init__(files, printable(os.path.basename(files.top)), size, channels, on_bad)
        self.classes = files.classes(self._kept)


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
