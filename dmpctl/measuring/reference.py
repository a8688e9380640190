"""What images are compared with: real ones by name, folder or npz, or statistics of them. Statistics are computed once."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, split

from dmpctl.data.source import open_source
from dmpctl.errors import UsageError
from dmpctl.files import make_folder, sha256_of, sha256_of_json, write_atomic
from dmpctl.measuring.extraction import features_in
from dmpctl.measuring.image_sets import ImageSet, npz_set, source_images
from dmpctl.metrics.frechet import Factor
from dmpctl.metrics.moments import BLOCK, features_to_moments
from dmpctl.metrics.npz import names_of
from dmpctl.metrics.statistics import SUFFIXES, Statistics, disagreements, read_statistics, write_statistics
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Data
from dmpctl.store.cache import cache_dir, working_on
from dmpctl.types import Extractor, Progress

SCHEMA_VERSION = 1
VECTORS = {"pr", "dc", "kid"}  # metrics that need the features themselves


@dataclass(frozen=True)
class Reference:
    """Real images as far as metrics want them. `features` is factored once; `spatial` None: not asked for, or not known.

    `vectors()` are the features themselves [N, D] (of ADM's npz: of the 10 000 images that it holds); UsageError where the
    images are not there. `record` says what this is, JSON-able; `warnings` are sentences.
    """

    features: Factor
    spatial: Factor | None
    vectors: Callable[[], Tensor]
    record: dict[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def count(self) -> int | None:
        """Images behind it; None where its file does not say."""
        return self.features.count


def find_reference(name: str, shape: tuple[int, int, int], settings: Settings) -> Path | ImageSet:
    """What `name` stands for, for images of this `shape`: a file of statistics, or real images; nothing is computed yet.

    MissingError, UsageError and IntegrityError as the readers of data raise them.
    """
    path = Path(name).expanduser()
    if path.suffix in SUFFIXES and path.is_file() and not (path.suffix == ".npz" and "mu" not in names_of(path)):
        return path
    if path.suffix == ".npz" and path.is_file():
        return npz_set(path, limit=2**62)
    return source_images(name, open_source(Data(data=name), shape[1], shape[0], settings))


def open_reference(
    found: Path | ImageSet,
    shape: tuple[int, int, int],
    extractor: Extractor,
    protocol: str,
    settings: Settings,
    progress: Progress,
) -> Reference:
    """Statistics of what was found, read, or computed and kept.

    UsageError where a file of statistics was made in another way, with the list of what differs.
    """
    target = settings.fid.save_stats
    if target is not None and (isinstance(found, Path) or target.suffix != ".safetensors"):
        why = f"{found} are statistics already" if isinstance(found, Path) else f"it is a .safetensors file, found {target}"
        raise UsageError(f"--save-stats writes the statistics of real images: {why}", "leave it out, or name such a file")
    if isinstance(found, Path):
        return _from_file(found, shape, extractor, protocol, settings, progress)
    return _from_images(found, extractor, protocol, "sfid" in settings.fid.wanted, settings, progress)


def _from_file(
    path: Path, shape: tuple[int, int, int], extractor: Extractor, protocol: str, settings: Settings, progress: Progress
) -> Reference:
    found = read_statistics(path, extractor.width)
    _refuse_other_protocol(found, extractor, protocol, shape)
    if "sfid" in settings.fid.wanted and found.spatial is None:
        raise UsageError(f"{path} has no spatial statistics, which sfid compares", "leave sfid out of --metrics")
    record = {
        "name": str(path),
        "kind": found.kind,
        "sha256": sha256_of(path),
        "n": found.count,
        "protocol": found.protocol,
        **({"source": found.about["reference"]} if "reference" in found.about else {}),
    }
    warnings = []
    if found.kind != "dmpctl":
        warnings.append(f"warning: {path.name} does not say how it was made; its numbers are taken for those of {protocol}")

    def vectors() -> Tensor:
        if not found.images:
            raise UsageError(
                f"{path} has statistics but no images, which precision, recall, density, coverage and KID compare",
                "name real images as --reference, or leave these out of --metrics",
            )
        return features_in(cache_dir() / "features", npz_set(path, limit=2**62), extractor, progress).features

    spatial = None if found.spatial is None else Factor.of(found.spatial)
    return Reference(Factor.of(found.features), spatial, cache(vectors), record, tuple(warnings))


def _refuse_other_protocol(found: Statistics, extractor: Extractor, protocol: str, shape: tuple[int, int, int]) -> None:
    here = {"protocol": protocol, "extractor": extractor.fingerprint, "shape": list(shape)}
    other = [f"{key}: {there} there, {own} here" for key, there, own in disagreements(found.made, here)]
    if other:
        raise UsageError(f"{found.path} was made in another way ({'; '.join(other)})", "measure both with one --protocol")


def features_wanted(found: Path | ImageSet, extractor: Extractor, protocol: str, settings: Settings) -> ImageSet | None:
    """The images that `open_reference` will ask features of, None where their statistics in the cache are enough."""
    if isinstance(found, Path):
        return None
    _, path = _kept_as(found, extractor, protocol, "sfid" in settings.fid.wanted)
    return found if not path.is_file() or _needs_vectors(settings) else None


def _needs_vectors(settings: Settings) -> bool:
    return settings.fid.noise_floor or bool(VECTORS & set(settings.fid.wanted))


def _kept_as(images: ImageSet, extractor: Extractor, protocol: str, spatial: bool) -> tuple[dict[str, Any], Path]:
    """What is said of the statistics of these images, and their file in the cache, named after all of it."""
    about = {
        "protocol": protocol,
        "extractor": extractor.fingerprint,
        "shape": list(images.shape),
        "reference": {"name": images.name, **images.identity, "n": images.count},
    }
    key = sha256_of_json({"schema_version": SCHEMA_VERSION, **about, "spatial": spatial})
    return about, cache_dir() / "statistics" / f"{key}.safetensors"


def _from_images(
    images: ImageSet,
    extractor: Extractor,
    protocol: str,
    spatial: bool,
    settings: Settings,
    progress: Progress,
) -> Reference:
    """Statistics from the cache, or from the images and into it."""
    about, path = _kept_as(images, extractor, protocol, spatial)
    with nullcontext() if path.is_file() else working_on(f"statistics-{path.stem[:16]}"):
        if path.is_file():
            found = read_statistics(path, extractor.width)
            features, spatial_features = found.features, found.spatial
        else:
            store = features_in(cache_dir() / "features", images, extractor, progress, spatial=spatial)
            features = features_to_moments(split(store.features, BLOCK))
            spatial_features = features_to_moments(split(store.spatial, BLOCK)) if spatial else None
            make_folder(path.parent)
            write_statistics(path, features, spatial_features, about)
            if not _needs_vectors(settings):
                store.remove()  # the statistics are all that is needed of them
    if settings.fid.save_stats is not None:
        write_atomic(settings.fid.save_stats.expanduser().absolute(), path.read_bytes())
    source = images.identity.get("source")
    record = {"name": images.name, "kind": "images", "fingerprint": source, "n": images.count, "protocol": protocol}
    return Reference(
        Factor.of(features),
        None if spatial_features is None else Factor.of(spatial_features),
        cache(lambda: features_in(cache_dir() / "features", images, extractor, progress, spatial=spatial).features),
        record,
        images.warnings,
    )
