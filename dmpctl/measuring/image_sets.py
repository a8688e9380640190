"""Images to measure, by their indices: those of a run, a folder, an npz or a source."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor

from dmpctl.data.source import folder_reader
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import read_json
from dmpctl.images.inventory import recorded, told
from dmpctl.images.stored import StoredImages, cautions, one_by_one
from dmpctl.metrics.npz import NpzImages, npz_images
from dmpctl.models.patch_files import load_result
from dmpctl.models.patched import Patched
from dmpctl.models.speed import compile_blocks
from dmpctl.processes.command import Command
from dmpctl.sampling.foresight import foresee
from dmpctl.sampling.generate import SCHEMA_VERSION as SAMPLES
from dmpctl.sampling.generate import begin_samples, in_batches, samples_about, samples_folder, samples_key
from dmpctl.sampling.pictures import png_of, sealed_png, sealed_pngs, write_pngs
from dmpctl.settings.sections import Data
from dmpctl.store.addresses import address_in
from dmpctl.types import Progress, Silent, Source

BATCH = 256
MODELS = (".safetensors", ".pt")  # files that are models, where they are no statistics
# Keys of samples.json: those that make the images what they are, and those that two sets share whose images pair up.
IDENTITY = ("sampling", "label", "backbone_sha256", "patch_sha256", "step", "codec", "prompts", "text")
SEEDS = ("sampling", "label", "prompts")
Read = Callable[[Sequence[int]], Iterable[tuple[Sequence[int], Tensor]]]


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 [C, H, W] of this `shape`. `read(indices)` gives them in batches, in the order asked for.

    `identity` is all that makes them these images; `seeds` what another set has to share so that images k of both pair up,
    None where nothing says. `model` makes them, None: they are on disk. `warnings`: sentences on what they are.
    """

    name: str
    shape: tuple[int, int, int]
    count: int
    read: Read
    identity: Mapping[str, JsonValue]
    seeds: Mapping[str, JsonValue] | None = None
    model: Patched | None = None
    warnings: tuple[str, ...] = ()
    inventory: JsonValue = None

    def with_channels(self, channels: int) -> "ImageSet":
        """These images with so many channels, grey ones repeated; for 3 or their own number."""
        if channels == self.shape[0]:
            return self

        def read(indices: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
            return ((part, images.expand(-1, channels, -1, -1)) for part, images in self.read(indices))

        identity = {**self.identity, "channels": channels}
        return replace(self, shape=(channels, *self.shape[1:]), read=read, identity=identity)


def source_images(name: str, source: Source, limit: int | None = None) -> ImageSet:
    """A source of data as images to measure."""
    channels, height, width = source.item(0)[0].shape
    count = len(source) if limit is None else min(limit, len(source))
    identity: dict[str, JsonValue] = {"source": source.fingerprint, "shape": [channels, height, width]}
    read = partial(one_by_one, lambda i: source.item(i)[0])
    warnings, inventory = cautions(source), recorded(source).get("inventory")
    return ImageSet(name, (channels, height, width), count, read, identity, warnings=warnings, inventory=inventory)


def folder_images(path: Path, limit: int, section: Data, progress: Progress) -> ImageSet:
    """A folder of images, each in its own size; from one that `dmpctl sample` wrote, the numbered ones, whose seeds are known."""
    if not (path / "samples.json").is_file():
        source = StoredImages(folder_reader(path, section), on_bad=section.on_bad, own="any")
        told(source, progress)
        return source_images(str(path), source, limit)
    about, key = read_json(path / "samples.json", SAMPLES), samples_key(path, progress)
    numbers = sorted(int(found.stem) for found in path.glob("[0-9]*.png") if found.stem.isdecimal())[:limit]
    if not numbers:
        raise UsageError(f"{path} holds no 000000.png", "make its images: dmpctl sample")
    if (count := len(numbers)) <= numbers[-1]:
        lacks = next(k for k in range(count + 1) if k not in numbers)
        raise IntegrityError(f"{path} lacks {png_of(path, lacks).name}", "make it again: dmpctl sample")

    def image(index: int) -> Tensor:
        if (found := sealed_png(path, index, key)) is None:
            raise IntegrityError(f"{png_of(path, index)} is gone", "make it again: dmpctl sample")
        return found

    channels, height, width = image(0).shape
    identity, seeds = _identity_in(about)
    read = partial(one_by_one, image)
    return ImageSet(str(path), (channels, height, width), count, read, identity, seeds)


def _identity_in(about: Mapping[str, JsonValue]) -> tuple[dict[str, JsonValue], dict[str, JsonValue]]:
    """(identity, seeds) of generated images, from their samples.json."""
    identity, seeds = ({key: about[key] for key in keys if key in about} for keys in (IDENTITY, SEEDS))
    return identity, seeds


def npz_set(path: Path, limit: int = 2**62) -> ImageSet:
    """An npz in ADM's layout, read through once; nothing of it is unpickled."""
    found = npz_images(path)
    stat = path.stat()
    identity: dict[str, JsonValue] = {"npz": str(path.absolute()), "bytes": stat.st_size, "modified": stat.st_mtime_ns}
    return ImageSet(str(path), found.shape, min(limit, found.count), partial(_npz_items, found), identity)


def _npz_items(images: NpzImages, indices: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
    wanted, first = set(indices), 0
    last = max(wanted, default=-1)
    for batch in images.batches(BATCH, limit=last + 1):
        part = [i for i in range(first, first + len(batch)) if i in wanted]
        if part:
            yield part, batch[[i - first for i in part]]
        first += len(batch)


def run_images(path: Path, model: Patched, command: Command) -> ImageSet:
    """The images of a run: those that `dmpctl sample` made with the same settings, and the missing ones, made when asked for.

    They are written where `dmpctl sample` writes them; with --stream none is.
    """
    settings = command.settings
    compile_blocks(model.network, settings.launch)
    identity, seeds = _identity_in(samples_about(model, settings))
    read = partial(_made, path, model, command)
    return ImageSet(str(path), model.image_shape, settings.fid.max_images, read, identity, seeds, model)


def _made(path: Path, model: Patched, command: Command, indices: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
    settings = command.settings
    folder, keep, missing = samples_folder(path, model, settings.sampling), not settings.fid.stream, list(indices)
    key: str | None = None
    if keep and indices:
        begin_samples(folder, samples_about(model, settings))
        missing, key = [], samples_key(folder, command.progress)
        for first in range(0, len(indices), BATCH):
            part = indices[first : first + BATCH]
            there = sealed_pngs(folder, part, key, command.progress)
            missing += [k for k in part if k not in there]
            if there:
                yield list(there), torch.stack(list(there.values()))
    foresee(model, len(missing), settings.sampling, command.device, command.progress, "fewer --max-images")
    for made, images in in_batches(model, missing, settings.sampling, command.device, Silent()):
        if keep:
            write_pngs(folder, made, images, key)
        yield made, images


def open_images_of(path: Path, command: Command) -> ImageSet:
    """Opens WHAT once: a run or a model, a folder of images or an npz; MissingError where it is none of them."""
    limit = command.settings.fid.max_images
    model_file = path.suffix in MODELS or address_in(path) is not None
    if model_file or any((path / name).is_file() for name in ("config.json", "patch.json")):
        model = load_result(path, command.settings.result.result_weights).with_codec(command.settings, command.progress)
        return run_images(path, model.with_prompts(command.settings, limit, command.progress), command)
    if path.is_dir():
        return folder_images(path, limit, command.settings.data, command.progress)
    if path.suffix == ".npz" and path.is_file():
        return npz_set(path, limit)
    raise MissingError(f"{path} is no run, no folder of images and no .npz file", "name a run, such as runs/digits")
