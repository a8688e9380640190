"""`dmpctl sample`: images from a backbone or its patch. Image k depends on (seed, k) alone."""

import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmpctl.codecs.identity import Identity
from dmpctl.data.scan import BROKEN
from dmpctl.diffusion.guidance import guide
from dmpctl.diffusion.samplers import sample as run_sampler
from dmpctl.diffusion.schedule import NoiseSchedule
from dmpctl.engine.build import resolve_device
from dmpctl.engine.patched import Patched, load_result
from dmpctl.engine.stop import Stop, interrupted
from dmpctl.errors import UsageError
from dmpctl.files import make_folder, read_json, write_atomic, write_json, writing
from dmpctl.rng import ImageDraws, seed_of
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Sampling
from dmpctl.types import Denoiser, Progress, Report

SCHEMA_VERSION = 1


def labels_of(indices: Sequence[int], seed: int, num_classes: int, label: int | None) -> Tensor | None:
    """Label of each image, int64 [B]: `label`, or (None) drawn from (seed, index); None for an unconditional backbone."""
    if num_classes == 0:
        if label is not None:
            raise UsageError("--label needs a class-conditional backbone, this one is not", "leave --label out")
        return None
    if label is not None and label >= num_classes:
        raise UsageError(f"--label {label} is out of range: this backbone has classes 0 to {num_classes - 1}")
    return torch.tensor([seed_of(seed, "label", i) % num_classes if label is None else label for i in indices])


def denoiser_of(
    model: Patched, indices: Sequence[int], settings: Sampling, device: torch.device, label: int | None = None
) -> Denoiser:
    """What the sampler calls for these images; UsageError where the label or the guidance does not suit the backbone."""
    spec = model.backbone.spec
    labels = labels_of(indices, settings.sample_seed, spec.num_classes, label)
    cond = None if labels is None else labels.to(device)
    return guide(model.predict, cond, spec.null_class, settings.cfg, settings.cfg_channels)


@torch.inference_mode()
def generate(
    model: Patched, indices: Sequence[int], settings: Sampling, device: torch.device, label: int | None = None
) -> Tensor:
    """Images of these indices, uint8 [B, C, H, W] on the CPU, denoised at once."""
    spec = model.backbone.spec
    denoiser = denoiser_of(model, indices, settings, device, label)
    draw = ImageDraws(settings.sample_seed, indices, spec.latent_shape, device)
    schedule = NoiseSchedule.from_spec(spec.schedule).to(device)
    latents = run_sampler(denoiser, draw, schedule, spec.learned_sigma, settings.sampler, settings.steps, settings.eta)
    return Identity().decode(latents).cpu()


