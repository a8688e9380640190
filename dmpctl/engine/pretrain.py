"""`dmpctl pretrain`: a backbone from scratch, as real DiTs are trained."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.backbones.dit_weights import digest_of, dit_metadata
from dmpctl.codecs.identity import Identity
from dmpctl.data.source import open_source
from dmpctl.engine.launch import accelerator_for
from dmpctl.engine.patched import lasting_name
from dmpctl.engine.rundir import RunDir
from dmpctl.engine.session import Session, Trained, train_in
from dmpctl.engine.train import Subject
from dmpctl.errors import UsageError
from dmpctl.files import read_tensors
from dmpctl.rng import seed_of
from dmpctl.settings.model import Settings
from dmpctl.types import Progress, Report, Routing, ScheduleSpec, Source


def config_for(settings: Settings, source: Source) -> DiTConfig:
    """The shape that the settings ask for, on these images; UsageError where they do not fit."""
    shape = settings.shape
    channels, size, _ = source.item(0)[0].shape
    if size % shape.patch_size:
        raise UsageError(f"--patch-size {shape.patch_size} does not divide images of side {size}", "take a divisor of the side")
    if shape.class_conditional and not source.num_classes:
        raise UsageError("--class-conditional needs labels, and this data has none", "put the images into one folder per class")
    return DiTConfig(
        size,
        channels,
        shape.patch_size,
        shape.hidden_size,
        shape.depth,
        shape.num_heads,
        source.num_classes if shape.class_conditional else 0,
        learned_sigma=shape.learned_sigma,
    )


def predict(
    module: nn.Module, x_t: Tensor, t: Tensor, cond: Tensor | None, gate_noise: Tensor | None
) -> tuple[Tensor, Routing | None]:
    """A backbone alone: no gates."""
    return module(x_t, t, cond), None


def no_penalty(routing: Routing | None) -> dict[str, Tensor]:
    """A backbone alone has nothing to balance."""
    return {}


def default_run(settings: Settings, source: Source) -> Path:
    return settings.run.run or Path("runs") / f"pretrain-{Path(source.name).name}"


def pretrain(settings: Settings, progress: Progress) -> Report:
    """Train a backbone into its run directory, going on from the newest checkpoint; a finished run says so."""
    if settings.data.data is None:
        raise UsageError("nothing says which images to train on", "add --data digits or --data DIR")
    source = open_source(settings.data, settings.data.size, settings.data.channels)
    config = config_for(settings, source)
    schedule = ScheduleSpec(settings.shape.schedule)
    path = default_run(settings, source).expanduser().absolute()
    facts = {"config": asdict(config), "schedule": asdict(schedule), "data": source.name, "images": len(source)}
    if settings.console.dry_run:
        return _planned(config, facts, path)
    model = DiT(config, schedule)
    model.initialise(torch.Generator().manual_seed(seed_of(settings.run.seed, "initialise")))
    subject = Subject(
        "backbone",
        model.train(),
        [{"params": list(model.parameters()), "lr": settings.pretrain.lr}],
        predict,
        no_penalty,
        None,
        {"schema_version": 1, **facts},
    )
    digests = {"data_fingerprint": source.fingerprint}
    metadata = dit_metadata(config, schedule, lasting_name(settings.data.data))
    session = Session("pretrain", subject, model.spec, Identity(), source, digests, facts, metadata)
    with RunDir(path) as run:
        return _finished(run, config, facts, train_in(run, session, settings, accelerator_for(settings), progress))


def _planned(config: DiTConfig, facts: dict[str, Any], path: Path) -> Report:
    return Report(
        {"dry_run": True, "run": str(path), "parameters": config.parameters(), **facts},
        ({"run": str(path), "parameters": f"{config.parameters():,}", "images": str(facts["images"])},),
        ("dry run: nothing was written",),
    )


def _finished(run: RunDir, config: DiTConfig, facts: dict[str, Any], trained: Trained) -> Report:
    digest = digest_of(read_tensors(run.path / "backbone.safetensors")[0])
    data = {
        "run": str(run.path),
        "step": trained.step,
        "seconds": round(trained.seconds, 1),
        "parameters": config.parameters(),
        "backbone_sha256": digest,
        **facts,
    }
    row = {
        "step": str(trained.step),
        "parameters": f"{config.parameters():,}",
        "seconds": f"{trained.seconds:.0f}",
        "backbone": str(run.path / "backbone.safetensors"),
    }
    how = "the run was complete already" if trained.was_complete else "done"
    return Report(data, (row,), (f"{how}: patch it with: dmpctl patch --base {run.path}",))
