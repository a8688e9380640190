"""One case of `dmpctl fid`: which images are measured against which, by what protocol; refused where that cannot be done."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from dmpctl.errors import UsageError
from dmpctl.measuring.features import FeatureStore, Kept, build_extractor, features_in, protocol_for
from dmpctl.measuring.image_sets import ImageSet, open_images_of, run_images
from dmpctl.measuring.reference import cached_features, find_reference, needs_features
from dmpctl.metrics.features.protocols import MetricProtocol
from dmpctl.metrics.frechet import refuse_few
from dmpctl.models.patch_files import outputs_of
from dmpctl.processes.command import Command
from dmpctl.settings.measuring import Fid
from dmpctl.store.cache import cache_dir
from dmpctl.store.locate import locate
from dmpctl.types import Extractor
from dmpctl.words import differences

BACKBONE = "backbone"  # as --versus: a run's own backbone without its patch


@dataclass(frozen=True)
class Case:
    """WHAT, at `path`, whose `images` are measured against `real` ones (Path: statistics), in the features of `extractor`.

    `other`: the images of --versus, None: no difference is asked for. `clip`: the folder of CLIP, None: no CLIP score.
    """

    command: Command
    path: Path
    images: ImageSet
    real: ImageSet | Path
    other: ImageSet | None
    protocol: MetricProtocol
    extractor: Extractor
    clip: Path | None

    @property
    def options(self) -> Fid:
        """The settings of the measurement."""
        return self.command.settings.fid

    def features(self, images: ImageSet, metrics: tuple[str, ...] = ("fid",)) -> FeatureStore:
        """Features of `images`: kept beside the run that is measured, or in the cache; with the outputs for these metrics."""
        root = cache_dir() / "features" if images.model is None else outputs_of(self.path) / "metrics" / "features"
        wanted: tuple[tuple[str, Kept], ...] = (("is", "logits"), ("sfid", "spatial"))
        kept = tuple(output for metric, output in wanted if metric in metrics)
        return features_in(root, images, self.extractor, self.command, kept)

    @property
    def inventories(self) -> dict[str, JsonValue]:
        """The inventories of both sides; None where no folder or data was read."""
        return {"images": self.images.inventory, "reference": getattr(self.real, "inventory", None)}

    def share_out(self) -> None:
        """Extracts all features that will be asked for, in all processes together; the main one then finds them made.

        UsageError over several machines: rows in one file, written from several, are not safe on every network disk.
        """
        world = self.command.ranks.world
        if int(os.environ.get("LOCAL_WORLD_SIZE", world)) != world:
            raise UsageError("fid runs on one machine, with all of its GPUs", "leave --nnodes out")
        if not isinstance(self.real, Path) and needs_features(self.real, self.extractor, self.protocol.name, self.options):
            cached_features(self.real, self.extractor, self.command)
        self.features(self.images, self.options.wanted)
        if self.other is not None:
            self.features(self.other)


def open_case(what: str, command: Command) -> Case:
    """Opens both sides and the extractor; what does not fit fails here, before anything is made or extracted.

    Raises UsageError, MissingError and IntegrityError as the parts do.
    """
    path, settings, options = Path(what).expanduser(), command.settings, command.settings.fid
    images = open_images_of(path, command)
    name = options.reference or (images.model.trained_on if images.model else None)
    if name is None:
        raise UsageError(f"nothing says what to compare {what} with", "add --reference digits or --reference DIR")
    protocol = protocol_for(options, images.shape)
    pixels = (options.extractor or protocol.extractor) == "pixels"
    real = find_reference(name, images, pixels, command, protocol.preprocessing == "clean")
    if pixels and not isinstance(real, Path):  # grey only where both are
        channels = max(images.shape[0], real.shape[0])
        images, real = images.with_channels(channels), real.with_channels(channels)
    extractor = build_extractor(options, images.shape, command.device, settings)
    _refuse_unfit(images, extractor, options)
    clip = locate(options.clip, "clip", settings) if "clip-score" in options.wanted else None
    other = _versus(images, path, command)
    if other is not None:
        refuse_unpaired(images, other)
    return Case(command, path, images, real, other, protocol, extractor, clip)


def _versus(images: ImageSet, path: Path, command: Command) -> ImageSet | None:
    """The other side of a paired difference, None where none was asked for."""
    name = command.settings.fid.versus or command.settings.fid.fail_unless_better_than
    if name is None:
        return None
    if name != BACKBONE:
        return open_images_of(Path(name).expanduser(), command)
    if images.model is None or images.model.patch is None:
        raise UsageError(f"--versus {BACKBONE} needs a run with a patch, {images.name} has none")
    return replace(run_images(path, images.model.unpatched(), command), name=f"{images.name} without its patch")


def _refuse_unfit(images: ImageSet, extractor: Extractor, options: Fid) -> None:
    """UsageError where images are too few for the extractor, or metrics are not theirs."""
    if not options.allow_small:
        refuse_few(images.count, extractor.width, "or add --allow-small")
    if "clip-score" in options.wanted:
        if images.model is None or images.model.prompts is None:
            raise UsageError("clip-score is of a text-conditional run, whose captions are known", "leave it out of --metrics")
        if images.shape[0] != 3:
            raise UsageError("clip-score is of colour images", "leave it out of --metrics")
    if {"is", "sfid"} & set(options.wanted) and extractor.name != "inception":
        raise UsageError(f"is and sfid are Inception's, the extractor is {extractor.name}", "leave them out of --metrics")


def refuse_unpaired(images: ImageSet, other: ImageSet) -> None:
    """UsageError, with the list of what differs, where images k of both are known not to come from the same seed."""
    if images.shape != other.shape or images.count != other.count:
        raise UsageError(
            f"{images.name} ({images.count} images {list(images.shape)}) and {other.name} ({other.count} images "
            f"{list(other.shape)}) do not pair up",
            "make as many images of both, with the same seeds",
        )
    if images.seeds is not None and other.seeds is not None:
        found = differences(_flat(images.seeds), _flat(other.seeds))
        if found:
            words = "; ".join(f"{key}: {one} and {two}" for key, one, two in found)
            raise UsageError(f"{images.name} and {other.name} were sampled differently ({words})", "sample both alike")


def _flat(values: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    found: dict[str, JsonValue] = {}
    for key, value in values.items():
        found |= _flat(value) if isinstance(value, Mapping) else {key: value}
    return found
