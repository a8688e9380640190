"""Reading an npz of images or statistics without loading it whole, and without unpickling anything."""

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmpctl.errors import IntegrityError, MissingError
from dmpctl.files import array_header

IMAGES = "arr_0"  # in ADM's layout
CHUNK = 2**24  # bytes
LARGEST_SIDE = 8192  # pixels
LARGEST = 2**30  # bytes of statistics: covariances of 2048 features have 32 MiB


@dataclass(frozen=True)
class NpzImages:
    """`arr_0` uint8 [N, H, W, C] of an npz; `shape` is (C, H, W) of one image."""

    path: Path
    count: int
    shape: tuple[int, int, int]

    def batches(self, size: int = 256, limit: int | None = None) -> Iterator[Tensor]:
        """Images in order, uint8 [B, C, H, W], read as they are asked for; `limit` None: all.

        Raises IntegrityError where the file ends early or fails its checksum.
        """
        size = max(1, min(size, LARGEST // 4 // math.prod(self.shape)))
        left, (channels, height, width) = self.count if limit is None else min(limit, self.count), self.shape
        bytes_each = channels * height * width
        with _member(self.path, IMAGES) as stream:
            array_header(stream, str(self.path))
            while left:
                part = min(size, left)
                data = stream.read(part * bytes_each)
                if len(data) != part * bytes_each:
                    raise IntegrityError(f"{self.path}: arr_0 ends {left} images too early", "copy the file again")
                left -= part
                array = np.frombuffer(bytearray(data), np.uint8).reshape(part, height, width, channels)
                yield torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
            while stream.read(CHUNK):  # the checksum is compared at the end of a member
                pass


def npz_images(path: Path) -> NpzImages:
    """The images of an npz in ADM's layout, nothing but its header read.

    Raises MissingError if it is not there, IntegrityError for anything but uint8 [N, H, W, 1 or 3].
    """
    with _member(path, IMAGES) as stream:
        shape, fortran, dtype = array_header(stream, str(path))
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not all(shape) or fortran:
        order = ", columns first" if fortran else ""
        raise IntegrityError(f"{path}: arr_0 should be uint8 [N, H, W, 3], found {dtype} {list(shape)}{order}")
    count, height, width, channels = shape
    if max(height, width) > LARGEST_SIDE:
        raise IntegrityError(f"{path}: images of {width}x{height} are larger than {LARGEST_SIDE} on a side")
    return NpzImages(path, count, (channels, height, width))


def npz_arrays(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[np.float64]]:
    """Those of the named arrays that an npz has, in float64; the others, images above all, are not touched.

    Raises MissingError if it is not there, IntegrityError for arrays that are not real numbers, or too large.
    """
    found = {}
    for name in names_of(path) & set(names):
        with _member(path, name) as stream:
            shape, fortran, dtype = array_header(stream, str(path))
            size = math.prod(shape) * dtype.itemsize
            if dtype.kind not in "fiu" or size > LARGEST:
                raise IntegrityError(f"{path}: {name} should hold real numbers, found {dtype} {list(shape)}")
            data = stream.read(size + 1)
            if len(data) != size:
                raise IntegrityError(f"{path}: {name} has another size than its header says", "copy the file again")
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
        found[name] = array.astype(np.float64)
    return found


def names_of(path: Path) -> set[str]:
    """Names of the arrays in an npz. Raises MissingError if it is not there, IntegrityError if it is no npz."""
    with _archive(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    if not path.is_file():
        raise MissingError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    # The last two: a compression that is not known, and an encrypted member.
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise IntegrityError(f"{path} is not a readable npz ({error})", "copy the file again") from None


@contextmanager
def _member(path: Path, name: str) -> Iterator[IO[bytes]]:
    """The bytes of one array, unpacked as they are read."""
    with _archive(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            raise IntegrityError(f"{path} holds no {name}; it has {', '.join(sorted(archive.namelist())[:5]) or 'nothing'}")
        with archive.open(f"{name}.npy") as stream:
            yield stream
