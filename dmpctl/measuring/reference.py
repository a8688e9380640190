"""Real images that others are compared with: by name, folder or npz, or statistics of them. Statistics are computed once."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import JsonValue
from torch import Tensor, split

from dmpctl.data.source import open_source
from dmpctl.errors import Damaged, UsageError
from dmpctl.files import make_folder, put_aside, sha256_of, sha256_of_json, write_atomic
from dmpctl.images.inventory import told
from dmpctl.images.stored import OwnSize
from dmpctl.measuring.features import FeatureStore, Kept, features_in
from dmpctl.measuring.image_sets import ImageSet, npz_set, source_images
from dmpctl.metrics.frechet import Factor
from dmpctl.metrics.moments import BLOCK, features_to_moments
from dmpctl.metrics.npz import names_of
from dmpctl.metrics.statistics import SUFFIXES, Statistics, disagreements, read_statistics, write_statistics
from dmpctl.processes.command import Command
from dmpctl.runs.records import Record
from dmpctl.settings.measuring import Fid
from dmpctl.store.cache import cache_dir, working_on
from dmpctl.types import Extractor, Progress

SCHEMA_VERSION = 2
VECTORS = {"pr", "dc", "kid"}  # metrics that need the features themselves


class ReferenceRecord(Record):
    """A reference as a measurement records it: a file by its `sha256`, images by the `fingerprint` of their source.

    `kind`: "images", or whose file it is; `n` None: the file does not say. `source`: the images behind a file of ours.
    """

    name: str
    kind: str
    sha256: str | None = None
    fingerprint: JsonValue = None
    n: int | None
    protocol: str | None
    source: JsonValue = None


@dataclass(frozen=True)
class Reference:
    """Real images as far as metrics want them. `features` is factored once; `spatial` None: not asked for, or not known.

    `vectors()` are the features themselves [N, D] (of ADM's npz: of the 10 000 images that it holds); UsageError where the
    images are not there. `warnings` are sentences.
    """

    features: Factor
    spatial: Factor | None
    vectors: Callable[[], Tensor]
    record: ReferenceRecord
    warnings: tuple[str, ...] = ()

    @property
    def count(self) -> int | None:
        """Images behind it; None where its file does not say."""
        return self.features.count


def find_reference(name: str, images: ImageSet, pixels: bool, command: Command, clean: bool = False) -> Path | ImageSet:
    """Finds a file of statistics, or real images, by their name; nothing is computed yet.

    A network takes them in colour and resizes each from its own size. Those of a model's run become squares of its size, as
    its training data; so do images of several sizes, but for `clean`-fid. `pixels` are compared in the size of `images`.
    MissingError, UsageError and IntegrityError as the readers of data raise them.
    """
    path = Path(name).expanduser()
    if path.suffix in SUFFIXES and path.is_file() and not (path.suffix == ".npz" and "mu" not in names_of(path)):
        return path
    if path.suffix == ".npz" and path.is_file():
        return npz_set(path)
    own: OwnSize = "never" if pixels or images.model else "any" if clean else "one"
    section = command.settings.data.model_copy(update={"data": name})
    source = open_source(section, images.shape[1], None if pixels else 3, command.settings, own)
    told(source, command.progress)
    return source_images(name, source)


def open_reference(
    found: Path | ImageSet, shape: tuple[int, int, int], extractor: Extractor, protocol: str, command: Command
) -> Reference:
    """Statistics of what was found: read, or computed and kept.

    UsageError where a file of statistics was made in another way, with the list of what differs.
    """
    target = command.settings.fid.save_stats
    if target is not None and (isinstance(found, Path) or target.suffix != ".safetensors"):
        why = f"{found} are statistics already" if isinstance(found, Path) else f"it is a .safetensors file, found {target}"
        raise UsageError(f"--save-stats writes the statistics of real images: {why}", "leave it out, or name such a file")
    if isinstance(found, Path):
        return _from_file(found, shape, extractor, protocol, command)
    return _from_images(found, extractor, protocol, command)


def _from_file(path: Path, shape: tuple[int, int, int], extractor: Extractor, protocol: str, command: Command) -> Reference:
    found = read_statistics(path, extractor.width)
    here: dict[str, JsonValue] = {"protocol": protocol, "extractor": extractor.fingerprint}
    here |= {"shape": list(shape)} if extractor.name == "pixels" else {}
    other = [f"{key}: {there} there, {own} here" for key, there, own in disagreements(found.made, here)]
    if other:
        raise UsageError(f"{path} was made in another way ({'; '.join(other)})", "measure both with one --protocol")
    if "sfid" in command.settings.fid.wanted and found.spatial is None:
        raise UsageError(f"{path} has no spatial statistics, which sfid compares", "leave sfid out of --metrics")
    record = ReferenceRecord(
        name=str(path),
        kind=found.kind,
        sha256=sha256_of(path),
        n=found.count,
        protocol=found.protocol,
        **({"source": found.about["reference"]} if "reference" in found.about else {}),
    )
    unsaid = f"warning: {path.name} does not say how it was made; its numbers are taken for those of {protocol}"

    def vectors() -> Tensor:
        if not found.images:
            raise UsageError(
                f"{path} has statistics but no images, which precision, recall, density, coverage and KID compare",
                "name real images as --reference, or leave these out of --metrics",
            )
        return cached_features(npz_set(path), extractor, command).features

    spatial = None if found.spatial is None else Factor.of(found.spatial)
    return Reference(Factor.of(found.features), spatial, cache(vectors), record, () if found.kind == "dmpctl" else (unsaid,))


def needs_features(images: ImageSet, extractor: Extractor, protocol: str, options: Fid) -> bool:
    """Whether `open_reference` will need the features of these images; else their statistics in the cache are enough."""
    _, path = _kept_as(images, extractor, protocol, "sfid" in options.wanted)
    return not path.is_file() or _needs_vectors(options)


def cached_features(images: ImageSet, extractor: Extractor, command: Command) -> FeatureStore:
    """Features of real images, in the cache; with their spatial ones where sfid is asked for."""
    kept: tuple[Kept, ...] = ("spatial",) if "sfid" in command.settings.fid.wanted else ()
    return features_in(cache_dir() / "features", images, extractor, command, kept)


def _needs_vectors(options: Fid) -> bool:
    return options.noise_floor or bool(VECTORS & set(options.wanted))


def _kept_as(images: ImageSet, extractor: Extractor, protocol: str, spatial: bool) -> tuple[dict[str, JsonValue], Path]:
    """How the statistics of these images were made, and their file in the cache, named after all of it."""
    about: dict[str, JsonValue] = {
        "protocol": protocol,
        "extractor": extractor.fingerprint,
        "shape": list(images.shape),
        "reference": {"name": images.name, **images.identity, "n": images.count},
    }
    key = sha256_of_json({"schema_version": SCHEMA_VERSION, **about, "spatial": spatial})
    return about, cache_dir() / "statistics" / f"{key}.safetensors"


def _kept_in(path: Path, width: int, progress: Progress) -> Statistics | None:
    """Statistics in the cache, None where there are none; damaged ones are put aside, and that is said."""
    try:
        return read_statistics(path, width) if path.is_file() else None
    except Damaged as error:
        progress.say(f"warning: {error.message}; put aside as {put_aside(path).name}, and computed again")
        return None


def _from_images(images: ImageSet, extractor: Extractor, protocol: str, command: Command) -> Reference:
    """Statistics from the cache, or from the images and into it."""
    options, vectors = command.settings.fid, cache(lambda: cached_features(images, extractor, command).features)
    about, path = _kept_as(images, extractor, protocol, "sfid" in options.wanted)
    kept = _kept_in(path, extractor.width, command.progress)
    with nullcontext() if kept else working_on(f"statistics-{path.stem[:16]}"):
        if (found := kept or _kept_in(path, extractor.width, command.progress)) is not None:
            features, spatial = found.features, found.spatial
        else:
            store = cached_features(images, extractor, command)
            features = features_to_moments(split(store.features, BLOCK))
            spatial = features_to_moments(split(store.spatial, BLOCK)) if "sfid" in options.wanted else None
            make_folder(path.parent)
            write_statistics(path, features, spatial, about)
            if not _needs_vectors(options):
                store.remove()  # the statistics are all that is needed of them
    if options.save_stats is not None:
        write_atomic(options.save_stats.expanduser().absolute(), path.read_bytes())
    record = ReferenceRecord(
        name=images.name, kind="images", fingerprint=images.identity.get("source"), n=images.count, protocol=protocol
    )
    factors = Factor.of(features), None if spatial is None else Factor.of(spatial)
    return Reference(*factors, vectors, record, images.warnings)
