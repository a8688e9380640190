"""A backbone with its patch: putting them together, on disk and in memory."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dmpctl.backbones.dit import shape_config
from dmpctl.backbones.dit_weights import digest_of
from dmpctl.data.source import BUNDLED as BUNDLED_DATA
from dmpctl.engine.build import BUNDLED, Loaded, added_parameters, build_patch, load_backbone
from dmpctl.engine.checkpoint import refuse_other_keys
from dmpctl.engine.rundir import version_of
from dmpctl.errors import IntegrityError, MissingError
from dmpctl.files import read_json, read_tensors, sha256_of
from dmpctl.methods.dmp import DmpPatch
from dmpctl.settings.sections import Base, Dmp
from dmpctl.types import Backbone, Routing

SCHEMA_VERSION = 1
NEEDED = {  # in patch.json, to use the patch
    "": ("method", "backbone", "data", "sha256", "step"),
    "backbone": ("base", "weights", "sha256", "latent_shape", "sites", "schedule"),
    "data": ("name",),
}


def predict_patched(
    backbone: Backbone,
    time_only: bool,
    plan: nn.Module,
    x_t: Tensor,
    t: Tensor,
    cond: Tensor | None,
    gate_noise: Tensor | None = None,
) -> tuple[Tensor, Routing | None]:
    """Prediction and routing of a patched backbone; `plan` is the patch, as it is or wrapped for many processes."""
    made = plan(backbone.embed_time(t) if time_only else backbone.embed(t, cond), gate_noise)
    return backbone.denoise(x_t, t, cond, made.edit), made.routing


@dataclass(frozen=True)
class Patched:
    """A frozen backbone, and its patch (None: the backbone alone). `about` is patch.json, {} without a patch."""

    backbone: Loaded
    patch: DmpPatch | None
    about: Mapping[str, Any]

    def predict(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """Prediction [B, C or 2C, H, W], without gate noise."""
        if self.patch is None:
            return self.backbone.model.denoise(x, t, cond)
        return predict_patched(self.backbone.model, self.patch.time_only, self.patch, x, t, cond)[0]

    def to(self, device: torch.device) -> "Patched":
        """Both parts on `device`."""
        self.backbone.model.to(device)
        if self.patch is not None:
            self.patch.to(device)
        return self

    @property
    def step(self) -> int:
        """Optimizer steps behind the patch, 0 without one."""
        return int(self.about.get("step", 0))

    def unpatched(self) -> "Patched":
        """The same backbone without its patch."""
        return Patched(self.backbone, None, {})


def describe_patch(loaded: Loaded, base: Base, patch: DmpPatch, data: str, fingerprint: str) -> dict[str, Any]:
    """What patch.json says: the method, and the one backbone, schedule and shape that it fits (R40)."""
    spec = loaded.spec
    count, share = added_parameters(spec, patch.settings)
    return {
        "schema_version": SCHEMA_VERSION,
        "dmpctl": version_of("dmpctl"),
        "method": patch.settings.model_dump(mode="json"),
        "shape": asdict(patch.shape),
        "added_parameters": count,
        "added_percent": round(share, 4),
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


def lasting_name(name: str) -> str:
    """A --base or --data that still means the same from another folder; what is bundled is no path, whatever lies here."""
    path = Path(name).expanduser()
    known = name in BUNDLED or name in BUNDLED_DATA or shape_config(name) is not None
    return str(path.absolute()) if path.exists() and not known else name


def load_patch(folder: Path, base: Base | None = None) -> Patched:
    """The patch in `folder` (a run or a checkpoint) on its backbone; `base` None: the one that patch.json names.

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
    base = base or Base(base=named["base"], weights=named["weights"])
    loaded = load_backbone(base)
    refuse_other_backbone(folder, about, loaded)
    patch = build_patch(loaded.spec, method_of(folder, about))
    tensors, _ = read_tensors(path)
    refuse_other_keys(tensors, patch.state_dict(), str(path))
    patch.load_state_dict(tensors)
    patch.eval().requires_grad_(False)
    return Patched(loaded, patch, about)


def read_about(folder: Path) -> dict[str, Any]:
    """patch.json of a folder; MissingError if there is none, IntegrityError if it lacks what is needed."""
    if not folder.is_dir():
        raise MissingError(f"there is no run {folder}", "name a folder made by dmpctl patch")
    if not (folder / "patch.json").is_file():
        raise MissingError(f"{folder} holds no finished patch (patch.json)", "train it, or end its training: dmpctl patch")
    about = read_json(folder / "patch.json", SCHEMA_VERSION)
    for where, names in NEEDED.items():
        part = about[where] if where else about
        missing = [name for name in names if name not in part] if isinstance(part, dict) else names
        if missing:
            raise IntegrityError(f"{folder / 'patch.json'} lacks {', '.join(missing)}" + (f" of its {where}" if where else ""))
    return about


def method_of(folder: Path, about: Mapping[str, Any]) -> Dmp:
    """The settings of the method that patch.json names; IntegrityError where they are none of this version."""
    try:
        return Dmp.model_validate(about["method"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "method"
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


def load_result(folder: Path) -> Patched:
    """What a run has made: its patch on its backbone, or the backbone that it trained."""
    folder = folder.expanduser().absolute()
    if (folder / "backbone.safetensors").is_file() and not (folder / "patch.json").is_file():
        return Patched(load_backbone(Base(base=str(folder))), None, {})
    return load_patch(folder)


def backbone_digest(loaded: Loaded) -> str:
    """The backbone's identity now; after training it must equal `loaded.digest`."""
    return digest_of(loaded.model.state_dict())
