"""`dmpctl import`: other people's checkpoints, as a run that the other commands accept.

The published DMP checkpoint holds the whole model; backbone and patch come apart here. What its config says (Hydra:
`models.vp.*`, `general.*`) is used where it can be read; nothing of the pickle is ever run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dmpctl.backbones.diffusers_dit import DiffusersDiT, to_original
from dmpctl.backbones.diffusers_folder import open_folder
from dmpctl.backbones.dit import DiT
from dmpctl.backbones.dit_weights import Weights, digest_of, dit_from, is_patched, known, read_weights
from dmpctl.backbones.told import Given
from dmpctl.errors import IntegrityError, UsageError
from dmpctl.exchange.export import put_all
from dmpctl.files import json_to_bytes, sha256_of, sha256_of_bytes, tensors_to_bytes
from dmpctl.foreign.said import value_in
from dmpctl.models.backbone import Loaded, facts_of, freeze, loaded_from, metadata_of
from dmpctl.models.build import PatchModule
from dmpctl.models.patch_files import describe_patch, lasting_name, load_merged, patch_from
from dmpctl.runs.records import CodecRecord, DataRecord, PretrainedRecord, Which
from dmpctl.runs.rundir import RunDir
from dmpctl.settings.exchange import Importing
from dmpctl.settings.methods import Dmp, Method, PromptTuning
from dmpctl.settings.model import Settings
from dmpctl.settings.presets import PRESETS
from dmpctl.settings.sections import Base
from dmpctl.types import Progress, Report

SCHEMA_VERSION = 1
GATE_KEYS = ("gate.weight", "gate.bias", "w_noise")
PATCH_KEYS = ("prompt_embeddings", *GATE_KEYS)  # of the published layout; all other keys are the backbone's
AS_TRAINED = "time is embedded as in the original code, which the weights were trained with; diffusers shifts the frequencies"
STEP_DIGITS = 7  # the published training script names its checkpoints by their step: 0050000.pt


@dataclass(frozen=True)
class TakenApart:
    """A file taken apart; `patch`, `method` and `data` (of its training) are None for a backbone alone.

    `taken`: which part of the file it came from. `assumed`: what neither the file nor an option says, in sentences.
    """

    backbone: Loaded
    taken: str
    assumed: tuple[str, ...] = ()
    step: int = 0
    weights: Which = "raw"
    patch: PatchModule | None = None
    method: Method | None = None
    data: DataRecord | None = None
    codec: CodecRecord | None = None


def import_file(settings: Settings, file: Path, progress: Progress) -> Report:
    """Write the backbone of `file`, and the patch if it has one, into a new run; the same import again changes nothing.

    UsageError where the run holds anything else, or an option does not fit; IntegrityError for a file that is not what it
    should be.
    """
    path, options = file.expanduser().absolute(), settings.importing
    target = (options.import_run or Path("runs") / path.stem).expanduser().absolute()
    found = opened(path, options, settings.data.data)
    digest = found.backbone.digest if path.is_dir() else sha256_of(path)
    source = {"file": str(path), "sha256": digest}
    files = _files(found, target, source)
    if settings.console.dry_run:
        return _report(found, target, ("dry run: nothing was written",))
    given = options.model_dump(mode="json", exclude={"import_run"}) | {"data": settings.data.data}
    science = {"file_sha256": source["sha256"], **{key.removeprefix("import_"): value for key, value in given.items()}}
    with RunDir(target) as run:
        run.refuse_other("import", science)
        if not (target / "config.json").is_file():
            facts = {"imported": source, "taken": found.taken, "backbone_sha256": found.backbone.digest}
            run.begin("import", science, settings.to_dict(), facts)
        written = put_all({target / name: content for name, content in files.items()})
    return _report(found, target, () if written else ("the run was complete already",))


def opened(path: Path, options: Importing, data: str | None) -> TakenApart:
    """Backbone and patch of a file, frozen, on the CPU. `data`: the images it was trained on, None: unknown."""
    if path.is_dir():
        return TakenApart(_original(path, data), "its transformer", (AS_TRAINED,))
    if is_patched(path):
        model = load_merged(path, options.import_weights)
        record = model.record
        if record is None:
            raise IntegrityError(f"{path} does not describe its patch", "export it again: dmpctl export RUN --to merged")
        parts = (model.patch, record.method, record.data, record.codec)
        return TakenApart(model.backbone, "the file", (), record.step, record.weights or "raw", *parts)
    weights = read_weights(path, options.import_weights)
    mine = {name: value for name, value in weights.tensors.items() if name in PATCH_KEYS}
    rest = {name: value for name, value in weights.tensors.items() if name not in PATCH_KEYS}
    backbone = _backbone(path, replace(weights, tensors=rest), options, data)
    step = int(path.stem) if path.stem.isdecimal() and len(path.stem) >= STEP_DIGITS else 0
    which: Which = "ema" if weights.average else "raw"
    found = TakenApart(backbone, weights.taken, backbone.assumed, step, which)
    if not mine:
        for name, value in (("--topk", options.import_topk), ("--position", options.import_position)):
            if value is not None:
                raise UsageError(f"{path} holds no prompts, so {name} says nothing", f"leave {name} out")
        return found
    method, more = _method(path, mine, weights, backbone, options)
    patch = patch_from(backbone.model, method, mine, path)
    origin = DataRecord(name=backbone.data, fingerprint=None)
    return replace(found, patch=patch, method=method, data=origin, assumed=found.assumed + more)


def _original(folder: Path, data: str | None) -> Loaded:
    """A DiT in diffusers' layout as the original one: the same weights, and the function they were trained for."""
    model, _ = open_folder(folder)
    if not isinstance(model, DiffusersDiT):
        raise UsageError(f"{folder} holds no DiT, whose layouts alone are converted", f"use it as it is: --base {folder}")
    try:
        config, tensors = to_original(model)
    except ValueError as error:
        raise UsageError(f"{folder} cannot be converted: {error}", f"use it as it is: --base {folder}") from None
    made = freeze(dit_from(Weights(tensors, "its transformer", config, model.schedule)))
    return Loaded(made, digest_of(made.state_dict()), str(folder), lasting_name(data) if data else None)


