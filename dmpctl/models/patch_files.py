"""A patch on disk: what describes it, loading it on the one backbone it fits, and what a run or a file has made."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from dmpctl.backbones.dit import shape_config
from dmpctl.backbones.dit_weights import PATCH, described_weights, digest_of, is_patched
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import read_json, read_tensors, sha256_of, sha256_of_bytes, tensors_to_bytes
from dmpctl.models.backbone import BackboneModule, Loaded, freeze, load_backbone, model_from
from dmpctl.models.build import PatchModule, build_patch
from dmpctl.models.patched import Patched
from dmpctl.processes.sharded import whole
from dmpctl.runs import checkpoint
from dmpctl.runs.checkpoint import refuse_other_keys
from dmpctl.runs.rundir import version_of
from dmpctl.settings.methods import Method
from dmpctl.settings.sections import Base
from dmpctl.store.addresses import address_in
from dmpctl.store.locate import BUNDLED, BUNDLED_DATA, locate

SCHEMA_VERSION = 1
PATCH_PREFIX = "patch."  # of a patch's tensors in one file with its backbone
Which = Literal["ema", "raw"]
NEEDED = {  # in patch.json, to use the patch
    "": ("method", "backbone", "data", "sha256", "step"),
    "backbone": ("base", "weights", "sha256", "latent_shape", "sites", "schedule"),
    "data": ("name",),
}


def describe_patch(
    loaded: Loaded,
    base: Base,
    method: Method,
    patch: PatchModule,
    data: str,
    fingerprint: str,
    codec: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What patch.json says: the method, and the one backbone, schedule and shape that it fits (R40).

    `codec`, `text`: the records of the codec and of the text encoder it was trained with, None: of pixels, and without captions.
    """
    spec = loaded.spec
    about = {
        "schema_version": SCHEMA_VERSION,
        "dmpctl": version_of("dmpctl"),
        "method": method.model_dump(mode="json"),
        "added_parameters": patch.added,
        "added_percent": round(100 * patch.added / spec.parameters, 4),
        "backbone": {
            "base": lasting_name(base.base),
            "weights": None if base.weights is None else str(base.weights.expanduser().absolute()),
            "sha256": loaded.digest,
            "latent_shape": list(spec.latent_shape),
            "sites": len(spec.sites),
            "schedule": asdict(spec.schedule),
            "num_classes": spec.num_classes,
            "parameters": spec.parameters,
        },
        "data": {"name": data, "fingerprint": fingerprint},
    }
    parts = {"codec": codec, "text": text}
    return about | {name: dict(record) for name, record in parts.items() if record is not None}


def added_words(described: Mapping[str, Any]) -> str:
    """Size of a patch for people: `6,554,112 parameters (+1.43 %)`."""
    return f"{described['added_parameters']:,} parameters (+{described['added_percent']:.2f} %)"


def lasting_name(name: str) -> str:
    """A --base or --data that still means the same from another folder; what is bundled is no path, whatever lies here."""
    path = Path(name).expanduser()
    known = name in BUNDLED or name in BUNDLED_DATA or shape_config(name) is not None
    return str(path.absolute()) if path.exists() and not known else name


def load_patch(folder: Path, base: Base | None = None, which: Which | None = None) -> Patched:
    """The patch in `folder` (a run or a checkpoint) on its backbone; `base` None: the one beside it, or that patch.json names.

    `which`: the average of the trained weights or the last ones, None: what training ended with (R26).
    MissingError if there is no finished patch; IntegrityError if a file is damaged, or the backbone, its schedule or
    its shape is another than the patch was trained on.
    """
    about = read_about(folder)
    path = folder / "patch.safetensors"
    if not path.is_file():
        raise MissingError(f"{folder} has no patch.safetensors", "train it: dmpctl patch")
    actual = sha256_of(path)
    if actual != about["sha256"]:
        raise IntegrityError(f"{path} is damaged: sha256 {actual}, expected {about['sha256']}", "copy the patch again")
    named = about["backbone"]
    if base is None and (folder / "backbone.safetensors").is_file():  # imported together: the folder may have been moved
        base = Base(base=str(folder))
    base = base or Base(base=named["base"], weights=named["weights"])
    loaded = load_backbone(base)
    refuse_other_backbone(folder, about, loaded)
    patch = patch_from(loaded.model, method_of(folder, about), read_tensors(path)[0], path)
    return Patched(loaded, patch, about | other_weights(folder, about, patch, which))


