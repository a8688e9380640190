"""Features of images: the extractor that a protocol asks for, and its features on disk, so that a killed measurement goes on.

<folder>/key.json, seals.npy [N], hashes.npy [N], features.npy [N, D] and, where asked for, logits.npy and spatial.npy: memory
maps keyed by the image's index, so that no set of features is ever in memory as a whole, and ranks fill rows of their own.
A row has a seal, the hash of all that is kept of its image: rows that do not have theirs are extracted again.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import Tensor

from dmpctl.errors import Damaged, IntegrityError, MissingError, NumericalError, UsageError
from dmpctl.files import make_folder, map_array, put_aside, sha256_of_json, write_json, writing
from dmpctl.measuring.image_sets import ImageSet
from dmpctl.metrics.features.inception import Inception
from dmpctl.metrics.features.pixels import Pixels
from dmpctl.metrics.features.protocols import PROTOCOLS, MetricProtocol
from dmpctl.metrics.features.timm import DINOV2, TimmFeatures
from dmpctl.processes.command import Command
from dmpctl.processes.stop import Stop
from dmpctl.settings.measuring import SMALL_SIDE, Fid
from dmpctl.settings.model import Settings
from dmpctl.store.fetch import cached, require
from dmpctl.types import Extractor, Outputs

SCHEMA_VERSION = 2
BATCH = 64  # images in one pass of the extractor
Kept = Literal["logits", "spatial"]  # outputs that some metrics need beside the features


class FeatureStore:
    """Features of `count` images, in a folder of `root` that is named after `key`: all that makes them these features."""

    def __init__(self, root: Path, key: Mapping[str, JsonValue], count: int, kept: Sequence[Kept] = ()) -> None:
        """Opens what is there, or begins. `kept`: the outputs that are stored beside the features."""
        full = {"schema_version": SCHEMA_VERSION, **key, "count": count, "logits": "logits" in kept, "spatial": "spatial" in kept}
        self.folder, self.count = root / sha256_of_json(full)[:16], count
        self._kept = ("features", *kept)
        self._open: dict[str, NDArray[Any]] = {}
        make_folder(self.folder)
        if not (self.folder / "key.json").is_file():
            self._begin("seals", np.uint64)
            self._begin("hashes", np.uint64)
            write_json(self.folder / "key.json", full)  # last: without it nothing here counts

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """Indices without features, of those that are this rank's: i % world == rank."""
        return [int(i) for i in np.flatnonzero(self._map("seals") == 0) if i % world == rank]

    def check(self) -> int:
        """Forgets the rows that are not what was put there, and returns their number. Damaged where no row can be told."""
        seals = self._map("seals")
        wrong = [int(i) for i in np.flatnonzero(seals) if self._seal(int(i)) != seals[i]]
        self.forget(wrong)
        return len(wrong)

    def forget(self, indices: Sequence[int]) -> None:
        """Features of these images are missing from now on."""
        self._map("seals")[np.asarray(indices, dtype=np.int64)] = 0

    def _seal(self, index: int) -> int:
        """The seal that a row should have; never 0."""
        parts = (self._map(name)[index].tobytes() for name in ("hashes", *self._kept))
        return int.from_bytes(hashlib.blake2b(b"".join(parts), digest_size=8).digest(), "little") or 1

    def put(self, indices: Sequence[int], images: Tensor, outputs: Outputs) -> None:
        """Keeps the outputs for these images uint8 [B, C, H, W]; NumericalError for features that are not finite."""
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
        hashes = (hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=8).digest() for image in images)
        self._map("hashes")[rows] = [int.from_bytes(digest, "little") for digest in hashes]
        self._map("seals")[rows] = [self._seal(index) for index in indices]  # after the rows themselves

    @property
    def features(self) -> Tensor:
        """float32 [N, D], a memory map."""
        return torch.from_numpy(self._map("features"))

    @property
    def logits(self) -> Tensor:
        """float32 [N, K], a memory map."""
        return torch.from_numpy(self._map("logits"))

    @property
    def spatial(self) -> Tensor:
        """float32 [N, W], a memory map."""
        return torch.from_numpy(self._map("spatial"))

    @property
    def duplicates(self) -> int:
        """How many images are equal, byte for byte, to one before them."""
        return self.count - len(np.unique(self._map("hashes")))

    def remove(self) -> None:
        """Deletes it."""
        self._open.clear()
        with writing(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self, name: str, dtype: type[np.generic], *width: int, replace: bool = True) -> None:
        """Makes a map of zeros under its name; its place on disk is taken now, as a full disk later would end the process.

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
            kind = np.float32 if name in self._kept else np.uint64
            self._open[name] = map_array(self.folder / f"{name}.npy", kind, self.count)
        return self._open[name]


def features_in(root: Path, images: ImageSet, extractor: Extractor, command: Command, kept: Sequence[Kept] = ()) -> FeatureStore:
    """Returns the features of these images, kept under `root`; those that are missing are extracted first.

    The processes of the command share the work and end it together. Interrupted after a signal, with all that was found
    until then kept.
    """
    key: dict[str, JsonValue] = {"images": dict(images.identity), "extractor": extractor.fingerprint}
    ranks = command.ranks
    if ranks.is_main:  # begun by one, before the others look
        _check(FeatureStore(root, key, images.count, kept), command)
    ranks.wait()
    store = FeatureStore(root, key, images.count, kept)
    _fill(store, images, extractor, command)
    ranks.wait()
    return store


def _check(store: FeatureStore, command: Command) -> None:
    """Says what is damaged of these features, so that it is extracted again; a file of another size takes all with it."""
    try:
        if wrong := store.check():
            command.progress.say(f"warning: {wrong} of {store.count} rows in {store.folder} are damaged: extracted again")
    except (Damaged, FileNotFoundError) as error:
        aside = put_aside(store.folder)
        command.progress.say(f"warning: {error}; put aside as {aside.name}, all of these features are extracted again")


def _fill(store: FeatureStore, images: ImageSet, extractor: Extractor, command: Command) -> None:
    """Extracts this process's share (i % world == rank) of the images that the store lacks."""
    rank, world = command.ranks.rank, command.ranks.world
    missing = store.missing(rank, world)
    if not missing:
        return
    share, put = len(range(rank, images.count, world)), list[int]()
    shown = command.progress.track(f"{extractor.name} features of {images.name}", share, share - len(missing))

    def done() -> str:
        return f"{images.count - len(store.missing())} of {images.count} images are measured"

    try:
        with Stop(done, "the same command goes on with them") as stop, shown as task:
            for indices, pictures in images.read(missing):
                for first in range(0, len(indices), BATCH):
                    part, some = indices[first : first + BATCH], pictures[first : first + BATCH]
                    with stop.soon():
                        found = extractor.outputs(some)
                    store.put(part, some, found)
                    put += part
                    task.advance(len(part))
                    stop.check()
    except IntegrityError:
        store.forget(put)  # a checksum comes after what it is of
        raise


