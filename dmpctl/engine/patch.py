"""`dmpctl patch`: train a patch on a frozen backbone, and say with numbers and pictures what it did."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dmpctl.backbones.dit import DiT
from dmpctl.engine import checkpoint
from dmpctl.engine.build import (
    Loaded,
    added_parameters,
    build_codec,
    build_patch,
    load_backbone,
    open_data,
    planned_config,
    resolve_device,
)
from dmpctl.engine.evaluate import SCHEMA_VERSION, Comparison, compare
from dmpctl.engine.generate import contact_sheet, write_picture
from dmpctl.engine.launch import accelerator_for, again_command, science_of
from dmpctl.engine.patched import backbone_digest, describe_patch, lasting_name, load_patch, predict_patched
from dmpctl.engine.rundir import RunDir
from dmpctl.engine.train import Subject, Trainer
from dmpctl.errors import IntegrityError
from dmpctl.files import write_json
from dmpctl.methods.dmp import DmpPatch
from dmpctl.settings.model import Settings
from dmpctl.types import Progress, Report, Source


def patch(settings: Settings, progress: Progress) -> Report:
    """Train into the run directory, going on from its newest checkpoint; then compare with the backbone."""
    planned = planned_config(settings.base)
    if settings.console.dry_run and planned is not None:
        with torch.device("meta"):
            spec = DiT(planned).spec
        return _parameters_only(settings, spec.parameters, *added_parameters(spec, settings.method))
    loaded = load_backbone(settings.base)
    source = open_data(settings.data, loaded.spec, loaded.data)
    module = build_patch(loaded.spec, settings.method)
    codec = build_codec(loaded.spec, source)
    data_name = lasting_name(settings.data.data or str(loaded.data))
    path = (settings.run.run or Path("runs") / Path(data_name).name).expanduser().absolute()
    described = describe_patch(loaded, settings.base, module, data_name, source.fingerprint)
    if settings.console.dry_run:
        return _planned(settings, path, described, source)
    with RunDir(path) as run:
        science = science_of(settings) | {"backbone_sha256": loaded.digest, "data_fingerprint": source.fingerprint}
        run.begin("patch", science, settings.to_dict())
        accelerator = accelerator_for(settings)
        loaded.model.to(accelerator.device)
        trainer = Trainer(_subject(loaded, module, described), loaded.spec, codec, source, settings, run, accelerator)
        started, start = time.perf_counter(), trainer.resume()
        if start < settings.train.iters:
            run.record(
                {
                    "device": str(accelerator.device),
                    "backbone": loaded.origin,
                    "backbone_sha256": loaded.digest,
                    "data_fingerprint": source.fingerprint,
                    "start_step": start,
                }
            )
            trainer.train(progress, again_command())
            refuse_changed_backbone(loaded)
            checkpoint.publish(checkpoint.complete(run.checkpoints)[-1], "patch", run.path)
        seconds = time.perf_counter() - started
        return _report(settings, run, source, described, seconds, start, progress)


def _subject(loaded: Loaded, module: DmpPatch, described: Mapping[str, Any]) -> Subject:
    predict = partial(_predict, loaded.model, module.time_only)
    return Subject("patch", module, module.param_groups(), predict, module.penalty, module.noise_shape(), described)


def _predict(
    backbone: DiT, time_only: bool, module: torch.nn.Module, x_t: Tensor, t: Tensor, cond: Tensor | None, noise: Tensor | None
) -> Any:
    return predict_patched(backbone, module, time_only, x_t, t, cond, noise)


def refuse_changed_backbone(loaded: Loaded) -> None:
    """Invariant 2: every tensor of the backbone is what it was, and none has a gradient."""
    touched = [name for name, p in loaded.model.named_parameters() if p.requires_grad or p.grad is not None]
    if touched or backbone_digest(loaded) != loaded.digest:
        raise IntegrityError(
            f"the backbone changed while its patch was trained{': ' + touched[0] if touched else ''}", "please report this"
        )


def _parameters_only(settings: Settings, backbone: int, added: int, share: float) -> Report:
    """What a shape name alone can tell: how much a patch would add."""
    line = f"{settings.base.base}: {backbone:,} parameters, patch {added:,} (+{share:.2f} %)"
    missing = f"no weights were named, so nothing else was checked: a real run needs --weights FILE for {settings.base.base}"
    data = {
        "dry_run": True,
        "ready": False,
        "base": settings.base.base,
        "backbone_parameters": backbone,
        "added_parameters": added,
        "added_percent": round(share, 4),
    }
    return Report(data, (), (line, missing, "dry run: nothing was written"))


def _planned(settings: Settings, path: Path, described: Mapping[str, Any], source: Source) -> Report:
    backbone = described["backbone"]
    data = {"dry_run": True, "ready": True, "run": str(path), "images": len(source), "iters": settings.train.iters, **described}
    row = {
        "backbone": f"{backbone['base']} ({backbone['parameters']:,})",
        "patch": added_words(described),
        "data": f"{source.name} ({len(source)})",
        "iterations": str(settings.train.iters),
        "run": str(path),
    }
    return Report(data, (row,), ("dry run: nothing was written",))


def _report(
    settings: Settings, run: RunDir, source: Source, described: Mapping[str, Any], seconds: float, start: int, progress: Progress
) -> Report:
    """The table that ends the command; the comparison is made once and kept in metrics/."""
    patched = load_patch(run.path)
    done = start >= settings.train.iters
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "run": str(run.path),
        "step": patched.step,
        "complete": done,
        "train_seconds": round(seconds, 1),
    }
    data |= {"added_parameters": described["added_parameters"], "added_percent": described["added_percent"]}
    first = (
        f"the run was complete already, at step {patched.step}"
        if done
        else f"trained {patched.step - start} steps in {seconds:.0f} s"
    )
    if not settings.evaluate.evaluate:
        return Report(data, (), (first, f"patch: {run.path / 'patch.safetensors'}"))
    began = time.perf_counter()
    found = compare(patched, source, settings, resolve_device(settings.launch), progress)
    eval_seconds = time.perf_counter() - began
    data |= comparison_dict(found, settings) | {"eval_seconds": round(eval_seconds, 1)}
    (run.path / "metrics").mkdir(exist_ok=True)
    write_json(run.path / "metrics" / f"comparison-{patched.step:07d}.json", data)
    sheet = run.path / "before-after.png"
    write_picture(sheet, before_after(found.backbone_images[:32], found.patched_images[:32]))
    lines = (
        f"{first}, compared in {eval_seconds:.0f} s; the patch adds {added_words(described)}",
        f"Fréchet distance: {found.verdict()}",
        f"denoising loss: {found.loss_verdict()}",
        f"patch: {run.path / 'patch.safetensors'}",
        f"look at: {sheet}",
    )
    return Report(data, _table(found), lines)


def added_words(described: Mapping[str, Any]) -> str:
    """Size of a patch for people: `6,554,112 parameters (+1.43 %)`."""
    return f"{described['added_parameters']:,} parameters (+{described['added_percent']:.2f} %)"


def comparison_dict(found: Comparison, settings: Settings) -> dict[str, Any]:
    """The comparison as JSON, with all that fixes its numbers."""
    return {
        "sampling": settings.sampling.model_dump(mode="json", exclude={"sample_batch"}),
        "backbone": asdict(found.backbone),
        "patched": asdict(found.patched),
        "difference": {
            "value": found.difference.value,
            "standard_error": found.difference.standard_error,
            "p_value": found.difference.p_value,
        },
        "noise_floor": found.floor,
        "paired_loss": asdict(found.loss),
        "verdict": found.verdict(),
        "paired_loss_verdict": found.loss_verdict(),
    }


def _table(found: Comparison) -> tuple[dict[str, str], ...]:
    """Backbone, patch and their paired difference, distance and loss."""

    def with_error(value: float, error: float | None, digits: str) -> str:
        return format(value, digits) + ("" if error is None else f" ± {format(abs(error), digits.replace('+', ''))}")

    loss, n = found.loss, found.backbone.n
    rows = (
        ("backbone", with_error(found.backbone.value, found.backbone.standard_error, ".4f"), f"{loss.backbone:.6f}"),
        ("patched", with_error(found.patched.value, found.patched.standard_error, ".4f"), f"{loss.patched:.6f}"),
        (
            "difference (paired)",
            with_error(found.difference.value, found.difference.standard_error, "+.4f"),
            with_error(loss.difference, loss.standard_error, "+.6f"),
        ),
        ("noise floor (real images, half against half)", f"{found.floor:.4f}", ""),
    )
    return tuple(
        {"": name, f"Fréchet distance (pixels, {n} images)": distance, "paired loss": value} for name, distance, value in rows
    )


def before_after(before: Tensor, after: Tensor) -> Image.Image:
    """Backbone's images left, the patch's right, image k of both from the same seed."""
    sheets = [contact_sheet(list(images), columns=4, side=64) for images in (before, after)]
    top, gap = 22, 24
    width = sum(sheet.width for sheet in sheets) + gap
    canvas = Image.new("RGB", (width, sheets[0].height + top), "white")
    draw, x = ImageDraw.Draw(canvas), 0
    for title, sheet in zip(("backbone", "patched (same seeds)"), sheets, strict=True):
        draw.text((x + 6, 5), title, fill="black")
        canvas.paste(sheet, (x, top))
        x += sheet.width + gap
    return canvas
