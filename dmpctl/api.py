"""The six names for Python: `import dmpctl`, and the same settings that the command line has, as keyword arguments."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmpctl.errors import UsageError
from dmpctl.measuring import evaluate
from dmpctl.models import applied
from dmpctl.models.backbone import Loaded
from dmpctl.models.backbone import load_backbone as _load_backbone
from dmpctl.models.conditions import Prompts, encoded
from dmpctl.models.patch_files import load_result
from dmpctl.models.patched import Patched
from dmpctl.processes.ranks import resolve_device
from dmpctl.sampling import generate
from dmpctl.settings.layers import resolve
from dmpctl.settings.sections import Base
from dmpctl.training import patch
from dmpctl.types import Silent

__all__ = ["apply", "load_backbone", "load_patch", "measure", "sample", "train"]


def load_backbone(name: str = "digits", weights: str | Path | None = None) -> Loaded:
    """Returns a frozen backbone by `--base`: bundled, a shape with `weights`, a file, a run, a folder of diffusers.

    Its `model` is a torch module: `model.denoise(x, t, cond)`. Raises errors.DmpError as `dmpctl patch` does.
    """
    return _load_backbone(Base(base=name, weights=None if weights is None else Path(weights)))


def load_patch(run: str | Path) -> Patched:
    """Returns the patch of a run on its backbone, checked by sha256. `run`: a folder, or what `export --to merged` wrote."""
    return load_result(Path(run))


def apply(target: Any, patch: Patched | None) -> Any:
    """Puts a patch on `target` in place: a pipeline of diffusers, or its transformer or U-Net; None takes it off.

    `target` may be a `Loaded` backbone, too: then a new `Patched` is returned, and nothing changes. IntegrityError for a
    patch that was trained on other weights.
    """
    if isinstance(target, Loaded):
        if patch is not None and patch.backbone.digest != target.digest:
            raise UsageError("the patch was trained on other weights", f"use {patch.backbone.origin}")
        return Patched(target) if patch is None else replace(patch, backbone=target)
    return applied.apply_patch(target, patch)


def sample(model: Patched | Loaded, count: int, prompts: str | Sequence[str] | None = None, **settings: Any) -> Tensor:
    """Returns images uint8 [count, C, H, W]. `settings`: options of `dmpctl sample` (sampler="ddim", steps=50, cfg=2.0, label=3).

    `prompts` for a text-conditional model: image k shows prompt k modulo their number; None: captions of its data.
    """
    label = settings.pop("label", None)
    resolved = resolve("sample", settings if label is None else {**settings, "image_label": label}).settings
    made = (model if isinstance(model, Patched) else Patched(model)).with_codec(resolved)
    if prompts is None:
        made = made.with_prompts(resolved, count, Silent())
    elif made.text is None:
        raise UsageError("prompts are for a text-conditional model, this one is not", "leave them out")
    else:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        made = replace(made, prompts=Prompts(encoded(texts, made.text, resolved, Silent()), tuple(texts), {"from": "Python"}))
    device = resolve_device(resolved.launch)
    batches = generate.in_batches(made, range(count), resolved.sampling, device, Silent(), label)
    return torch.cat([images for _, images in batches])


def measure(what: str | Path, **settings: Any) -> dict[str, Any]:
    """Returns the JSON of `dmpctl fid WHAT`: the distance of a run, a folder or an npz, with its protocol and standard error.

    `settings`: options of `dmpctl fid` (reference="coco-val", max_images=5000, sampler="ddim").
    """
    return evaluate.fid(resolve("fid", settings).settings, str(what), Silent()).data


def train(run: str | Path, **settings: Any) -> Patched:
    """Train a patch into the run directory, or go on with it, in this process; returns it on its backbone.

    `settings`: options of `dmpctl patch` (base="digits", method="dmp", iters=1000, evaluate=False).
    """
    patch.patch(resolve("patch", {"evaluate": False, **settings, "run": Path(run)}).settings, Silent())
    return load_patch(run)
