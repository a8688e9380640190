"""MS-COCO 2014: images with five captions each (Lin et al. 2014; Chen et al. 2015), read from folders or from the zip files."""

import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dmpctl.data.tar import Slice
from dmpctl.errors import IntegrityError, MissingError
from dmpctl.images.reader import Reader
from dmpctl.images.scan import scan
from dmpctl.texts import decoded
from dmpctl.words import printable

SPLITS = ("train2014", "val2014")
LOCAL_HEADER, LOCAL_MAGIC = struct.Struct("<4s22xHH"), b"PK\x03\x04"  # APPNOTE.TXT 4.3.7
MOST_BYTES = 1 << 28  # of one packed image


def captions_file(folder: Path) -> Path | None:
    """The captions in a folder laid out as COCO is, of the first split whose images are there too; None if it is not."""
    found = ((split, folder / "annotations" / f"captions_{split}.json") for split in SPLITS)
    return next((path for split, path in found if path.is_file() and (folder / split).is_dir()), None)


@dataclass(frozen=True, slots=True)
class CocoFile:
    """One image: a file (`packed` None), or a part of a zip file. `wrong`: why it cannot be used, None: it may be good.

    `version` changes with its content, as far as listing it tells.
    """

    path: str
    wrong: str | None
    version: bytes
    packed: zipfile.ZipInfo | None = None

    def open(self) -> IO[bytes]:
        """The bytes of the image, read where they lie."""
        if self.packed is None:
            return open(self.path, "rb")
        # Not by zipfile: loader processes and threads would share one file position, or each read the whole directory again.
        info = self.packed
        with Slice(self.path, info.header_offset, LOCAL_HEADER.size) as header:
            magic, *lengths = LOCAL_HEADER.unpack(header.read())
        if magic != LOCAL_MAGIC:
            raise ValueError("its place in the zip file is damaged")
        packed = Slice(self.path, info.header_offset + LOCAL_HEADER.size + sum(lengths), info.compress_size)
        if info.compress_type == zipfile.ZIP_STORED:
            return io.BufferedReader(packed)
        with packed:
            try:
                return io.BytesIO(zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed.read(), MOST_BYTES))
            except zlib.error as error:
                raise ValueError(f"its zip data is damaged ({error})") from None


def coco_files(images: Path) -> Iterator[tuple[str, CocoFile]]:
    """The images in a folder or a zip file, each with its base name; IntegrityError for another file."""
    if not images.is_file():
        for file in scan(images).images:
            version = f"{file.bytes} {file.mtime_ns}".encode()
            yield os.path.basename(file.name), CocoFile(os.path.join(os.path.realpath(images), file.name), file.wrong, version)
        return
    try:
        with zipfile.ZipFile(images) as archive:
            found = [info for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        raise IntegrityError(f"{printable(str(images))} is no whole zip file: {error}", "fetch it again") from None
    for info in found:
        readable = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not info.flag_bits & 1
        wrong = None if readable else "encrypted, or packed in an unusual way"
        yield os.path.basename(info.filename), CocoFile(str(images), wrong, f"{info.file_size} {info.CRC}".encode(), info)


class CocoReader(Reader):
    """The images that a file of COCO captions names, in the order of their ids, with their captions in the order of theirs.

    `images`: a folder or a zip file; `annotations`: a captions_*.json, or the zip file that holds the one of `split`. There are
    no classes. Raises MissingError if one of them is not there, IntegrityError if it is not what it should be.
    """

    def __init__(self, images: Path, annotations: Path, split: str) -> None:
        super().__init__(f"coco-{split}", printable(str(images)))
        for path in (images, annotations):
            if not path.exists():
                raise MissingError(f"{printable(str(path))} is not there", "check --data, or run dmpctl download coco")
        content = _annotations(annotations, split)
        self._digest = hashlib.sha256(content).digest()
        self._files = dict(coco_files(images))
        self._images = read_captions(content)
        self.captions_from = printable(annotations.name)
        named = {name for name, _ in self._images}
        self.unused["images that the captions do not name"] = [name for name in self._files if name not in named]

    def __len__(self) -> int:
        return len(self._images)

    def name_of(self, index: int) -> str:
        return printable(self._images[index][0])

    def wrong(self, index: int) -> str | None:
        file = self._files.get(self._images[index][0])
        return "not there" if file is None else file.wrong

    def open(self, index: int) -> IO[bytes]:
        return self._files[self._images[index][0]].open()

    def captions(self, index: int) -> tuple[str, ...]:
        return self._images[index][1]

    def identity(self, kept: Sequence[int], digests: Sequence[bytes] | None) -> Iterator[bytes]:
        """The captions file, and each image's name and content; its size and version where it was not read."""
        yield self._digest
        for row, index in enumerate(kept):
            name, _ = self._images[index]
            yield b"\0" + os.fsencode(name) + b"\0" + (self._files[name].version if digests is None else digests[row])


def read_captions(content: bytes) -> list[tuple[str, tuple[str, ...]]]:
    """Base names of the images by id, each with its captions by id, of the bytes of a captions_*.json.

    IntegrityError if they are not one.
    """
    try:
        found = json.loads(decoded(content, "the annotations"))
        names = {int(image["id"]): os.path.basename(image["file_name"]) for image in found["images"]}
        captions: dict[int, list[str]] = {number: [] for number in names}
        for note in sorted(found["annotations"], key=lambda note: int(note["id"])):
            captions[int(note["image_id"])].append(str(note["caption"]).strip())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        hint = "it should be a captions_train2014.json or captions_val2014.json"
        raise IntegrityError(f"the annotations are no captions of COCO ({type(error).__name__}: {error})", hint) from None
    if not names:
        raise IntegrityError("the annotations name no image", "check --data")
    return [(names[number], tuple(captions[number])) for number in sorted(names)]


def _annotations(path: Path, split: str) -> bytes:
    """The bytes of a split's captions_*.json, which may lie in a zip file."""
    if path.suffix != ".zip":
        return path.read_bytes()
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(f"annotations/captions_{split}.json")
    except (zipfile.BadZipFile, zlib.error, OSError, KeyError) as error:
        raise IntegrityError(f"{printable(str(path))} holds no captions_{split}.json ({error})", "fetch it again") from None
