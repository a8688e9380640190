"""The six names for Python: `import dmpctl`, and the same settings that the command line has, as keyword arguments."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from dmpctl.errors import UsageError
from dmpctl.files import run_of
from dmpctl.measuring import evaluate
from dmpctl.models import applied
from dmpctl.models.backbone import Loaded
from dmpctl.models.backbone import load_backbone as _load_backbone
from dmpctl.models.conditions import Prompts, encoded
from dmpctl.models.patch_files import load_result
from dmpctl.models.patched import Patched
from dmpctl.processes.ranks import resolve_device
from dmpctl.refusals import meant, shown
from dmpctl.sampling import generate
from dmpctl.settings.layers import resolve, written_of
from dmpctl.settings.options import options_of
from dmpctl.settings.sections import Base
from dmpctl.training import patch
from dmpctl.types import Silent

UNUSED = ("num_images", "format", "unpatched", "out", "weights", "prompt", "prompts", "dry_run")  # have no say in `sample`

__all__ = ["apply", "load_backbone", "load_patch", "measure", "sample", "train"]


def load_backbone(name: str | Path = "digits", weights: str | Path | None = None) -> Loaded:
    """Returns a frozen backbone by `--base`: bundled, a shape with `weights`, a file, a run, a folder of diffusers.

    Its `model` is a torch module: `model.denoise(x, t, cond)`. Raises errors.DmpError as `dmpctl patch` does.
    """
    base, file = _path("name", name), None if weights is None else Path(_path("weights", weights))
    return _load_backbone(Base(base=base, weights=file))


def load_patch(run: str | Path) -> Patched:
    """Returns the patch of a run on its backbone, checked by sha256. `run`: a folder, or what `export --to merged` wrote."""
    return load_result(Path(_path("run", run)))


def apply(target: Any, patch: Patched | str | Path | None) -> Any:
    """Puts a patch on `target` in place: a pipeline of diffusers, or its transformer or U-Net; None takes it off.

    `target` may be a `Loaded` backbone, too: then a new `Patched` is returned, and nothing changes. IntegrityError for a
    patch that was trained on other weights. A run's path stands for its patch.
    """
    patch = None if patch is None else _patched("patch", patch)
    if isinstance(target, Loaded):
        if patch is not None and patch.backbone.digest != target.digest:
            raise UsageError("the patch was trained on other weights", f"use {patch.backbone.origin}")
        return Patched(target) if patch is None else replace(patch, backbone=target)
    return applied.apply_patch(target, patch)


def sample(
    model: Patched | Loaded | str | Path, count: int, prompts: str | Sequence[str] | None = None, **settings: Any
) -> Tensor:
    """Returns images uint8 [count, C, H, W] of a model, or of the run at a path.

    `settings`: options of `dmpctl sample` (sampler="ddim", steps=50, cfg=2.0, label=3).
    `prompts` for a text-conditional model: image k shows prompt k modulo their number; None: captions of its data.
    """
    if not isinstance(count, SupportsIndex) or isinstance(count, bool) or operator.index(count) < 1:
        raise UsageError(f"count takes a whole number of 1 or more, found {shown(count)}", "say how many images: count=4")
    given, count = _options("sample", "sample", settings, UNUSED), operator.index(count)
    run = run_of(Path(model).expanduser()) if isinstance(model, str | Path) else None
    resolved = resolve("sample", given, run=run, python=True).settings
    label = resolved.images.image_label
    made = _patched("model", model).with_codec(resolved)
    if prompts is None:
        made = made.with_prompts(resolved, count, Silent())
    elif made.text is None:
        raise UsageError("prompts are for a text-conditional model, this one is not", "leave them out")
    else:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UsageError(f"prompts takes text, or a list of texts, found {shown(prompts)}", 'such as prompts="a red car"')
        made = replace(made, prompts=Prompts(encoded(texts, made.text, resolved, Silent()), tuple(texts), {"from": "Python"}))
    device = resolve_device(resolved.launch)
    batches = generate.in_batches(made, range(count), resolved.sampling, device, Silent(), label)
    return torch.cat([images for _, images in batches])


def measure(what: str | Path, **settings: Any) -> dict[str, Any]:
    """Returns the JSON of `dmpctl fid WHAT`: the distance of a run, a folder or an npz, with its protocol and standard error.

    `settings`: options of `dmpctl fid` (reference="coco-val", max_images=5000, sampler="ddim").
    """
    given = _options("measure", "fid", settings)
    word = _path("what", what)
    path = Path(word).expanduser()
    word = word if (run := run_of(path)) == path else str(run)
    return evaluate.fid(resolve("fid", given, run=run, python=True).settings, word, Silent()).data


def train(run: str | Path, **settings: Any) -> Patched:
    """Train a patch into the run directory, or go on with it, in this process; returns it on its backbone.

    `settings`: options of `dmpctl patch` (base="digits", method="dmp", iters=1000, evaluate=False).
    """
    given = {"evaluate": False, **_options("train", "patch", settings), "run": Path(_path("run", run))}
    patch.patch(resolve("patch", given, python=True).settings, Silent())
    return load_patch(run)


def _options(function: str, command: str, given: Mapping[str, object], refused: Sequence[str] = ()) -> dict[str, object]:
    """Options by field, of those that `command` has; UsageError with the nearest name for another one."""
    options = {option.public: option for option in options_of(command).values() if option.public not in refused}
    fields = {option.name: option.name for option in options.values()} | {public: each.name for public, each in options.items()}
    for name in given:
        if name not in fields:
            hint = meant(name, written_of(options), "argument", f"dmpctl {command} --help lists them, with _ for -")
            raise UsageError(f"{function}() has no option {name}", hint)
    return {fields[name]: value for name, value in given.items()}


def _path(name: str, value: object) -> str:
    """A path or an address as text; UsageError that names the argument for anything else."""
    if not isinstance(value, str | Path) or not str(value):
        raise UsageError(f"{name} takes a path or a name, found {shown(value)}", f'such as {name}="runs/digits"')
    return str(value)


def _patched(name: str, value: object) -> Patched:
    """A model, or the one that the run at this path has made."""
    if isinstance(value, str | Path):
        return load_patch(value)
    if not isinstance(value, Patched | Loaded):
        what = "the path of a run, or what load_patch or load_backbone returns"
        raise UsageError(f"{name} takes {what}, found {shown(value)}", f'such as {name}="runs/digits"')
    return value if isinstance(value, Patched) else Patched(value)