def patch_from(model: BackboneModule, method: Method, tensors: Mapping[str, Tensor], where: Path) -> PatchModule:
    """The frozen patch on `model` whose state these tensors are; IntegrityError on a missing or unexpected key or shape."""
    patch = build_patch(model, method)
    refuse_other_keys(tensors, patch.state_dict(), str(where))
    patch.load_state_dict(tensors)
    return freeze(patch)


def load_merged(path: Path, which: Which | None = None) -> Patched:
    """Backbone and patch from the one file that `dmpctl export --to merged` writes for prompts, frozen, on the CPU.

    IntegrityError if it is damaged; UsageError if `which` are not the weights that it holds.
    """
    tensors, metadata = read_tensors(path)
    try:
        about = json.loads(metadata.get(PATCH, "{}"))
    except json.JSONDecodeError as error:
        raise IntegrityError(f"{path} describes its patch in a way that cannot be read ({error})") from None
    refuse_incomplete(about, path)
    if which not in (None, about.get("weights")):
        raise UsageError(f"{path} holds no {which} weights", "leave --weights out, or name the run itself")
    own = {name.removeprefix(PATCH_PREFIX): value for name, value in tensors.items() if name.startswith(PATCH_PREFIX)}
    rest = {name: value for name, value in tensors.items() if not name.startswith(PATCH_PREFIX)}
    weights = described_weights(path, rest, metadata)
    model = freeze(model_from(weights))
    loaded = Loaded(model, digest_of(model.state_dict()), f"{path} (its backbone)", weights.data, weights.codec, weights.text)
    sha256 = sha256_of_bytes(tensors_to_bytes(own))
    for found, expected in ((loaded.digest, about["backbone"]["sha256"]), (sha256, about["sha256"])):
        if found != expected:
            raise IntegrityError(f"{path} is damaged: sha256 {found}, expected {expected}", "copy the file again")
    return Patched(loaded, patch_from(model, method_of(path, about), own, path), about)


def other_weights(folder: Path, about: Mapping[str, Any], module: nn.Module, which: Which | None) -> dict[str, str]:
    """Put the weights that were asked for into `module`, if they are not those it has; what changes in `about`.

    They are in the checkpoint of the same step. UsageError where no average was kept, MissingError without that checkpoint.
    """
    if which is None or which == about.get("weights"):
        return {}
    if which == "ema":
        raise UsageError(f"{folder} kept no average of its weights", "train with --ema, or leave --weights out")
    named = folder if (folder / "trainer.json").is_file() else folder / "checkpoints" / checkpoint.name_of(int(about["step"]))
    if not (named / "trainer.json").is_file():
        raise MissingError(f"{folder} no longer has the checkpoint with its last weights ({named.name})", "use --weights ema")
    state, parameters = checkpoint.load(named), dict(module.named_parameters())
    refuse_other_keys(state.raw, parameters, str(named))
    with torch.no_grad():
        for name, tensor in parameters.items():
            tensor.copy_(state.raw[name])
    return {"weights": which, "sha256": sha256_of(named / "trainer.safetensors")}


def read_about(folder: Path) -> dict[str, Any]:
    """patch.json of a folder; MissingError if there is none, IntegrityError if it lacks what is needed."""
    if not folder.is_dir():
        raise MissingError(f"there is no run {folder}", "name a folder made by dmpctl patch")
    if not (folder / "patch.json").is_file():
        raise MissingError(f"{folder} holds no finished patch (patch.json)", "train it, or end its training: dmpctl patch")
    about = read_json(folder / "patch.json", SCHEMA_VERSION)
    refuse_incomplete(about, folder / "patch.json")
    return about


