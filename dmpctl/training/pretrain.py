"""`dmpctl pretrain`: a backbone from scratch, as real DiTs are trained."""

from pathlib import Path

import torch

from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.backbones.dit_weights import digest_of
from dmpctl.backbones.pixart import PixArt, fresh
from dmpctl.codecs.identity import Identity
from dmpctl.codecs.text import TextEncoder
from dmpctl.data.source import open_source
from dmpctl.errors import UsageError
from dmpctl.files import read_tensors
from dmpctl.images.inventory import inventory_of, recorded, told
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
from dmpctl.types import Codec, Progress, Report, ScheduleSpec, Source, TextSpec


def config_for(settings: Settings, codec: Codec, source: Source) -> DiTConfig:
    """The shape that the settings ask for, on latents of these images; UsageError where they do not fit."""
    shape = settings.shape
    channels, size, _ = codec.latent_shape(*source.item(0)[0].shape[:2])
    if size % shape.patch_size:
        what = "images" if isinstance(codec, Identity) else "latents"
        raise UsageError(f"--patch-size {shape.patch_size} does not divide {what} of side {size}", "take a divisor of the side")
    if shape.class_conditional and not source.num_classes:
        raise UsageError("--class-conditional needs labels, and this data has none", "put the images into one folder per class")
    found = inventory_of(source)
    empty = [name for name, count in found.classes.items() if count == 0] if found and shape.class_conditional else []
    if empty:
        raise UsageError(f"the class {empty[0]} of {source.name} has no image", "take its folder away, or put images into it")
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


def pretrain(settings: Settings, progress: Progress) -> Report:
    """Train a backbone into its run directory, going on from the newest checkpoint; a finished run says so."""
    if settings.data.data is None:
        raise UsageError("nothing says which images to train on", "add --data digits or --data DIR")
    images = settings.data.model_copy(update={"data": lasting_data(settings.data.data, settings)})
    settings = settings.model_copy(update={"data": images})
    codec = open_codec(settings)
    source = open_source(settings.data, settings.data.size, settings.data.channels, settings)
    shape = settings.shape
    takes = ["labels"] * shape.class_conditional + ["captions"] * shape.text_conditional
    told(source, progress, takes, ": add --class-conditional")
    config = config_for(settings, codec, source)
    text = open_encoder(settings, None, None) if settings.shape.text_conditional else None
    path = (settings.run.run or Path("runs") / f"pretrain-{Path(source.name).name}").expanduser().absolute()
    session = session_of(settings, config, ScheduleSpec(settings.shape.schedule), codec, source, text)
    if settings.console.dry_run:
        data = {"dry_run": True, "run": str(path), "parameters": session.spec.parameters, **session.facts, **recorded(source)}
        row = {"run": str(path), "parameters": f"{session.spec.parameters:,}", "images": str(len(source))}
        return Report(data, (row,), ("dry run: nothing was written",))
    accelerator = accelerator_for(settings)
    with RunDir(path, accelerator.is_main_process) as run:
        return _finished(run, session, train_in(run, session, settings, accelerator, progress))


def session_of(
    settings: Settings, config: DiTConfig, schedule: ScheduleSpec, codec: Codec, source: Source, text: TextEncoder | None = None
) -> Session[BackboneDescription]:
    """The training of a fresh backbone on latents of these images; with `text` on their captions, as PixArt's transformer."""
    model: DiT | PixArt
    if text is None:
        model = DiT(config, schedule)
    else:
        with torch.random.fork_rng(devices=[]):  # diffusers draws a start of its own, which is then drawn over
            network = fresh(config, TextSpec(text.max_length, text.width))
        model = PixArt(network, schedule, text.max_length)
    model.initialise(torch.Generator().manual_seed(seed_of(settings.run.seed, "initialise")))
    model.recompute = settings.train.grad_checkpoint
    described = BackboneDescription(
        schema_version=1,
        **facts_of(model),
        data=source.name,
        images=len(source),
        codec=latent_record(codec),
        text=encoder_record(text),
    )
    name = lasting_name(settings.data.data or source.name)
    return Session(
        Subject(model.train(), None, described, settings.pretrain.lr),
        codec,
        source,
        text,
        digests={"data_fingerprint": source.fingerprint},
        facts={key: value for key, value in described.to_json().items() if key != "schema_version"},
        metadata=metadata_of(Loaded(model, "", "", name, described.codec, described.text)),
    )


def _finished(run: RunDir, session: Session[BackboneDescription], trained: Trained) -> Report:
    path, parameters = run.path / "backbone.safetensors", session.spec.parameters
    data = {"run": str(run.path), "step": trained.step, "seconds": round(trained.seconds, 1), "parameters": parameters}
    data |= {"skipped_steps": trained.skipped, **recorded(session.source)}
    data |= {"backbone_sha256": digest_of(read_tensors(path)[0]), **session.facts}
    row = {
        "step": str(trained.step),
        "parameters": f"{parameters:,}",
        "seconds": f"{trained.seconds:.0f}",
        "backbone": str(path),
    }
    how = ("the run was complete already" if trained.was_complete else "done") + trained.skipped_words
    return Report(data, (row,), (f"{how}: patch it with: dmpctl patch --base {run.path}",))
