"""Patch against backbone on common seeds: the numbers, the verdict in plain words and the picture that end `dmpctl patch`."""

import math
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from pydantic import BaseModel, JsonValue
from torch import Tensor

from dmpctl.batches.loader import held_out
from dmpctl.comparing.paired_loss import LossDifference, epsilon_errors, loss_difference, loss_verdict
from dmpctl.errors import Damaged, UsageError
from dmpctl.files import make_folder, put_aside, read_json, write_json
from dmpctl.images.stored import images_of
from dmpctl.measuring.features import build_extractor, extract
from dmpctl.measuring.verdict import distance_verdict, distance_words
from dmpctl.metrics.features.pixels import Pixels
from dmpctl.metrics.frechet import FidEstimate, noise_floor, paired_difference, refuse_few
from dmpctl.metrics.moments import features_to_moments
from dmpctl.models.patched import Patched
from dmpctl.processes.command import Command
from dmpctl.sampling.foresight import foresee
from dmpctl.sampling.generate import in_batches
from dmpctl.sampling.pictures import contact_sheet, write_picture
from dmpctl.settings.measuring import Fid
from dmpctl.settings.model import Settings
from dmpctl.store.fetch import cached
from dmpctl.types import Extractor, Progress, Source
from dmpctl.words import plus_minus

SCHEMA_VERSION = 1
CAUTION = "; another training seed may differ"
PART = 512  # images in one pass of the extractor
SHOWN = 32  # images of each side on the before/after sheet
MOST_PIXELS = 4096  # numbers of an image, up to which pixels are its features
NO_INCEPTION = "Inception's weights are not in the cache; fetch them: dmpctl download inception"


class ComparisonProtocol(BaseModel, frozen=True):
    """All that fixes the numbers of a comparison, beside the two models; `reference`: fingerprint of the real images.

    `held_out`: images that the patch was not trained on, and that the paired loss is of; 0: it is of training images.
    """

    sampling: dict[str, JsonValue]
    images: int
    reference: str
    held_out: int = 0


class DistanceGap(BaseModel, frozen=True):
    """A paired difference of distances; negative is an improvement. Its error covers the sampling of images, not the training."""

    value: float
    standard_error: float | None
    p_value: float | None


class BeforeAfter(BaseModel, frozen=True):
    """metrics/comparison-<step>.json. `metric` to `verdict` are None without a distance; `no_distance` then says why."""

    schema_version: int = SCHEMA_VERSION
    patch_sha256: str | None = None
    protocol: ComparisonProtocol
    metric: str | None = None
    backbone: FidEstimate | None = None
    patched: FidEstimate | None = None
    difference: DistanceGap | None = None
    noise_floor: float | None = None
    verdict: str | None = None
    no_distance: str = f"not measured, {NO_INCEPTION}"
    paired_loss: LossDifference
    paired_loss_verdict: str
    eval_seconds: float = 0.0


def protocol(settings: Settings, source: Source) -> ComparisonProtocol:
    """The protocol of a comparison under these settings."""
    sampling = settings.sampling.model_dump(mode="json", exclude={"sample_batch"})
    held = len(held_out(len(source), settings.evaluate.held_out or 0.0))
    images, reference = settings.evaluate.eval_images, source.fingerprint
    return ComparisonProtocol(sampling=sampling, images=images, reference=reference, held_out=held)


def recorded(patched: Patched, source: Source, run: Path, command: Command) -> BeforeAfter:
    """The comparison of a run's patch under these settings: read, or made now and recorded with its sheet."""
    path, picture = run / "metrics" / f"comparison-{patched.step:07d}.json", run / "before-after.png"
    if path.is_file() and picture.is_file():
        wanted = {"patch_sha256": patched.patch_sha256, "protocol": protocol(command.settings, source).model_dump()}
        try:
            before = read_json(path, SCHEMA_VERSION)
            there = {**before, "protocol": {"held_out": 0, **before.get("protocol", {})}}  # older records have no such key
            if all(there.get(key) == value for key, value in wanted.items()):
                return BeforeAfter.model_validate(before)
        except Damaged as error:
            command.progress.say(f"warning: {error.message}; put aside as {put_aside(path).name}, and measured again")
    began = time.perf_counter()
    found, image = measure(patched, source, command)
    make_folder(path.parent)
    write_picture(picture, image)
    found = found.model_copy(update={"eval_seconds": round(time.perf_counter() - began, 1)})
    write_json(path, found.model_dump(mode="json"))
    return found


