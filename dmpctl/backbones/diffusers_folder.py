"""A backbone from a folder in the layout of diffusers: a pipeline (model_index.json) or one model (config.json)."""

import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue, TypeAdapter, ValidationError
from torch import nn

from dmpctl.backbones.diffusers_dit import DiffusersDiT
from dmpctl.backbones.dit_weights import refuse_larger
from dmpctl.backbones.pixart import PixArt
from dmpctl.backbones.sd_unet import SdUnet
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import read_json
from dmpctl.foreign.folders import refuse_unsound_files, variant_of
from dmpctl.types import Inference, ScheduleKind, ScheduleSpec

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
INFERENCE = tuple(field.name for field in fields(Inference))  # keys of a scheduler file that are used in sampling
TRAINED = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")  # and of the training
ONLY: dict[str, tuple[object, ...]] = {  # keys that have to have this value
    "prediction_type": ("epsilon",),
    "trained_betas": (None, []),
    **dict.fromkeys(("rescale_betas_zero_snr", "thresholding", "use_flow_sigmas", "use_dynamic_shifting"), (False, None)),
}
OF_ITS_SAMPLER = re.compile(  # keys of one sampler of diffusers, which --sampler chooses here; and of what is switched off
    r"solver_.*|algorithm_type|lower_order_final|euler_at_final|final_sigmas_type|use_(karras|exponential|beta)_sigmas|use_lu_lambdas"
    r"|lambda_min_clipped|interpolation_type|timestep_type|sigma_(min|max|data)|dynamic_thresholding_ratio|sample_max_value|flow_shift"
    r"|predict_x0|disable_corrector|s_noise|original_inference_steps|timestep_scaling|time_shift_type|flow_.*|noise_sampler_seed"
)


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
    config, held = (
        read_json(inside / "config.json"),
        sum(p.stat().st_size for p in inside.iterdir() if p.suffix in (".safetensors", ".bin")),
    )
    name = str(config.get("_class_name"))
    if name not in KINDS:
        raise UsageError(f"{inside} holds a {name}, which cannot be patched", f"name one of {', '.join(KINDS)}")
    refuse_larger(config, held or sys.maxsize, f"{inside / 'config.json'} does not describe the weights beside it")
    schedule, inference = schedule_in(inside.parent / "scheduler" / "scheduler_config.json")
    made = wrapped(loaded(inside, name), schedule)
    made.inference = inference
    return made, folder if part is not None else None


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
    refuse_unsound_files(folder, ".bin")  # before anyone else opens a pickle
    try:
        with torch.inference_mode(False):  # or its tensors could not be trained through, nor moved
            model, found = load(folder, local_files_only=True, output_loading_info=True, variant=variant_of(folder))
        wrong = [f"{kind.removesuffix('_keys')} {key}" for kind, keys in found.items() for key in keys]
        if not wrong:
            refuse_unsound_files(folder)
            whole: nn.Module = model.float()
            return whole
        why = f"{wrong[0]} ({len(wrong)} such keys)"
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        why = str(error).splitlines()[0].split(". ")[0]
    raise IntegrityError(f"{folder} is no {name} that can be read: {why}", "fetch it again, or name another one")


def schedule_in(path: Path) -> tuple[ScheduleSpec | None, Inference | None]:
    """Returns the schedule of a pipeline and how it is sampled; None where it has none.

    UsageError, with its name, for a key or a value that we do not have.
    """
    if not path.is_file():
        return None, None
    config = read_json(path)
    kind, start, end = (config.get(key) for key in ("beta_schedule", "beta_start", "beta_end"))
    known = BETAS.get((kind, None, None) if kind == "squaredcos_cap_v2" else (kind, start, end))
    if known is None:
        raise UsageError(f"{path} has a noise schedule {kind} from {start} to {end}, which is not known", "name another model")
    name, own = str(config.get("_class_name")), {key: config[key] for key in INFERENCE if config.get(key) is not None}
    for key, value in config.items():
        if key in ONLY and value not in ONLY[key]:
            said = "the model predicts" if key == "prediction_type" else f"{key} is"
            hint = "name one that predicts epsilon" if key == "prediction_type" else "name another model"
            raise UsageError(f"{path} says that {said} {str(value)[:40]}, which is not supported", hint)
        if key not in (*ONLY, *INFERENCE, *TRAINED) and not key.startswith("_") and not OF_ITS_SAMPLER.fullmatch(key):
            raise UsageError(f"{path} says {key} = {str(value)[:40]}, and it is not known what that means", "name another model")
    of_class = {"clip_sample": name.startswith(("DDIM", "DDPM")), "skip_prk_steps": name != "PNDMScheduler"}
    try:
        inference = TypeAdapter(Inference).validate_python(of_class | own)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UsageError(f"{path} says {wrong['loc'][0]} = {wrong['input']}, which is not known", "name another model") from None
    return ScheduleSpec(known, int(config.get("num_train_timesteps", 1000))), inference
