"""Images under a folder, found by their names, and headers read without decoding."""

import os
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from dmpctl.errors import UsageError
from dmpctl.images.transforms import GREY_MODES
from dmpctl.words import printable

# Pillow's formats that begin with a mark of their own; no other decoder may see a file (one of them starts Ghostscript).
FORMATS = (
    *("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF"),
    *("JPEG2000", "ICO", "ICNS", "SGI", "DDS", "QOI", "PSD"),
)
EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".avifs"),
    *(".apng", ".jpe", ".jfif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ico", ".icns", ".sgi", ".dds", ".qoi", ".psd"),
)
HIDDEN, SYSTEM = "hidden", "of the system"  # kinds of files beside images that are looked into no further
SYSTEM_NAMES = {"@eaDir", "#recycle", "#snapshot", "__MACOSX", "lost+found", "$RECYCLE.BIN", "Thumbs.db", "desktop.ini"}
CHECKED = (".tar", ".parquet", ".csv", ".jsonl", ".json", ".txt")  # read by us, so their links are looked at, too
OUTWARD, TO_FOLDER = "a link that leaves the folder", "a link to a folder, not followed"
MAX_PIXELS = 89_478_485  # where Pillow begins to speak of a decompression bomb
BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error, Image.DecompressionBombError)
THREADS, CHUNK = 8, 64

Image.init()  # all of Pillow's formats, before threads ask for them at once

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
    """An image's sides in pixels and its kind, known before it is decoded. `frames`: whether it has more than one."""

    width: int
    height: int
    grey: bool
    form: str = ""
    frames: bool = False
    transparent: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """All that lies under a folder, sorted by name.

    `folders`: its own sub-folders, also those without images; `others`: the other files by kind (extension, HIDDEN, SYSTEM, "").
    """

    images: Sequence[ImageFile]
    folders: Sequence[str]
    others: Mapping[str, Sequence[ImageFile]]


def reason_of(error: BaseException) -> str:
    """Why a file cannot be used, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "not a PNG, JPEG, TIFF or another image that is read"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS} pixels"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def scan(root: Path, follow: bool = False) -> Listing:
    """All files under `root`. Hidden names, and what systems leave, are counted and not looked into.

    Without `follow`, links to folders are not followed, links to files only inside `root`: they are bad images.
    Raises UsageError if `root` cannot be listed.
    """
    top = os.path.realpath(root)
    files: list[ImageFile] = []
    folders: list[str] = []
    others: dict[str, list[ImageFile]] = {}
    places: list[tuple[str, tuple[str, ...]]] = [("", (top,))]  # each with the folders that it lies in
    while places:
        prefix, above = places.pop()
        try:
            with os.scandir(os.path.join(top, prefix)) as listing:
                items = list(listing)
        except OSError as error:
            if not prefix:
                raise UsageError(f"the folder {printable(str(root))} cannot be listed: {reason_of(error)}") from None
            files.append(ImageFile(prefix, wrong=reason_of(error)))
            continue
        for item in items:
            name, kind = prefix + item.name, os.path.splitext(item.name)[1].lower()
            if item.name.startswith(".") or item.name in SYSTEM_NAMES:
                others.setdefault(HIDDEN if item.name.startswith(".") else SYSTEM, []).append(ImageFile(name))
            elif item.is_dir():
                folders += [] if prefix else [item.name]
                real = os.path.realpath(item.path) if item.is_symlink() else os.path.join(above[-1], item.name)
                if item.is_symlink() and not follow:
                    files.append(ImageFile(name + "/", wrong=TO_FOLDER))
                elif real in above:
                    files.append(ImageFile(name + "/", wrong="a link to a folder that it lies in"))
                else:
                    places.append((name + "/", (*above, real)))
            elif kind in EXTENSIONS:
                files.append(_image_file(item, name, top, follow))
            else:
                others.setdefault(kind, []).append(_image_file(item, name, top, follow) if kind in CHECKED else ImageFile(name))
    in_order = {kind: sorted(found, key=_bytes_of) for kind, found in sorted(others.items())}
    return Listing(sorted(files, key=_bytes_of), sorted(folders, key=os.fsencode), in_order)


def _bytes_of(file: ImageFile) -> bytes:
    return os.fsencode(file.name)


def _image_file(item: "os.DirEntry[str]", name: str, top: str, follow: bool) -> ImageFile:
    if item.is_symlink():
        target = os.path.realpath(item.path)
        if not os.path.exists(target):
            return ImageFile(name, wrong="a broken link")
        if not follow and os.path.commonpath([top, target]) != top:
            return ImageFile(name, wrong=OUTWARD)
    if not item.is_file():
        return ImageFile(name, wrong="not a regular file")
    status = item.stat()
    return ImageFile(name, status.st_size, status.st_mtime_ns, None if status.st_size else "empty")


def header_of(image: Image.Image) -> Header:
    """Size and kind of an image that was opened; ValueError if it is too large to be decoded safely."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"more than {MAX_PIXELS} pixels")
    several, clear = getattr(image, "is_animated", False), image.has_transparency_data
    return Header(image.width, image.height, image.mode in GREY_MODES, (image.format or "").lower(), several, clear)


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
