"""A backbone from a folder in the layout of diffusers: a pipeline (model_index.json) or one model (config.json)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dmpctl.backbones.diffusers_dit import DiffusersDiT
from dmpctl.backbones.pixart import PixArt
from dmpctl.backbones.sd_unet import SdUnet
from dmpctl.errors import DmpError, IntegrityError, MissingError, UsageError
from dmpctl.files import read_json
from dmpctl.types import ScheduleKind, ScheduleSpec

KINDS: dict[str, type[DiffusersDiT] | type[PixArt] | type[SdUnet]] = {
    "DiTTransformer2DModel": DiffusersDiT,
    "PixArtTransformer2DModel": PixArt,
    "UNet2DConditionModel": SdUnet,
}
PARTS = ("transformer", "unet")  # of a pipeline, what denoises
BETAS: dict[tuple[Any, Any, Any], ScheduleKind] = {  # beta_schedule, beta_start, beta_end of diffusers -> our name
    ("linear", 1e-4, 0.02): "linear",
    ("scaled_linear", 0.00085, 0.012): "scaled-linear",
    ("squaredcos_cap_v2", None, None): "cosine",
}
Foreign = DiffusersDiT | PixArt | SdUnet


@dataclass(frozen=True)
class Opened:
    """The model, and the pipeline it lies in (None: it is alone)."""

    model: Foreign
    pipeline: Path | None


def holds_diffusers(folder: Path) -> bool:
    """Whether a folder is laid out as diffusers does it."""
    if (folder / "model_index.json").is_file():
        return True
    return (folder / "config.json").is_file() and "_class_name" in read_json(folder / "config.json")


def open_folder(folder: Path) -> Opened:
    """The backbone in a folder, on the CPU in float32.

    UsageError for a model of another kind or a schedule we do not have; IntegrityError for weights that do not fit their
    config; MissingError where there are none.
    """
    part = next((folder / part for part in PARTS if (folder / part / "config.json").is_file()), None)
    inside = part or folder
    if not (inside / "config.json").is_file():
        raise MissingError(f"{folder} holds no model ({' or '.join(PARTS)})", "name a folder as diffusers saves it")
    config = read_json(inside / "config.json")
    name = str(config.get("_class_name"))
    if name not in KINDS:
        raise UsageError(f"{inside} holds a {name}, which cannot be patched", f"name one of {', '.join(KINDS)}")
    schedule = schedule_in(inside.parent / "scheduler" / "scheduler_config.json")
    return Opened(wrapped(loaded(inside, name), schedule), folder if part is not None else None)


def wrapped(model: nn.Module, schedule: ScheduleSpec | None = None, text_tokens: int | None = None) -> Foreign:
    """A model of diffusers in memory as a backbone; UsageError for one that cannot be."""
    name = type(model).__name__
    if name not in KINDS:
        raise UsageError(f"a {name} cannot be patched", f"known are {', '.join(KINDS)}")
    try:
        return KINDS[name](model, schedule, text_tokens)
    except ValueError as error:
        raise UsageError(f"this {name} cannot be patched: {error}", "Stable Diffusion 1.x is known to work") from None


def made(config: Mapping[str, Any], schedule: ScheduleSpec | None, text_tokens: int | None) -> Foreign:
    """A model from its config alone, with whatever start diffusers gives it. IntegrityError for a config that makes none."""
    import diffusers

    name = str(config.get("_class_name"))
    try:
        kind: Any = getattr(diffusers, name if name in KINDS else "")
        return wrapped(kind.from_config(dict(config)), schedule, text_tokens)
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError) as error:
        raise IntegrityError(f"a config of {name} makes no model ({error})") from None


def loaded(folder: Path, name: str) -> nn.Module:
    """The model itself; every key must fit."""
    import diffusers

    load: Any = getattr(diffusers, name).from_pretrained
    try:
        with torch.inference_mode(False):  # or its tensors could not be trained through, nor moved
            model, found = load(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise _refused(folder, name, str(error).splitlines()[0].split(". ")[0]) from None
    wrong = [f"{kind.removesuffix('_keys')} {key}" for kind, keys in found.items() for key in keys]
    if wrong:
        raise _refused(folder, name, f"{wrong[0]} ({len(wrong)} such keys)")
    model.float()
    result: nn.Module = model
    return result


def _refused(folder: Path, name: str, why: str) -> DmpError:
    return IntegrityError(f"{folder} is no {name} that can be read: {why}", "fetch it again, or name another one")


def schedule_in(path: Path) -> ScheduleSpec | None:
    """The schedule of a pipeline; None where it has none. UsageError for one that we do not have."""
    if not path.is_file():
        return None
    config = read_json(path)
    prediction = config.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise UsageError(
            f"{path} says that the model predicts {prediction}, which is not supported", "name one that predicts epsilon"
        )
    kind, start, end = (config.get(key) for key in ("beta_schedule", "beta_start", "beta_end"))
    key = (kind, None, None) if kind == "squaredcos_cap_v2" else (kind, start, end)
    if key not in BETAS:
        raise UsageError(f"{path} has a noise schedule {kind} from {start} to {end}, which is not known", "name another model")
    return ScheduleSpec(BETAS[key], int(config.get("num_train_timesteps", 1000)))
