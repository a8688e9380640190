"""What an extractor says of a set of images, on disk as it is found: a killed measurement goes on where it was.

<folder>/key.json, done.npy [N], hashes.npy [N], features.npy [N, D] and, where asked for, logits.npy and spatial.npy: memory
maps keyed by the image's index, so that no set of features is ever in memory as a whole, and ranks fill rows of their own.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from dmpctl.errors import NumericalError
from dmpctl.files import make_folder, sha256_of_json, write_json, writing
from dmpctl.types import Outputs

SCHEMA_VERSION = 1
FEATURES, LOGITS, SPATIAL = "features", "logits", "spatial"


class FeatureStore:
    """Features of `count` images, in a folder of `root` that is named after `key`: all that makes them these features."""

    def __init__(self, root: Path, key: Mapping[str, Any], count: int, logits: bool = False, spatial: bool = False) -> None:
        """Open what is there, or begin. `logits`, `spatial`: whether these are kept, too."""
        full = {"schema_version": SCHEMA_VERSION, **key, "count": count, "logits": logits, "spatial": spatial}
        self.folder, self.count = root / sha256_of_json(full)[:16], count
        self._kept = (FEATURES, *([LOGITS] if logits else []), *([SPATIAL] if spatial else []))
        self._open: dict[str, NDArray[Any]] = {}
        make_folder(self.folder)
        if not (self.folder / "key.json").is_file():
            self._begin("done", np.uint8)
            self._begin("hashes", np.uint64)
            write_json(self.folder / "key.json", full)  # last: without it nothing here counts
        self._done, self._hashes = self._map("done"), self._map("hashes")

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """Indices without features, of those that are this rank's: i % world == rank."""
        return [int(i) for i in np.flatnonzero(self._done == 0) if i % world == rank]

    def put(self, indices: Sequence[int], images: Tensor, outputs: Outputs) -> None:
        """Keep what was found of these images uint8 [B, C, H, W]; NumericalError for features that are not finite."""
        rows = np.asarray(indices)
        for name in self._kept:
            values: Tensor | None = getattr(outputs, name)
            if values is None:
                raise ValueError(f"this extractor has no {name}")
            if not torch.isfinite(values).all():
                raise NumericalError(f"{name} of images {rows[0]} to {rows[-1]} are not finite", "look at these images")
            if name not in self._open and not (self.folder / f"{name}.npy").is_file():
                self._begin(name, np.float32, values.shape[1], replace=False)
            self._map(name)[rows] = values.float().cpu().numpy()
        self._hashes[rows] = [_hash(image) for image in images]
        self._done[rows] = 1  # after the rows themselves

    @property
    def features(self) -> Tensor:
        """float32 [N, D], a memory map."""
        return torch.from_numpy(self._map(FEATURES))

    @property
    def logits(self) -> Tensor:
        """float32 [N, K], a memory map."""
        return torch.from_numpy(self._map(LOGITS))

    @property
    def spatial(self) -> Tensor:
        """float32 [N, W], a memory map."""
        return torch.from_numpy(self._map(SPATIAL))

    @property
    def duplicates(self) -> int:
        """How many images are equal, byte for byte, to one before them."""
        return self.count - len(np.unique(self._hashes))

    def remove(self) -> None:
        """Delete it."""
        self._open.clear()
        with writing(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self, name: str, dtype: type[np.generic], *width: int, replace: bool = True) -> None:
        """Make a map of zeros under its name; its place on disk is taken now, as a full disk later would end the process.

        `replace` False: one that another process has made meanwhile stays.
        """
        path, half = self.folder / f"{name}.npy", self.folder / f".{name}.{os.getpid()}.npy"
        with writing(path):
            array = open_memmap(half, mode="w+", dtype=dtype, shape=(self.count, *width))
            if hasattr(os, "posix_fallocate"):  # not on every system
                with half.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, half.stat().st_size)
            array.flush()
            if replace:
                half.replace(path)
                return
            with suppress(FileExistsError):
                os.link(half, path)
            half.unlink()

    def _map(self, name: str) -> NDArray[Any]:
        if name not in self._open:
            self._open[name] = open_memmap(self.folder / f"{name}.npy", mode="r+")
        return self._open[name]


def _hash(image: Tensor) -> int:
    return int.from_bytes(hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=8).digest(), "little")