def refuse_incomplete(about: object, path: Path) -> None:
    """IntegrityError unless what `path` says of a patch is of this version and holds what is needed to use it."""
    if isinstance(about, dict) and about.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise IntegrityError(f"{path} has schema_version {about['schema_version']}, this dmpctl reads {SCHEMA_VERSION}")
    for where, names in NEEDED.items():
        part = about[where] if where and isinstance(about, dict) else about
        missing = [name for name in names if name not in part] if isinstance(part, dict) else names
        if missing:
            raise IntegrityError(f"{path} lacks {', '.join(missing)}" + (f" of its {where}" if where else ""))


def method_of(folder: Path, about: Mapping[str, Any]) -> Method:
    """The settings of the method that patch.json names; IntegrityError where they are none of this version."""
    kinds: TypeAdapter[Method] = TypeAdapter(Annotated[Method, Field(discriminator="method")])
    try:
        return kinds.validate_python(about["method"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"][1:])) or "method"  # the first is the kind
        raise IntegrityError(f"{folder / 'patch.json'} does not fit this dmpctl: {where}: {first['msg']}") from None


def refuse_other_backbone(folder: Path, about: Mapping[str, Any], loaded: Loaded) -> None:
    """IntegrityError, saying which, unless shape, schedule and weights are those the patch was trained on."""
    named, spec = about["backbone"], loaded.spec
    found = {"latent_shape": list(spec.latent_shape), "sites": len(spec.sites), "schedule": asdict(spec.schedule)}
    for key, value in found.items():
        if named[key] != value:
            raise IntegrityError(
                f"{folder} was trained on a backbone with {key.replace('_', ' ')} {named[key]}, this one has {value}"
            )
    if named["sha256"] != loaded.digest:
        raise IntegrityError(
            f"{folder} was trained on another backbone: sha256 {named['sha256'][:16]}, this one is {loaded.digest[:16]}",
            f"use the backbone it names: {named['base']}",
        )


def load_result(folder: Path, which: Which | None = None) -> Patched:
    """What a run has made: its patch on its backbone, or the backbone that it trained; `which` as in `load_patch`.

    A file: the patched model that `dmpctl export --to merged` wrote, or a backbone alone. hf://OWNER/NAME@REVISION: what
    `dmpctl push` has published, after `dmpctl download` of it.
    """
    folder = locate(folder, "run").absolute()
    if is_patched(folder):
        return load_merged(folder, which)
    if folder.is_file():
        if which is not None:
            raise UsageError(f"{folder} is a backbone with one set of weights", "leave --weights out")
        return Patched(load_backbone(Base(base=str(folder))), None, {})
    if (folder / "backbone.safetensors").is_file() and not (folder / "patch.json").is_file():
        loaded = load_backbone(Base(base=str(folder)))
        about = read_json(folder / "backbone.json", SCHEMA_VERSION) if (folder / "backbone.json").is_file() else {"step": 0}
        if other_weights(folder, about, loaded.model, which):
            loaded = replace(loaded, digest=digest_of(loaded.model.state_dict()), origin=f"{loaded.origin}, {which}")
        return Patched(loaded, None, {})
    return load_patch(folder, which=which)


def outputs_of(run: Path) -> Path:
    """Where a command puts what it makes of a run: into the run; for a file, beside it into a folder of its name.

    For what is on the Hub into runs/NAME.
    """
    address = address_in(run)
    if address is not None:
        return Path("runs").absolute() / address.rsplit("/", 1)[-1].partition("@")[0]
    run = run.expanduser().absolute()
    return run.with_suffix("") if run.is_file() else run


def backbone_digest(loaded: Loaded) -> str:
    """The backbone's identity now; after training it must equal `loaded.digest`."""
    return digest_of({name: whole(tensor) for name, tensor in loaded.model.state_dict().items()})
