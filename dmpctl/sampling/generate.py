"""`dmpctl sample`: images from a backbone or its patch. Image k depends on (seed, k) alone."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from dmpctl.diffusion.guidance import Predict, guide
from dmpctl.diffusion.samplers import refuse_other_kind
from dmpctl.diffusion.samplers import sample as run_sampler
from dmpctl.diffusion.schedule import schedule_of
from dmpctl.errors import UsageError
from dmpctl.files import make_folder, plain_json, read_json, sha256_of_json, write_json, writing
from dmpctl.models.codec import latent_record
from dmpctl.models.conditions import Conditions, Labels, encoder_record
from dmpctl.models.patch_files import folded_into, load_result, outputs_of
from dmpctl.models.patched import Patched
from dmpctl.models.speed import compile_blocks
from dmpctl.processes.command import Command
from dmpctl.processes.ranks import Ranks
from dmpctl.processes.stop import Stop
from dmpctl.processes.threads import threads_for
from dmpctl.rng import ImageDraws, seed_of
from dmpctl.sampling.foresight import foresee
from dmpctl.sampling.pictures import contact_sheet, png_of, read_png, sealed_pngs, write_npz, write_picture, write_pngs
from dmpctl.settings.measuring import Sampling
from dmpctl.settings.model import Settings
from dmpctl.types import Denoiser, Progress, Report

SCHEMA_VERSION = 2  # 1: images without a seal
BATCH = 256  # images held at once while an npz is put together


def labels_of(indices: Sequence[int], seed: int, num_classes: int, label: int | None) -> Tensor | None:
    """Label of each image, int64 [B]: `label`, or (None) drawn from (seed, index); None for an unconditional backbone."""
    refuse_label(label, num_classes)
    if num_classes == 0:
        return None
    return torch.tensor([seed_of(seed, "label", i) % num_classes if label is None else label for i in indices])


def refuse_label(label: int | None, num_classes: int) -> None:
    """UsageError for a label that the backbone does not have."""
    if label is not None and num_classes == 0:
        raise UsageError("--label needs a class-conditional backbone, this one is not", "leave --label out")
    if label is not None and label >= num_classes:
        raise UsageError(f"--label {label} is out of range: this backbone has classes 0 to {num_classes - 1}")


def denoiser_of(
    model: Patched, indices: Sequence[int], settings: Sampling, device: torch.device, label: int | None = None
) -> Denoiser:
    """Returns the function that the sampler calls for these images.

    UsageError where label, guidance or sampler does not suit the backbone.
    """
    spec = model.backbone.spec
    refuse_other_kind(settings.sampler, spec.schedule.kind == "flow")
    cond, null = conditions_of(model, indices, settings.sample_seed, label, device)
    whole: Predict = model.in_precision(settings.sample_precision).predict
    # Images at one timestep and without labels: what depends on these is computed once for all.
    alike = cond is None and settings.sampler != "dopri5"  # each image of which is at a time of its own
    predict: Predict = whole if not alike else lambda x, t, cond: whole(x, t[:1], cond)
    channels = settings.cfg_channels if settings.cfg_channels != "auto" else "all" if spec.text else "3"
    return guide(predict, cond, null, settings.cfg, channels)


def conditions_of(
    model: Patched, indices: Sequence[int], seed: int, label: int | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Conditions of these images and the null condition [1, ...]; None where there are none."""
    spec = model.backbone.spec
    labels = labels_of(indices, seed, spec.num_classes, label)
    told: Conditions = Labels(spec.null_class)
    if spec.text is not None:
        if model.prompts is None:
            raise ValueError("a text-conditional backbone needs prompts (Patched.with_prompts)")
        told = model.prompts.captions
        labels = torch.tensor([k % len(told) for k in indices])
    if labels is None:
        return None, None
    null = told.nothing()
    return told.of(labels).to(device), None if null is None else null.to(device)