def _backbone(path: Path, weights: Weights, options: Importing, data: str | None) -> Loaded:
    """The backbone of a file, with what was assumed of it; UsageError where an option does not fit."""
    given = Given(options.shape, options.import_heads, options.import_schedule)
    loaded = loaded_from(path, known(path, weights, given))
    return replace(loaded, data=lasting_name(data) if data else loaded.data)


def _method(
    path: Path, mine: Mapping[str, Tensor], weights: Weights, backbone: Loaded, options: Importing
) -> tuple[Method, tuple[str, ...]]:
    """The method's settings, from the shapes of the patch's tensors, the options, and what the file's config says."""
    if "prompt_embeddings" not in mine or mine["prompt_embeddings"].ndim != 3:
        raise IntegrityError(f"{path} holds a gate without prompts [blocks, prompts, width], so no patch in the published layout")
    depth, prompts, _ = mine["prompt_embeddings"].shape
    blocks, tokens = len(backbone.spec.sites), backbone.spec.sites[0].tokens
    if depth > blocks:
        raise IntegrityError(f"{path} holds prompts for {depth} blocks, its backbone has {blocks}")
    said = value_in(weights.said, "vp.type", "general.type", "vp_type", "position")
    position = options.import_position or (said if said in ("add", "prepend") else None)
    assumed = []
    if position is None:
        position = "add" if prompts == tokens else "prepend"
        assumed.append(f"position {position} was assumed, as there are {prompts} prompts for {tokens} tokens (--position)")
    common: dict[str, Any] = {"prompts": prompts, "prompt_depth": depth, "position": position}
    if not any(name in mine for name in GATE_KEYS):
        if options.import_topk is not None:
            raise UsageError(f"{path} holds prompts without a gate, so --topk says nothing", "leave --topk out")
        return PromptTuning(**common), tuple(assumed)
    kept, known = _kept(path, prompts, weights, options)
    if not known:
        assumed.append("a gate over all prompts was assumed: the file does not say how many it keeps (--topk)")
    gate = {"gate": "topk", "topk": kept} if kept < prompts else {}
    return Dmp.model_validate({**PRESETS["dmp-code"].methods["dmp"], **common, **gate}), tuple(assumed)


def _kept(path: Path, prompts: int, weights: Weights, options: Importing) -> tuple[int, bool]:
    """k of the gate, and whether anything says it; the published config holds a fraction of N, whose k is rounded down."""
    said = value_in(weights.said, "vp.topk", "topk")
    kept: float | None = options.import_topk
    if kept is None and isinstance(said, int | float) and not isinstance(said, bool):
        kept = said * prompts if said <= 1 else said
    if kept is None:
        return prompts, False
    if not 1 <= kept < prompts + 1:
        raise UsageError(f"a gate over {prompts} prompts cannot keep {kept:g} of them ({path})", f"give --topk 1 to {prompts}")
    return int(kept), True


def _files(found: TakenApart, target: Path, source: Mapping[str, str]) -> dict[str, bytes]:
    """The files of the run by name, in the order in which they are written: what names a file comes after it."""
    backbone = found.backbone
    files = {"backbone.safetensors": tensors_to_bytes(backbone.model.state_dict(), metadata_of(backbone))}
    common: dict[str, Any] = {"step": found.step, "weights": found.weights, "imported": source}
    if found.patch is None or found.method is None or found.data is None:
        digest, facts = sha256_of_bytes(files["backbone.safetensors"]), {**facts_of(backbone.model), "data": backbone.data}
        made = PretrainedRecord(schema_version=SCHEMA_VERSION, **facts, codec=backbone.codec, **common, sha256=digest)
        return files | {"backbone.json": made.to_bytes()}
    base = Base(base=str(target / "backbone.safetensors"))
    files["patch.safetensors"] = tensors_to_bytes(found.patch.state_dict())
    described = describe_patch(backbone, base, found.method, found.patch, found.data, found.codec)
    more = {**common, "sha256": sha256_of_bytes(files["patch.safetensors"])}
    return files | {"patch.json": json_to_bytes(described.to_json() | more)}


def _report(found: TakenApart, target: Path, more: tuple[str, ...]) -> Report:
    backbone, patch = found.backbone, found.patch
    spec, network = backbone.spec, backbone.model
    heads = f", {network.config.num_heads} heads" if isinstance(network, DiT) else ""
    data: dict[str, Any] = {
        "run": str(target),
        "taken": found.taken,
        **facts_of(backbone.model),
        "backbone_sha256": backbone.digest,
        "backbone_parameters": spec.parameters,
        "method": None if found.method is None else found.method.model_dump(mode="json"),
        "added_parameters": None if patch is None else patch.added,
        "assumed": list(found.assumed),
    }
    row = {
        "backbone": f"{spec.sites[0].width} wide, {len(spec.sites)} blocks{heads} ({spec.parameters:,})",
        "classes": str(spec.num_classes or "none"),
        "patch": "none" if patch is None or found.method is None else f"{found.method.method} ({patch.added:,})",
        "run": str(target),
    }
    after = f"patch it with: dmpctl patch --base {target}" if patch is None else f"sample it with: dmpctl sample {target}"
    return Report(data, (row,), (f"the weights came from {found.taken}", *found.assumed, *more, after))