def extract(extractor: Extractor, batches: Iterable[Tensor]) -> Tensor:
    """Returns features [N, width] float32 on the CPU, in memory: for sets of a few thousand images."""
    found = [extractor(images).cpu() for images in batches]
    if not found:
        raise UsageError("there are no images to measure")
    return torch.cat(found)


def protocol_for(options: Fid, shape: tuple[int, int, int]) -> MetricProtocol:
    """The protocol that was named; by default ADM's, and pixels for small images or where --extractor says so."""
    if options.protocol is not None:
        return PROTOCOLS[options.protocol]
    if options.extractor in ("pixels", "dinov2"):
        return PROTOCOLS[options.extractor]
    return PROTOCOLS["pixels" if options.extractor is None and shape[1] < SMALL_SIDE else "adm"]


def build_extractor(
    options: Fid, shape: tuple[int, int, int], device: torch.device, settings: Settings | None = None
) -> Extractor:
    """The extractor of the protocol, or the one that --extractor names; MissingError where its weights are not there.

    `settings`: with the user's own rows of the registry, None: the shipped ones.
    """
    protocol, weights = protocol_for(options, shape), options.extractor_weights
    match options.extractor or protocol.extractor:
        case "pixels":
            return Pixels(shape[0], shape[1])
        case "inception":
            own = settings is not None and any(row.name == "inception" for row in settings.assets.rows)
            path = weights or (require("inception", settings) if own else cached("inception"))  # checked where it is read
            if path is None:
                raise MissingError(
                    "the Inception extractor needs its weights, weights-inception-2015-12-05-6726825d.pth",
                    "fetch them with dmpctl download inception, add --extractor-weights FILE, or measure with --extractor pixels",
                )
            return Inception(path, weights is None and not own, device, protocol.preprocessing or "adm")
        case "dinov2":
            return TimmFeatures(DINOV2, weights or require("dinov2", settings), device)
        case name if weights is None:
            raise MissingError(f"{name} needs its weights", "add --extractor-weights FILE, in timm's layout")
        case name:
            return TimmFeatures(name.removeprefix("timm:"), weights, device)
