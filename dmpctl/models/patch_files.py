"""A patch on disk: what describes it, loading it on the one backbone it fits, and what a run or a file has made."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dmpctl.backbones.dit import shape_config
from dmpctl.backbones.dit_weights import PATCH, described_weights, digest_of, is_patched, refuse_larger
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import json_object, read_metadata, read_tensors, run_of, sha256_of, sha256_of_bytes, tensors_to_bytes
from dmpctl.foreign.tensors import refuse_unsound
from dmpctl.models.backbone import BackboneModule, Loaded, freeze, load_backbone, model_from
from dmpctl.models.build import PatchModule, build_patch
from dmpctl.models.patched import Patched
from dmpctl.processes.sharded import whole
from dmpctl.runs import checkpoint
from dmpctl.runs.checkpoint import refuse_other_keys
from dmpctl.runs.records import (
    BackboneRecord,
    CodecRecord,
    DataRecord,
    EncoderRecord,
    PatchDescription,
    PatchRecord,
    PretrainedRecord,
    Which,
    as_record,
    read_record,
)
from dmpctl.runs.rundir import RunDir, version_of
from dmpctl.settings.methods import Method
from dmpctl.settings.sections import Base
from dmpctl.store.addresses import address_in
from dmpctl.store.locate import BUNDLED, BUNDLED_DATA, locate

SCHEMA_VERSION = 1
FOLDED = "folded"  # metadata: the method whose change `dmpctl export --to merged` has added to a backbone's weights
PATCH_PREFIX = "patch."  # of a patch's tensors in one file with its backbone


def describe_patch(
    loaded: Loaded,
    base: Base,
    method: Method,
    patch: PatchModule,
    data: DataRecord,
    codec: CodecRecord | None = None,
    text: EncoderRecord | None = None,
) -> PatchDescription:
    """Returns what is known of a patch before it is trained: method, and the one backbone, schedule and shape it fits.

    `codec`, `text`: those it is trained with, None: pixels as they are, no captions.
    """
    spec = loaded.spec
    backbone = BackboneRecord(
        base=lasting_name(base.base),
        weights=None if base.weights is None else base.weights.expanduser().absolute(),
        sha256=loaded.digest,
        latent_shape=spec.latent_shape,
        sites=len(spec.sites),
        schedule=spec.schedule,
        num_classes=spec.num_classes,
        parameters=spec.parameters,
    )
    return PatchDescription(
        schema_version=SCHEMA_VERSION,
        dmpctl=version_of("dmpctl"),
        method=method.model_validate(method.model_dump()),  # its defaults are written too
        added_parameters=patch.added,
        added_percent=round(100 * patch.added / spec.parameters, 4),
        backbone=backbone,
        data=data,
        codec=codec,
        text=text,
    )


def lasting_name(name: str) -> str:
    """A --base or --data that still means the same from another folder; what is bundled is no path, whatever lies here."""
    path = Path(name).expanduser()
    known = name in BUNDLED or name in BUNDLED_DATA or shape_config(name) is not None
    return str(path.absolute()) if path.exists() and not known else name


def load_patch(folder: Path, base: Base | None = None, which: Which | None = None) -> Patched:
    """The patch in `folder` (a run or a checkpoint) on its backbone; `base` None: the one beside it, or that patch.json names.

    `which`: the average of the trained weights or the last ones, None: what training ended with.
    MissingError if there is no finished patch; IntegrityError if a file is damaged, or the backbone, its schedule or
    its shape is another than the patch was trained on.
    """
    record = read_patch_record(folder)
    if (folder / "config.json").is_file():
        RunDir(folder).config()  # refuses what a newer dmpctl has made
    path = folder / "patch.safetensors"
    if not path.is_file():
        raise MissingError(f"{folder} has no patch.safetensors", "train it: dmpctl patch")
    actual = sha256_of(path)
    if actual != record.sha256:
        raise IntegrityError(f"{path} is damaged: sha256 {actual}, expected {record.sha256}", "copy the patch again")
    if base is None and (folder / "backbone.safetensors").is_file():  # imported together: the folder may have been moved
        base = Base(base=str(folder))
    base = base or Base(base=record.backbone.base, weights=record.backbone.weights)
    loaded = load_backbone(base)
    wanted = record.backbone
    if mismatch := wanted.mismatch(loaded.spec):
        raise IntegrityError(f"{folder} was trained on a backbone with {mismatch}")
    if wanted.sha256 != loaded.digest:
        raise IntegrityError(
            f"{folder} was trained on another backbone: sha256 {wanted.sha256[:16]}, this one is {loaded.digest[:16]}",
            f"use the backbone it names: {wanted.base}",
        )
    patch = patch_from(loaded.model, record.method, read_tensors(path)[0], path)
    taken = other_weights(folder, record.step, record.weights, patch, which)
    return Patched(loaded, patch, record.model_copy(update=taken))


def patch_from(model: BackboneModule, method: Method, tensors: Mapping[str, Tensor], where: Path) -> PatchModule:
    """The frozen patch on `model` whose state these tensors are; IntegrityError on a missing or unexpected key or shape."""
    refuse_larger(method.model_dump(), sum(tensor.numel() for tensor in tensors.values()), f"{where} is described wrongly")
    patch = build_patch(model, method)
    refuse_unsound(tensors, where)
    refuse_other_keys(tensors, patch.state_dict(), str(where))
    patch.load_state_dict(tensors)
    return freeze(patch)


def load_merged(path: Path, which: Which | None = None) -> Patched:
    """Backbone and patch from the one file that `dmpctl export --to merged` writes for prompts, frozen, on the CPU.

    IntegrityError if it is damaged; UsageError if `which` are not the weights that it holds.
    """
    tensors, metadata = read_tensors(path)
    what = f"{path} (its patch)"
    record = as_record(json_object(metadata.get(PATCH, "{}"), what, PatchRecord.newest), PatchRecord, what)
    if which not in (None, record.weights):
        raise UsageError(f"{path} holds no {which} weights", "leave --weights out, or name the run itself")
    own = {name.removeprefix(PATCH_PREFIX): value for name, value in tensors.items() if name.startswith(PATCH_PREFIX)}
    rest = {name: value for name, value in tensors.items() if not name.startswith(PATCH_PREFIX)}
    weights = described_weights(path, rest, metadata)
    model = freeze(model_from(weights))
    loaded = Loaded(model, digest_of(model.state_dict()), f"{path} (its backbone)", weights.data, weights.codec, weights.text)
    sha256 = sha256_of_bytes(tensors_to_bytes(own))
    for found, expected in ((loaded.digest, record.backbone.sha256), (sha256, record.sha256)):
        if found != expected:
            raise IntegrityError(f"{path} is damaged: sha256 {found}, expected {expected}", "copy the file again")
    return Patched(loaded, patch_from(model, record.method, own, path), record)


def other_weights(folder: Path, step: int, held: Which | None, module: nn.Module, which: Which | None) -> dict[str, str]:
    """Put the weights that were asked for into `module`, which has those that are `held`; returns what changes in its record.

    They are in the checkpoint of the same step. UsageError where no average was kept, MissingError without that checkpoint.
    """
    if which is None or which == held:
        return {}
    if which == "ema":
        raise UsageError(f"{folder} kept no average of its weights", "train with --ema, or leave --weights out")
    named = folder if (folder / "trainer.json").is_file() else folder / "checkpoints" / checkpoint.name_of(step)
    if not (named / "trainer.json").is_file():
        raise MissingError(f"{folder} no longer has the checkpoint with its last weights ({named.name})", "use --weights ema")
    state, parameters = checkpoint.load(named), dict(module.named_parameters())
    refuse_other_keys(state.raw, parameters, str(named))
    with torch.no_grad():
        for name, tensor in parameters.items():
            tensor.copy_(state.raw[name])
    return {"weights": which, "sha256": sha256_of(named / "trainer.safetensors")}


def read_patch_record(folder: Path) -> PatchRecord:
    """Returns patch.json of a folder; MissingError if there is none, IntegrityError if it lacks what is needed."""
    if not folder.is_dir():
        raise MissingError(f"there is no run {folder}", "name a folder made by dmpctl patch")
    if not (folder / "patch.json").is_file():
        raise MissingError(f"{folder} holds no finished patch (patch.json)", "train it, or end its training: dmpctl patch")
    return read_record(folder / "patch.json", PatchRecord)


def load_result(folder: Path, which: Which | None = None) -> Patched:
    """Returns the result of a run: its patch on its backbone, or the backbone that it trained; `which` as in `load_patch`.

    A file: the patched model that `dmpctl export --to merged` wrote, or a backbone alone. hf://OWNER/NAME@REVISION: what
    `dmpctl push` has published, after `dmpctl download` of it.
    """
    folder = run_of(locate(folder, "run").absolute())
    if is_patched(folder):
        return load_merged(folder, which)
    if folder.is_file():
        if which is not None:
            raise UsageError(f"{folder} is a backbone with one set of weights", "leave --weights out")
        return Patched(load_backbone(Base(base=str(folder))))
    if (folder / "backbone.safetensors").is_file() and not (folder / "patch.json").is_file():
        loaded = load_backbone(Base(base=str(folder)))
        beside = folder / "backbone.json"
        record = read_record(beside, PretrainedRecord) if beside.is_file() else None
        step, held = (record.step, record.weights) if record else (0, None)
        if other_weights(folder, step, held, loaded.model, which):
            loaded = replace(loaded, digest=digest_of(loaded.model.state_dict()), origin=f"{loaded.origin}, {which}")
        return Patched(loaded)
    return load_patch(folder, which=which)


def outputs_of(run: Path) -> Path:
    """Where a command puts what it makes of a run: into the run; for a file, beside it into a folder of its name.

    For what is on the Hub into runs/NAME.
    """
    address = address_in(run)
    if address is not None:
        return Path("runs").absolute() / address.rsplit("/", 1)[-1].partition("@")[0]
    run = run_of(run.expanduser().absolute())
    if not run.is_file():
        return run
    beside = run.with_suffix("")
    taken = any((beside / name).is_file() for name in ("config.json", "patch.json"))  # by a run, whose images are others
    return run.with_name(f"{beside.name}-merged") if taken else beside


def folded_into(run: Path) -> str | None:
    """Returns the method whose change is part of the weights in a merged file; None for a run and any other file."""
    path = run.expanduser()
    return read_metadata(path).get(FOLDED) if path.suffix == ".safetensors" and path.is_file() else None


def backbone_digest(loaded: Loaded) -> str:
    """The backbone's identity now; after training it must equal `loaded.digest`."""
    return digest_of({name: whole(tensor) for name, tensor in loaded.model.state_dict().items()})
