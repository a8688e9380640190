"""Patch against backbone on common seeds: the numbers, the verdict in plain words and the picture that end `dmpctl patch`."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dmpctl.measuring.extraction import build_extractor, extract, in_parts
from dmpctl.measuring.image_sets import images_of
from dmpctl.measuring.paired_loss import epsilon_errors, loss_difference
from dmpctl.measuring.record import distance_verdict
from dmpctl.metrics.features.pixels import Pixels
from dmpctl.metrics.frechet import CONFIDENCE, noise_floor, paired_difference, verdict
from dmpctl.metrics.moments import features_to_moments
from dmpctl.models.patched import Patched
from dmpctl.sampling.generate import in_batches
from dmpctl.sampling.pictures import contact_sheet
from dmpctl.settings.measuring import Fid
from dmpctl.settings.model import Settings
from dmpctl.store.fetch import cached
from dmpctl.types import Extractor, Progress, Source

CAUTION = "; another training seed may differ"
SHOWN = 32  # images of each side on the before/after sheet
MOST_PIXELS = 4096  # numbers of an image, up to which pixels are its features
NOTHING = dict.fromkeys(("metric", "backbone", "patched", "difference", "noise_floor", "verdict"))
NO_DISTANCE = "Fréchet distance: not measured, Inception's weights are not in the cache; fetch them: dmpctl download inception"


def protocol(settings: Settings, source: Source) -> dict[str, Any]:
    """All that fixes the numbers of a comparison, beside the two models."""
    return {
        "sampling": settings.sampling.model_dump(mode="json", exclude={"sample_batch"}),
        "images": settings.evaluate.eval_images,
        "reference": source.fingerprint,
    }


def extractor_for(shape: tuple[int, int, int], device: torch.device) -> Extractor | None:
    """Pixels for small images, Inception for the others; None where its weights are not in the cache."""
    if math.prod(shape) <= MOST_PIXELS:
        return Pixels(*shape[:2])
    return build_extractor(Fid(extractor="inception"), shape, device) if cached("inception") is not None else None


def measure(
    patched: Patched, source: Source, settings: Settings, device: torch.device, progress: Progress
) -> tuple[dict[str, Any], Image.Image]:
    """Measure both against the training images, and on their paired loss; JSON-able figures and the sheet.

    A negative difference is an improvement. The standard error covers the sampling of images, not that of training.
    Without an extractor there is a loss and a sheet, and no distance.
    """
    extractor, seed = extractor_for(patched.image_shape, device), settings.sampling.sample_seed
    count = SHOWN if extractor is None else settings.evaluate.eval_images
    patched = patched.with_prompts(settings, count, progress, source).in_precision(settings.sampling.sample_precision)
    plain = patched.unpatched()
    errors, steps = epsilon_errors(plain, source, device, seed, progress)
    loss = loss_difference(errors, epsilon_errors(patched, source, device, seed, progress)[0], steps)
    before, after = (
        torch.cat([images for _, images in in_batches(model, range(count), settings.sampling, device, progress)])
        for model in (plain, patched)
    )
    figures = {
        "protocol": protocol(settings, source),
        **(NOTHING if extractor is None else _distances(extractor, before, after, source, settings)),
        "paired_loss": asdict(loss),
        "paired_loss_verdict": loss_verdict(loss.difference, loss.standard_error, loss.images),
    }
    return figures, sheet(before[:SHOWN], after[:SHOWN])


def _distances(extractor: Extractor, before: Tensor, after: Tensor, source: Source, settings: Settings) -> dict[str, Any]:
    real = extract(extractor, images_of(source))
    reference = features_to_moments([real])
    found = paired_difference(extract(extractor, in_parts(after)), extract(extractor, in_parts(before)), reference)
    return {
        "metric": f"Fréchet distance in {extractor.name}",
        "backbone": asdict(found.b),
        "patched": asdict(found.a),
        "difference": {"value": found.value, "standard_error": found.standard_error, "p_value": found.p_value},
        "noise_floor": noise_floor(real, settings.evaluate.eval_images, settings.sampling.sample_seed),
        "verdict": distance_verdict(found.value, found.standard_error, CAUTION),
    }


def loss_verdict(difference: float, standard_error: float, images: int) -> str:
    """What a difference of paired losses, which are taken on the training images, says in plain words."""
    return f"{verdict(difference, standard_error)} ({100 * CONFIDENCE:.0f} % confidence over the {images} training images)"


def table(figures: Mapping[str, Any]) -> tuple[dict[str, str], ...]:
    """Backbone, patch and their paired difference; distance and loss."""
    loss, gain = figures["paired_loss"], figures["difference"]
    losses = (
        ("backbone", f"{loss['backbone']:.6f}"),
        ("patched", f"{loss['patched']:.6f}"),
        ("difference (paired)", _with_error(loss["difference"], loss["standard_error"], 6, "+")),
    )
    if gain is None:
        return tuple({"": name, "paired loss": value} for name, value in losses)
    distances = (
        _with_error(**_value(figures["backbone"]), digits=4),
        _with_error(**_value(figures["patched"]), digits=4),
        _with_error(**_value(gain), digits=4, sign="+"),
    )
    column = f"{figures['metric'].replace(' in ', ' (')}, {figures['protocol']['images']} images)"
    rows = [{"": name, column: distance, "paired loss": value} for (name, value), distance in zip(losses, distances, strict=True)]
    floor = {"": "noise floor (as many real images)", column: f"{figures['noise_floor']:.4f}", "paired loss": ""}
    return (*rows, floor)


def _value(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {"value": figures["value"], "error": figures["standard_error"]}


def _with_error(value: float, error: float | None, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


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
