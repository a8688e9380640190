"""`dmpctl fid`: the Fréchet distance of a run, a folder or an npz to real images."""

import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import torch
from torch import Tensor

from dmpctl.data.folder import ImageFolder
from dmpctl.engine.assets import cached
from dmpctl.engine.build import open_images, resolve_device
from dmpctl.engine.codec import codec_record
from dmpctl.engine.generate import in_batches
from dmpctl.engine.patched import Patched, load_result, outputs_of
from dmpctl.engine.rundir import version_of
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import make_folder, write_json
from dmpctl.metrics.features.inception import Inception
from dmpctl.metrics.features.pixels import Pixels
from dmpctl.metrics.frechet import GROUPS, FidEstimate, features_to_fid
from dmpctl.metrics.moments import features_to_moments
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import SMALL_SIDE, Data, Fid
from dmpctl.types import Extractor, Progress, Report, Source

SCHEMA_VERSION = 1
PUBLISHED_N = 50_000
MODELS = (".safetensors", ".pt")  # files that are models, not images


def images_of(source: Source, limit: int | None = None, batch: int = 256) -> Iterable[Tensor]:
    """The images of a source in order, uint8 batches; `limit` None: all."""
    count = len(source) if limit is None else min(limit, len(source))
    for first in range(0, count, batch):
        yield torch.stack([source.item(i)[0] for i in range(first, min(first + batch, count))])


def in_parts(images: Tensor, batch: int = 512) -> Iterable[Tensor]:
    """Images [N, C, H, W] as batches."""
    return (images[first : first + batch] for first in range(0, len(images), batch))


def extract(extractor: Extractor, batches: Iterable[Tensor]) -> Tensor:
    """Features [N, width] float32 on the CPU."""
    found = [extractor(images).cpu() for images in batches]
    if not found:
        raise UsageError("there are no images to measure")
    return torch.cat(found)


def fid(settings: Settings, what: str, progress: Progress) -> Report:
    """Fréchet distance of a run, a folder or an npz to real images; for a run, recorded in its metrics/."""
    device, options = resolve_device(settings.launch), settings.fid
    path = Path(what).expanduser()
    which = settings.result.result_weights
    made = path.suffix in MODELS or any((path / name).is_file() for name in ("config.json", "patch.json"))
    model = load_result(path, which).with_codec(settings) if made else None
    images = measured(path, model, settings, device, progress)
    shape, count = images.shape, images.count
    reference_name = options.reference or (reference_of(model) if model else None)
    if reference_name is None:
        raise UsageError(f"nothing says what to compare {what} with", "add --reference digits or --reference DIR")
    source = open_images(Data(data=reference_name), shape[1], shape[0], settings)
    extractor = build_extractor(options, shape, device)
    _refuse_small(count, extractor, options)
    if settings.console.dry_run:
        return Report(
            {"dry_run": True, "n": count, "extractor": extractor.fingerprint},
            (),
            (f"would compare {count} images", "dry run: nothing was written"),
        )
    reference = features_to_moments([extract(extractor, images_of(source))])
    debias = count > max(extractor.width, 2 * GROUPS - 1)
    estimate = features_to_fid(extract(extractor, images.batches), reference, debias=debias)
    name = metric_name(extractor, estimate.n)
    data = {
        "schema_version": SCHEMA_VERSION,
        "metric": name,
        **asdict(estimate),
        "extractor": extractor.fingerprint,
        "reference": {"name": reference_name, "fingerprint": source.fingerprint, "n": len(source)},
        "images": {"what": str(path.absolute()), "shape": list(shape)},
        "sampling": settings.sampling.model_dump(mode="json", exclude={"sample_batch"}) if model else None,
        "codec": codec_record(model.codec) if model else None,
        "patch": None
        if model is None
        else {"step": model.step, "patch_sha256": model.about.get("sha256"), "backbone_sha256": model.backbone.digest},
        "versions": {name: version_of(name) for name in ("dmpctl", "torch", "torch-fidelity")},
    }
    lines = _warnings(estimate, extractor)
    if model is not None:
        target = _metrics_file(path, name, model, settings)
        write_json(target, data)
        lines = (*lines, f"recorded in {target}")
    error = "" if estimate.standard_error is None else f" ± {estimate.standard_error:.4g}"
    row = {
        "metric": name,
        "value": f"{estimate.value:.4f}{error}",
        "debiased": "" if estimate.debiased is None else f"{estimate.debiased:.4f}",
        "images": str(estimate.n),
        "reference": f"{reference_name} ({len(source)})",
    }
    return Report(data, (row,), lines)