def foresee_images(model: Patched, run: Path, settings: Settings, device: torch.device, progress: Progress) -> None:
    """Say before the training if the images of its comparison will take long."""
    pixels, count = math.prod(model.image_shape), settings.evaluate.eval_images
    width = pixels if pixels <= MOST_PIXELS else 2048  # Inception's
    if not list((run / "metrics").glob("comparison-*.json")):
        no_distance = count <= width or (pixels > MOST_PIXELS and cached("inception", settings) is None)
        fewer = "fewer --eval-images, --no-evaluate"
        foresee(model, SHOWN if no_distance else count, settings.sampling, device, progress, fewer, sides=2)


def measure(patched: Patched, source: Source, command: Command) -> tuple[BeforeAfter, Image.Image]:
    """Measures backbone and patch against the training images, and on their paired loss; returns the record and the sheet.

    Small images are compared by their pixels, others by Inception; without its weights, or with no more images than features,
    there is no distance.
    """
    settings, device, progress = command.settings, command.device, command.progress
    shape, sampling = patched.image_shape, settings.sampling
    extractor: Extractor | None = None
    if math.prod(shape) <= MOST_PIXELS:
        extractor = Pixels(*shape[:2])
    elif cached("inception", settings) is not None:
        extractor = build_extractor(Fid(extractor="inception"), shape, device, settings)
    count, why = settings.evaluate.eval_images, NO_INCEPTION
    if extractor is not None:
        try:
            refuse_few(count, extractor.width, "with --eval-images")
        except UsageError as error:
            extractor, why = None, f"{error.message}; {error.hint}"
    count = SHOWN if extractor is None else count
    patched = patched.with_prompts(settings, count, progress, source).in_precision(sampling.sample_precision)
    models = (patched.unpatched(), patched)
    held = held_out(len(source), settings.evaluate.held_out or 0.0)
    (old_errors, steps), (new_errors, _) = (
        epsilon_errors(model, source, device, sampling.sample_seed, progress, among=held or None) for model in models
    )
    loss = loss_difference(old_errors, new_errors, steps, bool(held))
    images = [torch.cat([part for _, part in in_batches(model, range(count), sampling, device, progress)]) for model in models]
    record = BeforeAfter(
        patch_sha256=patched.patch_sha256,
        protocol=protocol(settings, source),
        no_distance=f"not measured, {why}",
        paired_loss=loss,
        paired_loss_verdict=loss_verdict(loss),
    )
    if extractor is not None:
        old, new = (extract(extractor, torch.split(each, PART)) for each in images)
        real = extract(extractor, images_of(source))
        gap = paired_difference(new, old, features_to_moments([real]), progress)
        distances = {
            "metric": f"Fréchet distance in {extractor.name}",
            "backbone": gap.b,
            "patched": gap.a,
            "difference": DistanceGap(value=gap.value, standard_error=gap.standard_error, p_value=gap.p_value),
            "noise_floor": noise_floor(real, count, sampling.sample_seed),
            "verdict": distance_verdict(gap, CAUTION),
        }
        record = record.model_copy(update=distances)
    return record, sheet(*(each[:SHOWN] for each in images))


def table(figures: BeforeAfter) -> tuple[dict[str, str], ...]:
    """Backbone, patch and their paired difference; distance and loss."""
    loss, gap = figures.paired_loss, figures.difference
    losses = (
        ("backbone", f"{loss.backbone:.6f}"),
        ("patched", f"{loss.patched:.6f}"),
        ("difference (paired)", f"{loss.difference:+.3g}{plus_minus(loss.standard_error, '.2g')}"),
    )
    if figures.metric is None or gap is None:
        return tuple({"": name, "paired loss": value} for name, value in losses)
    distances = [
        "" if each is None else distance_words(each.value, each.debiased, each.standard_error)
        for each in (figures.backbone, figures.patched)
    ]
    distances.append(f"{gap.value:+.4f}{plus_minus(gap.standard_error, '.2g')}{' debiased' if gap.standard_error else ''}")
    column = f"{figures.metric.replace(' in ', ' (')}, {figures.protocol.images} images)"
    rows = [{"": name, column: distance, "paired loss": value} for (name, value), distance in zip(losses, distances, strict=True)]
    return (*rows, {"": "noise floor (as many real images)", column: f"{figures.noise_floor:.4f}", "paired loss": ""})


def sheet(before: Tensor, after: Tensor) -> Image.Image:
    """Backbone's images left, the patch's right, image k of both from the same seed."""
    sheets = [contact_sheet(list(images), columns=4, side=64) for images in (before, after)]
    top, gap = 22, 24
    width = sum(sheet.width for sheet in sheets) + gap
    canvas = Image.new("RGB", (width, sheets[0].height + top), "white")
    draw, x = ImageDraw.Draw(canvas), 0
    for title, sheet in zip(("backbone", "patched, same seeds"), sheets, strict=True):
        draw.text((x + 6, 5), title, fill="black")
        canvas.paste(sheet, (x, top))
        x += sheet.width + gap
    return canvas
