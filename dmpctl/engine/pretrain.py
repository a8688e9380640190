"""`dmpctl pretrain`: a backbone from scratch, as real DiTs are trained."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.backbones.dit_weights import digest_of, dit_metadata
from dmpctl.codecs.identity import Identity
from dmpctl.data.source import open_source
from dmpctl.engine import checkpoint
from dmpctl.engine.launch import accelerator_for, again_command, science_of
from dmpctl.engine.patched import lasting_name
from dmpctl.engine.rundir import RunDir
from dmpctl.engine.train import Subject, Trainer
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
    accelerator = accelerator_for(settings)
    subject = Subject(
        "backbone",
        model.train(),
        [{"params": list(model.parameters()), "lr": settings.pretrain.lr}],
        predict,
        no_penalty,
        None,
        {"schema_version": 1, **facts},
    )
    with RunDir(path) as run:
        science = science_of(settings) | {"data_fingerprint": source.fingerprint}
        run.refuse_other("pretrain", science)
        trainer = Trainer(subject, model.spec, Identity(), source, settings, run, accelerator)
        started, start = time.perf_counter(), trainer.resume()
        done = start >= settings.train.iters
        if not done:
            session = {"device": str(accelerator.device), "data_fingerprint": source.fingerprint, "start_step": start}
            for line in run.differences(settings.to_dict()):
                progress.say(line)
            run.begin("pretrain", science, settings.to_dict(), session | facts)
            trainer.train(progress, again_command())
        newest = checkpoint.complete(run.checkpoints)[-1]
        checkpoint.publish(newest, "backbone", run.path, dit_metadata(config, schedule, lasting_name(settings.data.data)))
        seconds = 0.0 if done else time.perf_counter() - started
        return _finished(run, config, facts, seconds, trainer.step, "the run was complete already" if done else "done")


def _planned(config: DiTConfig, facts: dict[str, Any], path: Path) -> Report:
    return Report(
        {"dry_run": True, "run": str(path), "parameters": config.parameters(), **facts},
        ({"run": str(path), "parameters": f"{config.parameters():,}", "images": str(facts["images"])},),
        ("dry run: nothing was written",),
    )


def _finished(run: RunDir, config: DiTConfig, facts: dict[str, Any], seconds: float, step: int, how: str) -> Report:
    digest = digest_of(read_tensors(run.path / "backbone.safetensors")[0])
    data = {
        "run": str(run.path),
        "step": step,
        "seconds": round(seconds, 1),
        "parameters": config.parameters(),
        "backbone_sha256": digest,
        **facts,
    }
    row = {
        "step": str(step),
        "parameters": f"{config.parameters():,}",
        "seconds": f"{seconds:.0f}",
        "backbone": str(run.path / "backbone.safetensors"),
    }
    return Report(data, (row,), (f"{how}: patch it with: dmpctl patch --base {run.path}",))