def metric_name(extractor: Extractor, n: int) -> str:
    """A name that carries N: fid50k, fd-pixels-5k."""
    number = f"{n // 1000}k" if n % 1000 == 0 else str(n)
    return f"fid{number}" if extractor.name == "inception" else f"fd-{extractor.name}-{number}"


def _metrics_file(run: Path, name: str, model: Patched, settings: Settings) -> Path:
    sampling = settings.sampling
    folder = make_folder(outputs_of(run) / "metrics")
    return (
        folder
        / f"{name}-{model.step:07d}-{sampling.sampler}-{sampling.steps}-cfg{sampling.cfg:g}-seed{sampling.sample_seed}.json"
    )


def reference_of(model: Patched) -> str | None:
    """The images a run was trained on, by a name that opens them; None if it does not say."""
    if model.about:
        name = model.about["data"]["name"]
        return None if name is None else str(name)
    return model.backbone.data


def build_extractor(options: Fid, shape: tuple[int, int, int], device: torch.device) -> Extractor:
    """The extractor that --extractor names; MissingError where Inception has no weights."""
    kind = options.extractor or ("pixels" if shape[1] < SMALL_SIDE else "inception")
    match kind:
        case "pixels":
            return Pixels(shape[0], shape[1])
        case "inception":
            weights = options.extractor_weights or cached("inception")
            if weights is None:
                raise MissingError(
                    "the Inception extractor needs its weights, weights-inception-2015-12-05-6726825d.pth",
                    "fetch them with dmpctl download inception, add --extractor-weights FILE, or measure with --extractor pixels",
                )
            return Inception(weights, pinned=options.extractor_weights is None, device=device)
        case _:
            assert_never(kind)


def _refuse_small(count: int, extractor: Extractor, options: Fid) -> None:
    if count <= extractor.width and not options.allow_small:
        raise UsageError(
            f"{count} images are too few for {extractor.width} features: the distance would be mostly bias",
            f"compare more than {extractor.width} images, or add --allow-small",
        )


def _warnings(estimate: FidEstimate, extractor: Extractor) -> tuple[str, ...]:
    lines = []
    if extractor.name == "inception" and estimate.n < PUBLISHED_N:
        lines.append(
            f"warning: {estimate.n} images; published numbers use {PUBLISHED_N}, and fewer images give a larger distance"
        )
    if estimate.standard_error is None:
        lines.append(f"warning: no standard error with {estimate.n} images for {extractor.width} features")
    if not getattr(extractor, "known", True):
        lines.append("warning: these are not the published Inception weights; compare with nothing else")
    return tuple(lines)


@dataclass(frozen=True)
class Measured:
    """The images of WHAT: (C, H, W) of one, how many will be compared, and batches that are made or read when asked for."""

    shape: tuple[int, int, int]
    count: int
    batches: Iterable[Tensor]


def measured(path: Path, model: Patched | None, settings: Settings, device: torch.device, progress: Progress) -> Measured:
    """Open WHAT once: a run, a folder of images or an npz; MissingError where it is none of them."""
    most = settings.fid.max_images
    if model is not None:
        sampled = (images for _, images in in_batches(model, range(most), settings.sampling, device, progress))
        return Measured(model.image_shape, most, sampled)
    if path.is_dir():
        folder = ImageFolder(path)
        channels, height, width = folder.item(0)[0].shape
        return Measured((channels, height, width), min(len(folder), most), images_of(folder, most))
    if path.suffix == ".npz" and path.is_file():
        array = _npz_images(path)[:most]
        n, height, width, channels = array.shape
        batches = (torch.from_numpy(np.ascontiguousarray(array[i : i + 256])).permute(0, 3, 1, 2) for i in range(0, n, 256))
        return Measured((channels, height, width), n, batches)
    raise MissingError(f"{path} is no run, no folder of images and no .npz file", "name a run, such as runs/digits")


def _npz_images(path: Path) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """`arr_0` uint8 [N, H, W, 3] of an npz in ADM layout; IntegrityError for anything else. Nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            array = archive["arr_0"]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise IntegrityError(f"{path} holds no arr_0 of images ({error})") from None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise IntegrityError(f"{path}: arr_0 should be uint8 [N, H, W, 3], found {array.dtype} {list(array.shape)}")
    found: np.ndarray[Any, np.dtype[np.uint8]] = array
    return found