@torch.no_grad()  # not inference_mode: a model that is moved in here is trained later
def generate(
    model: Patched, indices: Sequence[int], settings: Sampling, device: torch.device, label: int | None = None
) -> Tensor:
    """Images of these indices, uint8 [B, C, H, W] on the CPU, denoised at once."""
    spec = model.backbone.spec
    denoiser = denoiser_of(model, indices, settings, device, label)
    draw = ImageDraws(settings.sample_seed, indices, spec.latent_shape, device)
    schedule = schedule_of(spec.schedule, spec.inference).to(device)
    latents = run_sampler(denoiser, draw, schedule, spec.learned_sigma, settings.sampler, settings.steps, settings.eta)
    return model.codec.decode(latents).cpu()


def in_batches(
    model: Patched, indices: Sequence[int], settings: Sampling, device: torch.device, progress: Progress, label: int | None = None
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """(indices, images uint8 [B, C, H, W]) batch by batch; a signal ends it in the middle of one, raising Interrupted."""
    model.to(device)
    done = 0
    shown = progress.track("sampling", len(indices))
    with Stop(lambda: f"after {done} of {len(indices)} images", "give the same command again") as stop, shown as task:
        for first in range(0, len(indices), settings.sample_batch):
            part = indices[first : first + settings.sample_batch]
            with stop.soon(), threads_for(model.backbone.spec.parameters):
                images = generate(model, part, settings, device, label)
            yield part, images
            done += len(part)
            task.advance(len(part))
            stop.check()


def sample(settings: Settings, run: Path, progress: Progress) -> Report:
    """Writes images of a run: a PNG folder and a contact sheet, or one npz in ADM layout. What is there already is kept."""
    command, wanted, sampling = Command.begin(settings, progress), settings.images, settings.sampling
    model = load_result(run, settings.result.result_weights).with_codec(settings, progress)
    model = model.with_prompts(settings, wanted.num_images, progress)
    model = model.unpatched() if wanted.unpatched else model
    folder = (wanted.out or samples_folder(run, model, sampling)).absolute()
    about = samples_about(model, settings)
    denoiser_of(model, [0], sampling, command.device, wanted.image_label)  # what does not fit fails before anything is written
    if settings.console.dry_run:
        lines = (f"would write {wanted.num_images} images to {folder}", "dry run: nothing was written")
        return Report({"dry_run": True, "out": str(folder), **about}, (), lines)
    compile_blocks(model.network, settings.launch)
    if command.ranks.is_main:
        begin_samples(folder, about)
    command.ranks.wait()
    write = _write_npz if wanted.image_format == "npz" else _write_folder
    made, target = write(folder, model, command)
    counts = {"images": wanted.num_images, "made": made, "kept": wanted.num_images - made}
    row = {
        "images": str(wanted.num_images),
        "made now": str(made),
        "sampler": f"{sampling.sampler} {sampling.steps}",
        "seed": str(sampling.sample_seed),
    }
    return Report({"out": str(folder), **counts, **about}, (row,), (f"images: {folder}", f"look at: {target}"))


def _write_npz(folder: Path, model: Patched, command: Command) -> tuple[int, Path]:
    """Makes all images, in all processes, into one npz; returns how many, and the file."""
    wanted, ranks = command.settings.images, command.ranks
    count, target = wanted.num_images, folder / f"{wanted.num_images}.npz"
    mine = ranks.mine(range(count))
    foresee(model, len(mine), command.settings.sampling, ranks.device, command.progress, "fewer --num-images")
    batches = in_batches(model, mine, command.settings.sampling, ranks.device, command.progress, wanted.image_label)
    with images_of_all(target, batches, (count, *model.image_shape), ranks) as everything:
        if ranks.is_main:
            write_npz(target, everything, count)
    return count, target


def _write_folder(folder: Path, model: Patched, command: Command) -> tuple[int, Path]:
    """Makes the images whose PNG is missing; returns how many, and the contact sheet."""
    wanted, ranks = command.settings.images, command.ranks
    mine, key = ranks.mine(range(wanted.num_images)), samples_key(folder, command.progress)
    missing = [k for k in mine if k not in sealed_pngs(folder, [k], key, command.progress)]
    foresee(model, len(missing), command.settings.sampling, ranks.device, command.progress, "fewer --num-images")
    batches = in_batches(model, missing, command.settings.sampling, ranks.device, command.progress, wanted.image_label)
    for part, images in batches:
        write_pngs(folder, part, images, key)
    made, target = ranks.total(len(missing)), folder / "contact-sheet.png"  # when all are done
    if ranks.is_main:
        shown = [read_png(png_of(folder, k)) for k in range(min(64, wanted.num_images))]
        write_picture(target, contact_sheet(shown))
    return made, target


@contextmanager
def images_of_all(
    target: Path, batches: Iterable[tuple[Sequence[int], Tensor]], shape: tuple[int, ...], ranks: Ranks
) -> Iterator[Iterator[Tensor]]:
    """Images [N, C, H, W] of this `shape` in order, in batches, of which each process makes its own; through the disk.

    One process has them in order already.
    """
    if ranks.world == 1:
        yield (images for _, images in batches)
        return
    path = target.with_name(f".{target.name}.npy")
    try:
        if ranks.is_main:
            with writing(path):
                open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).flush()
        ranks.wait()
        held = open_memmap(path, mode="r+")
        for indices, images in batches:
            held[np.asarray(indices)] = images.numpy()
        held.flush()
        ranks.wait()
        yield (torch.from_numpy(held[first : first + BATCH]) for first in range(0, shape[0], BATCH))
        ranks.wait()
    finally:
        if ranks.is_main:
            path.unlink(missing_ok=True)


