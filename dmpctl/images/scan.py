"""Images under a folder, found by their names, and headers read without decoding."""

import os
import struct
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from dmpctl.errors import UsageError
from dmpctl.images.transforms import GREY_MODES
from dmpctl.words import printable

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # no other of Pillow's decoders may see a file (one of them starts Ghostscript)
MAX_PIXELS = 89_478_485  # where Pillow begins to speak of a decompression bomb
BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error, Image.DecompressionBombError)
THREADS, CHUNK = 8, 64

A = TypeVar("A")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file with an image's extension. `name` is relative, with slashes; `wrong` says why it is none, None: it may be one."""

    name: str
    bytes: int = 0
    mtime_ns: int = 0
    wrong: str | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """An image's sides in pixels and its kind, known before it is decoded."""

    width: int
    height: int
    grey: bool


def reason_of(error: BaseException) -> str:
    """Why a file cannot be used, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "not a PNG, JPEG, WebP or BMP image"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS} pixels"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def scan(root: Path) -> list[ImageFile]:
    """All files under `root` with an image's extension, sorted by name. Hidden names are passed over.

    Links to folders are not followed, links to files only inside `root`. Raises UsageError if `root` cannot be listed.
    """
    top = os.path.realpath(root)
    files: list[ImageFile] = []
    prefixes = [""]
    while prefixes:
        prefix = prefixes.pop()
        try:
            with os.scandir(os.path.join(top, prefix)) as listing:
                items = [item for item in listing if not item.name.startswith(".")]
        except OSError as error:
            if not prefix:
                raise UsageError(f"the folder {printable(str(root))} cannot be listed: {reason_of(error)}") from None
            files.append(ImageFile(prefix, wrong=reason_of(error)))
            continue
        for item in items:
            name = prefix + item.name
            if item.is_dir(follow_symlinks=False):
                prefixes.append(name + "/")
            elif item.is_dir():
                files.append(ImageFile(name + "/", wrong="a link to a folder, not followed"))
            elif name.lower().endswith(EXTENSIONS):
                files.append(_image_file(item, name, top))
    return sorted(files, key=lambda file: os.fsencode(file.name))


def _image_file(item: "os.DirEntry[str]", name: str, top: str) -> ImageFile:
    if item.is_symlink():
        target = os.path.realpath(item.path)
        if not os.path.exists(target):
            return ImageFile(name, wrong="a broken link")
        if os.path.commonpath([top, target]) != top:
            return ImageFile(name, wrong="a link that leaves the folder")
    if not item.is_file():
        return ImageFile(name, wrong="not a regular file")
    status = item.stat()
    return ImageFile(name, status.st_size, status.st_mtime_ns, None if status.st_size else "empty")


def header_of(image: Image.Image) -> Header:
    """Size and kind of an image that was opened; ValueError if it is too large to be decoded safely."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"more than {MAX_PIXELS} pixels")
    return Header(image.width, image.height, image.mode in GREY_MODES)


def attempt(function: Callable[[A], T], items: Sequence[A]) -> list[T | str]:
    """function(item) of each item, by threads; where it raised one of BROKEN, the reason instead."""

    def chunk(first: int) -> list[T | str]:
        results: list[T | str] = []
        for item in items[first : first + CHUNK]:
            try:
                results.append(function(item))
            except BROKEN as error:
                results.append(reason_of(error))
        return results

    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS decides
        return [result for results in pool.map(chunk, range(0, len(items), CHUNK)) for result in results]
