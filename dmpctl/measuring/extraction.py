"""From images to features: which extractor a protocol asks for, and a store of what it says of each image."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from dmpctl.errors import MissingError, UsageError
from dmpctl.measuring.feature_store import FeatureStore
from dmpctl.measuring.image_sets import ImageSet
from dmpctl.metrics.features.inception import Inception
from dmpctl.metrics.features.pixels import Pixels
from dmpctl.metrics.features.protocols import PROTOCOLS, MetricProtocol
from dmpctl.metrics.features.timm import DINOV2, TimmFeatures
from dmpctl.processes.ranks import Ranks
from dmpctl.processes.stop import Stop, interrupted
from dmpctl.settings.measuring import SMALL_SIDE, Fid
from dmpctl.store.fetch import cached, require
from dmpctl.types import Extractor, Progress


def in_parts(images: Tensor, batch: int = 512) -> Iterable[Tensor]:
    """Images [N, C, H, W] as batches."""
    return (images[first : first + batch] for first in range(0, len(images), batch))


def extract(extractor: Extractor, batches: Iterable[Tensor]) -> Tensor:
    """Features [N, width] float32 on the CPU, in memory: for sets of a few thousand images."""
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


def build_extractor(options: Fid, shape: tuple[int, int, int], device: torch.device) -> Extractor:
    """The extractor of the protocol, or the one that --extractor names; MissingError where its weights are not there."""
    protocol, weights = protocol_for(options, shape), options.extractor_weights
    kind = options.extractor or protocol.extractor
    if kind == "pixels":
        return Pixels(shape[0], shape[1])
    if kind == "inception":
        return Inception(weights or _inception(), weights is None, device, protocol.preprocessing or "adm")
    if kind == "dinov2":
        return TimmFeatures(DINOV2, weights or require("dinov2"), device)
    if weights is None:
        raise MissingError(f"{kind} needs its weights", "add --extractor-weights FILE, in timm's layout")
    return TimmFeatures(kind.removeprefix("timm:"), weights, device)


def _inception() -> Path:
    """Inception's weights in the cache; its hash is checked where they are read."""
    path = cached("inception")
    if path is None:
        raise MissingError(
            "the Inception extractor needs its weights, weights-inception-2015-12-05-6726825d.pth",
            "fetch them with dmpctl download inception, add --extractor-weights FILE, or measure with --extractor pixels",
        )
    return path


def features_in(
    root: Path,
    images: ImageSet,
    extractor: Extractor,
    progress: Progress,
    logits: bool = False,
    spatial: bool = False,
    ranks: Ranks | None = None,
) -> FeatureStore:
    """What the extractor says of these images, kept under `root`; made where it is missing.

    `ranks`: processes that share the work and end it together; None: this one does it. Interrupted after a signal, with
    all that was found until then kept.
    """
    key = {"images": dict(images.identity), "extractor": extractor.fingerprint}
    if ranks is None:
        store = FeatureStore(root, key, images.count, logits, spatial)
        fill(store, images, extractor, progress)
        return store
    if ranks.is_main:
        FeatureStore(root, key, images.count, logits, spatial)
    ranks.wait()  # until it is there
    store = FeatureStore(root, key, images.count, logits, spatial)
    fill(store, images, extractor, progress, ranks.rank, ranks.world)
    ranks.wait()
    return store


def fill(
    store: FeatureStore,
    images: ImageSet,
    extractor: Extractor,
    progress: Progress,
    rank: int = 0,
    world: int = 1,
    batch: int = 64,
) -> None:
    """Extract what the store lacks of these images, this rank's share of them (i % world); it may be killed and go on."""
    missing = store.missing(rank, world)
    if not missing:
        return
    share = len(range(rank, images.count, world))
    shown = progress.track(f"{extractor.name} features of {images.name}", share, share - len(missing))
    with Stop() as stop, shown as task:
        for indices, pictures in images.read(missing):
            for first in range(0, len(indices), batch):
                part, some = indices[first : first + batch], pictures[first : first + batch]
                store.put(part, some, extractor.outputs(some))
                task.advance(len(part))
                if stop.got:
                    kept = f"{images.count - len(store.missing())} of {images.count} images are measured"
                    raise interrupted(stop.got, kept, "the same command goes on with them")
