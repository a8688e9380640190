"""`dmpctl pretrain`: a backbone from scratch, as real DiTs are trained."""

from pathlib import Path

import torch
from torch import Tensor, nn

from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.backbones.dit_weights import digest_of
from dmpctl.backbones.pixart import PixArt, fresh
from dmpctl.codecs.identity import Identity
from dmpctl.codecs.text import TextEncoder
from dmpctl.data.source import open_source
from dmpctl.errors import UsageError
from dmpctl.files import read_tensors
from dmpctl.models.backbone import Loaded, facts_of, metadata_of
from dmpctl.models.codec import latent_record, open_codec
from dmpctl.models.conditions import captions_of, encoder_record, open_encoder
from dmpctl.models.patch_files import lasting_name
from dmpctl.processes.accelerator import accelerator_for
from dmpctl.rng import seed_of
from dmpctl.runs.records import BackboneDescription
from dmpctl.runs.rundir import RunDir
from dmpctl.settings.model import Settings
from dmpctl.store.locate import lasting_data
from dmpctl.training.session import Session, Trained, train_in
from dmpctl.training.subject import Subject
from dmpctl.types import Codec, ParamGroup, Progress, Report, Routings, ScheduleSpec, Source, TextSpec


def config_for(settings: Settings, codec: Codec, source: Source) -> DiTConfig:
    """The shape that the settings ask for, on latents of these images; UsageError where they do not fit."""
    shape = settings.shape
    channels, size, _ = codec.latent_shape(*source.item(0)[0].shape[:2])
    if size % shape.patch_size:
        what = "images" if isinstance(codec, Identity) else "latents"
        raise UsageError(f"--patch-size {shape.patch_size} does not divide {what} of side {size}", "take a divisor of the side")
    if shape.class_conditional and not source.num_classes:
        raise UsageError("--class-conditional needs labels, and this data has none", "put the images into one folder per class")
    if shape.text_conditional:
        captions_of(source, 0)
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


def predict(module: nn.Module, x_t: Tensor, t: Tensor, cond: Tensor | None, gate_noise: Tensor | None) -> tuple[Tensor, Routings]:
    """A backbone alone: no gates."""
    return module(x_t, t, cond), None


def no_routing(module: nn.Module, t: Tensor, cond: Tensor | None, gate_noise: Tensor | None) -> None:
    """A backbone alone: no gates."""


def no_penalty(routing: Routings) -> dict[str, Tensor]:
    """A backbone alone has nothing to balance."""
    return {}


def default_run(settings: Settings, source: Source) -> Path:
    return settings.run.run or Path("runs") / f"pretrain-{Path(source.name).name}"


def pretrain(settings: Settings, progress: Progress) -> Report:
    """Train a backbone into its run directory, going on from the newest checkpoint; a finished run says so."""
    if settings.data.data is None:
        raise UsageError("nothing says which images to train on", "add --data digits or --data DIR")
    data = settings.data.model_copy(update={"data": lasting_data(settings.data.data, settings)})
    settings = settings.model_copy(update={"data": data})
    codec = open_codec(settings)
    source = open_source(settings.data, settings.data.size, settings.data.channels, settings)
    config = config_for(settings, codec, source)
    text = open_encoder(settings, None, None) if settings.shape.text_conditional else None
    path = default_run(settings, source).expanduser().absolute()
    session = session_of(settings, config, ScheduleSpec(settings.shape.schedule), codec, source, text)
    if settings.console.dry_run:
        return _planned(session, path)
    accelerator = accelerator_for(settings)
    with RunDir(path, accelerator.is_main_process) as run:
        return _finished(run, session, train_in(run, session, settings, accelerator, progress))


def session_of(
    settings: Settings,
    config: DiTConfig,
    schedule: ScheduleSpec,
    codec: Codec,
    source: Source,
    text: TextEncoder | None = None,
) -> Session:
    """The training of a fresh backbone on latents of these images; with `text` on their captions, as PixArt's transformer."""
    generator = torch.Generator().manual_seed(seed_of(settings.run.seed, "initialise"))
    codec_record, text_record = latent_record(codec), encoder_record(text)
    name = lasting_name(settings.data.data or source.name)
    model: DiT | PixArt
    if text is None:
        model = DiT(config, schedule)
    else:
        with torch.random.fork_rng(devices=[]):  # diffusers draws a start of its own, which is then drawn over
            network = fresh(config, TextSpec(text.max_length, text.width))
        model = PixArt(network, schedule, text.max_length)
    model.initialise(generator)
    metadata = metadata_of(Loaded(model, "", "", name, codec_record, text_record))
    described = BackboneDescription(
        schema_version=1, **facts_of(model), data=source.name, images=len(source), codec=codec_record, text=text_record
    )
    model.recompute = settings.train.grad_checkpoint
    groups: list[ParamGroup] = [{"name": "backbone", "params": list(model.parameters()), "lr": settings.pretrain.lr}]
    subject = Subject("backbone", model.train(), model, groups, predict, no_routing, no_penalty, None, described)
    facts = described.to_json()
    del facts["schema_version"]
    digests = {"data_fingerprint": source.fingerprint}
    return Session("pretrain", subject, model.spec, codec, source, digests, facts, metadata, text=text)


def _planned(session: Session, path: Path) -> Report:
    parameters, facts = session.spec.parameters, session.facts
    return Report(
        {"dry_run": True, "run": str(path), "parameters": parameters, **facts},
        ({"run": str(path), "parameters": f"{parameters:,}", "images": str(facts["images"])},),
        ("dry run: nothing was written",),
    )


def _finished(run: RunDir, session: Session, trained: Trained) -> Report:
    digest = digest_of(read_tensors(run.path / "backbone.safetensors")[0])
    data = {
        "run": str(run.path),
        "step": trained.step,
        "seconds": round(trained.seconds, 1),
        "parameters": session.spec.parameters,
        "backbone_sha256": digest,
        **session.facts,
    }
    row = {
        "step": str(trained.step),
        "parameters": f"{session.spec.parameters:,}",
        "seconds": f"{trained.seconds:.0f}",
        "backbone": str(run.path / "backbone.safetensors"),
    }
    how = "the run was complete already" if trained.was_complete else "done"
    return Report(data, (row,), (f"{how}: patch it with: dmpctl patch --base {run.path}",))
