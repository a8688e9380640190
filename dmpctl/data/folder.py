"""A folder of images."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from dmpctl.errors import MissingError, UsageError
from dmpctl.images.reader import Reader
from dmpctl.images.scan import EXTENSIONS, scan
from dmpctl.words import printable


class FolderReader(Reader):
    """PNG, JPEG, WebP and BMP files under a folder, in the order of their names; without captions.

    First-level sub-folders are classes if every image lies in one. Raises MissingError if there is no such folder, UsageError
    if it is a file or has no images.
    """

    def __init__(self, path: str | Path) -> None:
        top, shown = os.path.realpath(path), printable(str(path))
        super().__init__(printable(os.path.basename(top)), shown)
        if not os.path.exists(path):
            raise MissingError(f"there is no folder {shown}", "check --data")
        if not os.path.isdir(path):
            raise UsageError(f"{shown} is a file, not a folder of images", "name the folder that it lies in")
        self._top, self._files = top, scan(Path(path))
        if not self._files:
            raise UsageError(f"no images in {shown}: looked for {', '.join(EXTENSIONS)}", "check --data")

    def __len__(self) -> int:
        return len(self._files)

    def name_of(self, index: int) -> str:
        return printable(self._files[index].name)

    def wrong(self, index: int) -> str | None:
        return self._files[index].wrong

    def open(self, index: int) -> IO[bytes]:
        return open(os.path.join(self._top, self._files[index].name), "rb")

    def labels(self, kept: Sequence[int]) -> tuple[Tensor, int]:
        number = {name: label for label, name in enumerate(self.classes(kept))}
        return torch.tensor([number.get(self._files[index].name.split("/")[0], 0) for index in kept]), len(number)

    def identity(self, kept: Sequence[int], digests: Sequence[bytes] | None) -> Iterator[bytes]:
        """The classes, and each file's name, size and content; its time of change where it was not read."""
        for name in self.classes(kept):
            yield b"\0" + os.fsencode(name)
        for row, index in enumerate(kept):
            file = self._files[index]
            version = str(file.mtime_ns).encode() if digests is None else digests[row]
            yield b"\0" + os.fsencode(file.name) + b"\0" + str(file.bytes).encode() + b"\0" + version

    def classes(self, kept: Sequence[int]) -> tuple[str, ...]:
        """The first-level sub-folders, sorted; () where an image in use lies outside of them.

        One with nothing but bad files counts too: leaving files out must not renumber the labels.
        """
        if not all("/" in self._files[index].name for index in kept):
            return ()
        return tuple(sorted({file.name.split("/")[0] for file in self._files if "/" in file.name}, key=os.fsencode))