def samples_folder(run: Path, model: Patched, sampling: Sampling) -> Path:
    """Where images of a run lie unless --out says otherwise: samples/<step>-<sampler>-<steps>-cfg<g>..."""
    name = f"{model.step:07d}-{sampling.sampler}-{sampling.steps}-cfg{sampling.cfg:g}"
    if model.patch is None:
        name += f"-merged-{method}" if (method := folded_into(run)) else "-backbone"
    if model.prompts is not None:
        name += f"-{sha256_of_json(dict(model.prompts.about))[:8]}"
    return outputs_of(run) / "samples" / name


def samples_about(model: Patched, settings: Settings) -> dict[str, Any]:
    """All that shapes the images of a run, as samples.json records it."""
    codec = latent_record(model.codec)
    return {
        "schema_version": SCHEMA_VERSION,
        "sampling": settings.sampling.model_dump(mode="json", exclude={"sample_batch"}),
        "label": settings.images.image_label,
        "backbone_sha256": model.backbone.digest,
        "patch_sha256": model.patch_sha256,
        "step": model.step,
        "codec": codec and codec.to_json(),
        **prompts_record(model),
    }


def prompts_record(model: Patched) -> dict[str, Any]:
    """Prompts and text encoder, as measurements and samples record them; {} where the images show no prompts."""
    text = encoder_record(model.text)
    return {"prompts": dict(model.prompts.about), "text": text and text.to_json()} if model.prompts else {}


def samples_key(folder: Path, progress: Progress) -> str | None:
    """Returns the key that a folder's images are sealed with: the sha256 of its samples.json; None, said, for an older one."""
    about = read_json(folder / "samples.json", SCHEMA_VERSION)
    if about["schema_version"] > 1:
        return sha256_of_json(about)
    progress.say(f"{folder} was begun by an older dmpctl: nothing says whether its images are what was made")
    return None


def begin_samples(folder: Path, about: dict[str, Any]) -> None:
    """Make the folder; UsageError if it holds images made in another way."""
    path = folder / "samples.json"
    if path.is_file():
        before = read_json(path, SCHEMA_VERSION)
        changed = [key for key, value in plain_json(about).items() if key != "schema_version" and before.get(key) != value]
        if changed:
            raise UsageError(
                f"{folder} holds images made with another {', '.join(changed)}", "name another --out, or remove that folder"
            )
        return
    if folder.is_dir() and any(not leftover.name.startswith(".samples.json.") for leftover in folder.iterdir()):
        if path.is_file():  # another process has just begun them
            return begin_samples(folder, about)
        raise UsageError(f"{folder} is not empty and holds no samples of dmpctl", "name another --out")
    write_json(make_folder(folder) / path.name, about)