def in_batches(
    model: Patched, indices: Sequence[int], settings: Sampling, device: torch.device, progress: Progress, label: int | None = None
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """(indices, images uint8 [B, C, H, W]) batch by batch; stops after a batch if a signal came, raising Interrupted."""
    model.to(device)
    with Stop() as stop, progress.track("sampling", len(indices)) as task:
        for first in range(0, len(indices), settings.sample_batch):
            part = indices[first : first + settings.sample_batch]
            yield part, generate(model, part, settings, device, label)
            task.advance(len(part))
            if stop.got:
                raise interrupted(stop.got, f"after {first + len(part)} of {len(indices)} images", "give the same command again")


def folder_name(model: Patched, settings: Sampling) -> str:
    """<step>-<sampler>-<steps>-cfg<g>, as the run directory names its samples."""
    return f"{model.step:07d}-{settings.sampler}-{settings.steps}-cfg{settings.cfg:g}"


def sample(settings: Settings, run: Path, progress: Progress) -> Report:
    """Write images of a run: a PNG folder and a contact sheet, or one npz in ADM layout. What is there already is kept."""
    model = load_result(run)
    if settings.images.unpatched:
        model = model.unpatched()
    wanted, sampling = settings.images, settings.sampling
    name = folder_name(model, sampling) + ("-backbone" if model.patch is None else "")
    folder = (wanted.out or run.expanduser() / "samples" / name).absolute()
    about = {
        "schema_version": SCHEMA_VERSION,
        "sampling": sampling.model_dump(mode="json", exclude={"sample_batch"}),
        "label": wanted.image_label,
        "backbone_sha256": model.backbone.digest,
        "patch_sha256": model.about.get("sha256"),
        "step": model.step,
    }
    device = resolve_device(settings.launch)
    denoiser_of(model, [0], sampling, device, wanted.image_label)  # what does not fit fails before anything is written
    if settings.console.dry_run:
        return Report(
            {"dry_run": True, "out": str(folder), **about},
            (),
            (f"would write {wanted.num_images} images to {folder}", "dry run: nothing was written"),
        )
    begin_samples(folder, about)
    if wanted.image_format == "npz":
        target = folder / f"{wanted.num_images}.npz"
        batches = in_batches(model, range(wanted.num_images), sampling, device, progress, wanted.image_label)
        write_npz(target, (images for _, images in batches), wanted.num_images)
        made = wanted.num_images
    else:
        missing = [k for k in range(wanted.num_images) if not is_png(folder / f"{k:06d}.png")]
        for part, images in in_batches(model, missing, sampling, device, progress, wanted.image_label):
            write_pngs(folder, part, images)
        made, target = len(missing), folder / "contact-sheet.png"
        write_contact_sheet(target, [read_png(folder / f"{k:06d}.png") for k in range(min(64, wanted.num_images))])
    kept = wanted.num_images - made
    data = {"out": str(folder), "images": wanted.num_images, "made": made, "kept": kept, **about}
    row = {
        "images": str(wanted.num_images),
        "made now": str(made),
        "sampler": f"{sampling.sampler} {sampling.steps}",
        "seed": str(sampling.sample_seed),
    }
    return Report(data, (row,), (f"images: {folder}", f"look at: {target}"))


def begin_samples(folder: Path, about: dict[str, Any]) -> None:
    """Make the folder; UsageError if it holds images made in another way."""
    path = folder / "samples.json"
    if path.is_file():
        before = read_json(path, SCHEMA_VERSION)
        changed = [key for key in about if before.get(key) != json.loads(json.dumps(about[key]))]
        if changed:
            raise UsageError(
                f"{folder} holds images made with another {', '.join(changed)}", "name another --out, or remove that folder"
            )
        return
    if folder.is_dir() and any(not leftover.name.startswith(".samples.json.") for leftover in folder.iterdir()):
        raise UsageError(f"{folder} is not empty and holds no samples of dmpctl", "name another --out")
    write_json(make_folder(folder) / path.name, about)


def to_image(image: Tensor) -> Image.Image:
    """uint8 [C, H, W] with 1 or 3 channels as a picture."""
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def write_pngs(folder: Path, indices: Sequence[int], images: Tensor) -> None:
    """Write images under their six-digit index; a half-written file never bears that name."""
    for index, image in zip(indices, images, strict=True):
        final = folder / f"{index:06d}.png"
        temporary = final.with_name(f".{final.name}")
        with writing(final):
            to_image(image).save(temporary, "PNG")
            temporary.replace(final)


def is_png(path: Path) -> bool:
    """Whether a complete PNG is there."""
    try:
        with Image.open(path) as image:
            image.load()
    except BROKEN:
        return False
    return True


def read_png(path: Path) -> Tensor:
    """A PNG as uint8 [C, H, W]."""
    with Image.open(path) as image:
        array = np.asarray(image)
    return torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def contact_sheet(images: Sequence[Tensor], columns: int = 8, side: int = 96) -> Image.Image:
    """Images uint8 [C, H, W] on one white sheet, enlarged in whole steps so that small pixels stay square."""
    _, height, width = images[0].shape
    factor = max(1, side // max(height, width))
    gap = 4
    rows = -(-len(images) // columns)
    cell_w, cell_h = width * factor + gap, height * factor + gap
    sheet = Image.new("RGB", (min(columns, len(images)) * cell_w + gap, rows * cell_h + gap), "white")
    for position, image in enumerate(images):
        row, column = divmod(position, columns)
        picture = to_image(image).convert("RGB").resize((width * factor, height * factor), Image.Resampling.NEAREST)
        sheet.paste(picture, (gap + column * cell_w, gap + row * cell_h))
    return sheet


def write_picture(path: Path, picture: Image.Image) -> None:
    """Atomically write a PNG."""
    import io

    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def write_contact_sheet(path: Path, images: Sequence[Tensor]) -> None:
    """Atomically write a contact sheet."""
    write_picture(path, contact_sheet(images))


def write_npz(path: Path, batches: Iterator[Tensor], count: int) -> None:
    """Stream images into `arr_0` uint8 [N, H, W, 3] of an npz, the layout of ADM's evaluator; grey is repeated.

    One batch is in memory at a time.
    """
    temporary = path.with_name(f".{path.name}")
    try:
        with (
            writing(path),
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as file,
        ):
            _write_array(file, batches, count)  # type: ignore[arg-type]  # a zip member is a binary file
        with writing(path):
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _write_array(file: BinaryIO, batches: Iterator[Tensor], count: int) -> None:
    for number, images in enumerate(batches):
        colour = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
        if number == 0:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *colour.shape[1:])}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(colour.tobytes())
