"""`dmpctl patch`: train a patch on a frozen backbone, and say with numbers and pictures what it did."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dmpctl.backbones.dit_weights import digest_of
from dmpctl.comparing import before_after
from dmpctl.comparing.paired_loss import error_profile
from dmpctl.diffusion.samplers import refuse_other_kind
from dmpctl.errors import IntegrityError
from dmpctl.images.inventory import recorded
from dmpctl.models.backbone import Loaded, is_planned, load_backbone, planned_model
from dmpctl.models.build import build_codec, build_patch
from dmpctl.models.codec import latent_record
from dmpctl.models.conditions import captions_of, encoder_record, open_encoder
from dmpctl.models.patch_files import backbone_digest, describe_patch, lasting_name, load_patch
from dmpctl.models.patched import Patched
from dmpctl.models.sources import open_data, refuse_loss
from dmpctl.models.speed import state_as_cast
from dmpctl.processes.accelerator import accelerator_for
from dmpctl.processes.command import Command
from dmpctl.runs.records import DataRecord, PatchDescription
from dmpctl.runs.rundir import RunDir
from dmpctl.sampling.generate import denoiser_of
from dmpctl.settings.model import Settings
from dmpctl.store.locate import fetch_weights, lasting_data, locate
from dmpctl.training.session import Session, Trained, train_in
from dmpctl.training.subject import Subject
from dmpctl.types import Codec, Progress, Report, Source

SCHEMA_VERSION = 1
HELD_OUT, ENOUGH = 0.05, 2_000  # share of the images that is not trained on, from so many on: of fewer it is too few to tell


def patch(settings: Settings, progress: Progress) -> Report:
    """Train into the run directory, going on from its newest checkpoint; then compare with the backbone."""
    if settings.console.dry_run and is_planned(settings.base):
        return _parameters_only(settings)
    settings = with_weights_here(settings, progress)
    loaded = load_backbone(settings.base, settings.data.data)
    loaded.tell(progress)
    codec = build_codec(loaded, settings)
    source = open_data(settings.data, loaded.spec, codec, loaded.data, settings, progress)
    refuse_loss(source, settings.data, settings.base.base)
    session = session_of(settings, loaded, codec, source)
    if settings.evaluate.evaluate:
        refuse_sampling(settings, loaded, source)
    path = (settings.run.run or Path("runs") / Path(str(session.subject.described.data.name)).name).expanduser().absolute()
    settings = with_held_out(settings, RunDir(path, False), len(source))
    if settings.console.dry_run:
        return _planned(settings, path, session)
    accelerator = accelerator_for(settings)
    with RunDir(path, accelerator.is_main_process) as run:
        loaded.model.to(accelerator.device)
        cast = settings.base.backbone_dtype != "float32"
        expected = digest_of(state_as_cast(loaded.model)) if cast else loaded.digest
        if settings.evaluate.evaluate and accelerator.is_main_process:
            before_after.foresee_images(Patched(loaded, codec=codec), run.path, settings, accelerator.device, progress)
        trained = train_in(run, session, settings, accelerator, progress)
        refuse_changed_backbone(loaded, expected)
        if not accelerator.is_main_process:  # what is left is rank 0's, and no collective
            return Report({})
        return _report(settings, run, session, trained, progress)


def with_held_out(settings: Settings, run: RunDir, count: int) -> Settings:
    """Settings whose --held-out is a number; None, which holds nothing out, for a run that was begun before there was one."""
    share = settings.evaluate.held_out
    if (run.path / "config.json").is_file() and "held_out" not in run.config().science:
        share = share or None
    elif share is None:
        share = HELD_OUT if count >= ENOUGH else 0.0
    return settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"held_out": share})})


def with_weights_here(settings: Settings, progress: Progress) -> Settings:
    """Settings whose --weights are a file on this disk, fetched first if they are an address.

    A --base or --data that is a row of the settings file becomes its path: the patch can be used without that file.
    """
    base, own = settings.base, {row.name: row for row in settings.assets.rows}
    if base.weights is not None:
        base = base.model_copy(update={"weights": fetch_weights(base.weights, settings, progress)})
    if base.base in own and not Path(base.base).expanduser().exists():
        base = base.model_copy(update={"base": str(locate(base.base, "backbone", settings))})
    data = settings.data
    if data.data is not None:
        data = data.model_copy(update={"data": lasting_data(data.data, settings)})
    return settings.model_copy(update={"base": base, "data": data})


def refuse_sampling(settings: Settings, loaded: Loaded, source: Source) -> None:
    """UsageError now, not after training, for a comparison that cannot be: guidance, sampler, data without captions."""
    if loaded.spec.text is None:
        denoiser_of(Patched(loaded), [0], settings.sampling, torch.device("cpu"))
    else:
        refuse_other_kind(settings.sampling.sampler, flow=False)
        captions_of(source, 0)


def session_of(settings: Settings, loaded: Loaded, codec: Codec, source: Source) -> Session[PatchDescription]:
    """The training of a fresh patch on this backbone."""
    loaded.model.recompute = settings.train.grad_checkpoint
    module = build_patch(loaded.model, settings.method, settings.run.seed)
    text = open_encoder(settings, loaded.spec, loaded.text)
    columns = settings.data.model_dump(include={"image_column", "label_column", "caption_column"}, exclude_none=True)
    name = lasting_name(settings.data.data or str(loaded.data))  # which still means the same from another folder
    named = {"columns": columns} if columns else {}  # else the record has no such key
    data = DataRecord(name=name, fingerprint=source.fingerprint, **named)
    described = describe_patch(loaded, settings.base, settings.method, module, data, latent_record(codec), encoder_record(text))
    return Session(
        Subject(loaded.model, module, described),
        codec,
        source,
        text,
        digests={"backbone_sha256": loaded.digest, "data_fingerprint": source.fingerprint},
        facts={"backbone": loaded.origin, "assumed": list(loaded.assumed)},
        profile=partial(error_profile, Patched(loaded, codec=codec, text=text), source, settings.run.seed),
    )


def refuse_changed_backbone(loaded: Loaded, expected: str | None = None) -> None:
    """Invariant 2: every tensor of the backbone is what it was, and none has a gradient.

    `expected`: its digest, None: the one it was loaded with.
    """
    touched = [name for name, p in loaded.model.named_parameters() if p.requires_grad or p.grad is not None]
    if touched or backbone_digest(loaded) != (expected or loaded.digest):
        raise IntegrityError(
            f"the backbone changed while its patch was trained{': ' + touched[0] if touched else ''}", "please report this"
        )


def _parameters_only(settings: Settings) -> Report:
    """All that a shape name alone can tell: how much a patch would add."""
    with torch.device("meta"):
        shape = planned_model(settings.base)
        base, backbone, added = settings.base.base, shape.spec.parameters, build_patch(shape, settings.method).added
    share = 100 * added / backbone
    data = {"dry_run": True, "ready": False, "base": base, "backbone_parameters": backbone}
    data |= {"added_parameters": added, "added_percent": round(share, 4)}
    line = f"{base}: {backbone:,} parameters, patch {added:,} (+{share:.2f} %)"
    missing = f"no weights were named, so nothing else was checked: a real run needs --weights FILE for {base}"
    return Report(data, (), (line, missing, "dry run: nothing was written"))


def _planned(settings: Settings, path: Path, session: Session[PatchDescription]) -> Report:
    described, source = session.subject.described, session.source
    backbone = described.backbone
    data = {"dry_run": True, "ready": True, "run": str(path), "images": len(source), "iters": settings.train.iters}
    data |= described.to_json() | recorded(source)
    row = {
        "backbone": f"{backbone.base} ({backbone.parameters:,})",
        "patch": described.added_words,
        "data": f"{source.name} ({len(source)})",
        "iterations": str(settings.train.iters),
        "run": str(path),
    }
    return Report(data, (row,), ("dry run: nothing was written",))


def _report(settings: Settings, run: RunDir, session: Session[PatchDescription], trained: Trained, progress: Progress) -> Report:
    """The table that ends the command. The comparison is made once: a complete run shows what it has recorded."""
    patched, described = replace(load_patch(run.path), codec=session.codec, text=session.text), session.subject.described
    data: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "run": str(run.path), "step": patched.step}
    data |= {"patch_sha256": patched.patch_sha256, "train_seconds": round(trained.seconds, 1)}
    data |= {"skipped_steps": trained.skipped, **recorded(session.source)}
    data |= {"added_parameters": described.added_parameters, "added_percent": described.added_percent}
    first = f"trained {trained.step - trained.start} steps in {trained.seconds:.0f} s"
    if trained.was_complete:
        first = f"the run was complete already, at step {patched.step}"
    first += f"{trained.skipped_words}; the patch adds {described.added_words}"
    where = f"patch: {run.path / 'patch.safetensors'}"
    if not settings.evaluate.evaluate:
        return Report(data, (), (first, where))
    found = before_after.recorded(patched, session.source, run.path, Command.alone(settings, progress))
    data |= found.model_dump(mode="json")
    lines = (
        first,
        *([f"Fréchet distance: {found.verdict}"] if found.difference else [f"Fréchet distance: {found.no_distance}"]),
        f"denoising loss: {found.paired_loss_verdict}",
        where,
        f"look at: {run.path / 'before-after.png'}",
    )
    return Report(data, before_after.table(found), lines)
