"""A backbone from a folder in the layout of diffusers: a pipeline (model_index.json) or one model (config.json)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import nn

from dmpctl.backbones.diffusers_dit import DiffusersDiT
from dmpctl.backbones.pixart import PixArt
from dmpctl.backbones.sd_unet import SdUnet
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import read_json
from dmpctl.types import ScheduleKind, ScheduleSpec

KINDS: dict[str, type[DiffusersDiT] | type[PixArt] | type[SdUnet]] = {
    "DiTTransformer2DModel": DiffusersDiT,
    "PixArtTransformer2DModel": PixArt,
    "UNet2DConditionModel": SdUnet,
}
PARTS = ("transformer", "unet")  # the folder of a pipeline that holds the network
BETAS: dict[tuple[object, object, object], ScheduleKind] = {  # beta_schedule, beta_start, beta_end of diffusers -> our name
    ("linear", 1e-4, 0.02): "linear",
    ("scaled_linear", 0.00085, 0.012): "scaled-linear",
    ("squaredcos_cap_v2", None, None): "cosine",
}
Foreign = DiffusersDiT | PixArt | SdUnet


def holds_diffusers(folder: Path) -> bool:
    """Whether a folder is laid out as diffusers does it."""
    if (folder / "model_index.json").is_file():
        return True
    return (folder / "config.json").is_file() and "_class_name" in read_json(folder / "config.json")


def open_folder(folder: Path) -> tuple[Foreign, Path | None]:
    """Returns the backbone in a folder, on the CPU in float32, and the pipeline that it lies in (None: it is alone).

    UsageError for a model of another kind or a schedule we do not have; IntegrityError for weights that do not fit their
    config; MissingError where there are none.
    """
    part = next((folder / part for part in PARTS if (folder / part / "config.json").is_file()), None)
    inside = part or folder
    if not (inside / "config.json").is_file():
        raise MissingError(f"{folder} holds no model ({' or '.join(PARTS)})", "name a folder as diffusers saves it")
    name = str(read_json(inside / "config.json").get("_class_name"))
    if name not in KINDS:
        raise UsageError(f"{inside} holds a {name}, which cannot be patched", f"name one of {', '.join(KINDS)}")
    schedule = schedule_in(inside.parent / "scheduler" / "scheduler_config.json")
    return wrapped(loaded(inside, name), schedule), folder if part is not None else None


def wrapped(model: nn.Module, schedule: ScheduleSpec | None = None, text_tokens: int | None = None) -> Foreign:
    """Returns a model of diffusers in memory as a backbone; UsageError for one that cannot be."""
    name = type(model).__name__
    if name not in KINDS:
        raise UsageError(f"a {name} cannot be patched", f"known are {', '.join(KINDS)}")
    try:
        return KINDS[name](model, schedule, text_tokens)
    except ValueError as error:
        raise UsageError(f"this {name} cannot be patched: {error}", "Stable Diffusion 1.x is known to work") from None


def made(config: Mapping[str, JsonValue], schedule: ScheduleSpec | None, text_tokens: int | None) -> Foreign:
    """Returns a model of this config, with the start that diffusers gives it. IntegrityError for a config that makes none."""
    import diffusers

    name = str(config.get("_class_name"))
    try:
        kind: Any = getattr(diffusers, name if name in KINDS else "")
        return wrapped(kind.from_config(dict(config)), schedule, text_tokens)
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError) as error:
        raise IntegrityError(f"a config of {name} makes no model ({error})") from None


def loaded(folder: Path, name: str) -> nn.Module:
    """Returns the model itself in float32; IntegrityError unless every key fits."""
    import diffusers

    load: Any = getattr(diffusers, name).from_pretrained
    try:
        with torch.inference_mode(False):  # or its tensors could not be trained through, nor moved
            model, found = load(folder, local_files_only=True, output_loading_info=True)
        wrong = [f"{kind.removesuffix('_keys')} {key}" for kind, keys in found.items() for key in keys]
        if not wrong:
            whole: nn.Module = model.float()
            return whole
        why = f"{wrong[0]} ({len(wrong)} such keys)"
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        why = str(error).splitlines()[0].split(". ")[0]
    raise IntegrityError(f"{folder} is no {name} that can be read: {why}", "fetch it again, or name another one")


def schedule_in(path: Path) -> ScheduleSpec | None:
    """Returns the schedule of a pipeline; None where it has none. UsageError for one that we do not have."""
    if not path.is_file():
        return None
    config = read_json(path)
    prediction = config.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        hint = "name one that predicts epsilon"
        raise UsageError(f"{path} says that the model predicts {prediction}, which is not supported", hint)
    kind, start, end = (config.get(key) for key in ("beta_schedule", "beta_start", "beta_end"))
    known = BETAS.get((kind, None, None) if kind == "squaredcos_cap_v2" else (kind, start, end))
    if known is None:
        raise UsageError(f"{path} has a noise schedule {kind} from {start} to {end}, which is not known", "name another model")
    return ScheduleSpec(known, int(config.get("num_train_timesteps", 1000)))
