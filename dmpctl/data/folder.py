"""A folder of images, and what the files beside them say of them."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from dmpctl.data.beside import said_beside
from dmpctl.errors import MissingError, UsageError
from dmpctl.images.reader import Reader
from dmpctl.images.scan import EXTENSIONS, Listing, scan
from dmpctl.tables.columns import UNNAMED, Columns
from dmpctl.words import printable


class FolderReader(Reader):
    """The images under a folder, in the order of their names, or of the rows of its metadata.

    Labels are those of metadata.csv, .jsonl or .parquet (as `datasets` reads them) or of EDM's dataset.json; without one of
    these, first-level sub-folders are classes if every image lies in one, numbered as torchvision numbers them. Captions are
    those of the metadata, or each image's .txt. `listing`: what `scan` found there, None: it is scanned here. Raises
    MissingError if there is no such folder, UsageError if it is a file or has no images, and what `said_beside` raises.
    """

    def __init__(self, path: str | Path, columns: Columns = UNNAMED, listing: Listing | None = None) -> None:
        top, shown = os.path.realpath(path), printable(str(path))
        super().__init__(printable(os.path.basename(top)), shown)
        if not os.path.exists(path):
            raise MissingError(f"there is no folder {shown}", "check --data")
        if not os.path.isdir(path):
            raise UsageError(f"{shown} is a file, not a folder of images", "name the folder that it lies in")
        self._listing = found = listing or scan(Path(path))
        self._top, self._said = top, said_beside(top, found, columns, shown)
        said = self._said
        self._files = found.images if said.rows is None else [found.images[row] for row in said.rows]
        self.unused = said.unused
        if not self._files:
            beside = ", ".join(f"{len(files)} {kind or 'others'}" for kind, files in found.others.items())
            there = f" (there are {beside})" if beside else ""
            raise UsageError(f"no images in {shown}{there}: looked for {', '.join(EXTENSIONS)}", "check --data")
        self.labels_from, self.captions_from, self.label_names = said.labels_from, said.captions_from, said.names
        self._folders = self._classes()

    def __len__(self) -> int:
        return len(self._files)

    def name_of(self, index: int) -> str:
        return printable(self._files[index].name)

    def wrong(self, index: int) -> str | None:
        return self._files[index].wrong or (None if self._said.labels is None or self._said.labels[index] >= 0 else "no label")

    def open(self, index: int) -> IO[bytes]:
        return open(os.path.join(self._top, self._files[index].name), "rb")

    def labels(self, kept: Sequence[int]) -> tuple[Tensor, int]:
        if self._said.labels is not None:
            return self._said.labels[torch.tensor(list(kept), dtype=torch.int64)], self._said.num_classes
        number = {name: label for label, name in enumerate(self.classes(kept))}
        return torch.tensor([number.get(self._files[index].name.split("/")[0], 0) for index in kept]), len(number)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._said.captions(self._files[index].name, index)

    def identity(self, kept: Sequence[int], digests: Sequence[bytes] | None) -> Iterator[bytes]:
        """The classes, each file's name, size and content (time of change where it was not read), and what is said of them."""
        for name in self.classes(kept):
            yield b"\0" + os.fsencode(name)
        for row, index in enumerate(kept):
            file = self._files[index]
            version = str(file.mtime_ns).encode() if digests is None else digests[row]
            yield b"\0" + os.fsencode(file.name) + b"\0" + str(file.bytes).encode() + b"\0" + version
        yield self._said.identity

    def classes(self, kept: Sequence[int]) -> tuple[str, ...]:
        """The first-level sub-folders, sorted; () where an image in use lies outside of them.

        One with nothing but bad files, or without any, counts too: leaving files out must not renumber the labels.
        """
        if self._said.is_said:
            return tuple(self.label_names)
        outside = [self._files[index].name for index in kept if "/" not in self._files[index].name]
        if outside and self._folders and len(outside) < len(kept):
            more = f" and {len(outside) - 1} more lie" if len(outside) > 1 else " lies"
            self.assumed = [f"no classes: {printable(outside[0])}{more} outside of the sub-folders"]
        return () if outside else self._folders

    def _classes(self) -> tuple[str, ...]:
        named = {file.name.split("/")[0] for file in self._files if "/" in file.name}
        self.labels_from = self.labels_from or ("its folders" if named else None)
        return tuple(sorted({*self._listing.folders, *named}, key=os.fsencode)) if named else ()
