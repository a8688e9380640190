"""Weights of a DiT: reading our files and other people's, finding the shape they have, and their identity."""

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.backbones.foreign import INERT_GLOBALS, Scalar, said_by
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import json_object, read_tensors
from dmpctl.runs.records import BackboneDescription, CodecRecord, EncoderRecord, as_record
from dmpctl.store.shapes import SHAPES
from dmpctl.types import ScheduleSpec

AVERAGE, LAST = ("ema",), ("model", "state_dict")  # entries of a checkpoint; one samples from the average
SELF = "dmpctl.dit"  # metadata of a DiT that describes itself
MODEL = "dmpctl.model"  # metadata of a backbone that is a model of diffusers
PATCH = "dmpctl.patch"  # metadata of a file that holds a patch beside its backbone
MOST_STEPS = 100_000  # of a noise schedule
PREFIXES = ("module.", "_orig_mod.")
HEADS = {width: heads for width, _, heads in SHAPES.values()}


@dataclass(frozen=True)
class Weights:
    """A state dict in the published layout. `taken`: the part of the file that it came from, in words.

    The rest is the file's own description, None where it has none (other people's files): `config` of a DiT, or `model`,
    diffusers' config of another network; `codec` whose latents it denoises; `text`, the encoder of its captions.
    `said`: the plain values of the config that other people's files carry, by dotted path.
    """

    tensors: dict[str, Tensor]
    taken: str
    config: DiTConfig | None = None
    schedule: ScheduleSpec | None = None
    data: str | None = None
    said: Mapping[str, Scalar] = field(default_factory=dict)
    codec: CodecRecord | None = None
    text: EncoderRecord | None = None
    model: Mapping[str, JsonValue] | None = None


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes: the identity of a backbone, whatever file it came in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def dit_metadata(config: DiTConfig, schedule: ScheduleSpec, data: str | None, codec: CodecRecord | None = None) -> dict[str, str]:
    """safetensors metadata of a DiT: shape, schedule, the data it was trained on and its codec (None: unknown)."""
    value = {"schema_version": 1, "config": asdict(config), "schedule": asdict(schedule), "data": data}
    value |= {} if codec is None else {"codec": codec.to_json()}
    return {SELF: json.dumps(value, sort_keys=True)}


def model_metadata(
    config: Mapping[str, JsonValue],
    schedule: ScheduleSpec,
    data: str | None,
    codec: CodecRecord | None,
    text: EncoderRecord | None,
) -> dict[str, str]:
    """safetensors metadata of a model of diffusers: as of a DiT, with its own config and the encoder of its captions."""
    value = {"schema_version": 1, "model": dict(config), "schedule": asdict(schedule), "data": data}
    value |= {"codec": codec and codec.to_json(), "text": text and text.to_json()}
    return {MODEL: json.dumps(value, sort_keys=True)}


def read_weights(path: Path, which: Literal["ema", "raw"] | None = None) -> Weights:
    """Read .safetensors, or a PyTorch checkpoint (bare, or inside `ema` / `model` / `state_dict`).

    `which`: the average or the last weights of a checkpoint, None: the average where there is one.
    MissingError if there is no such file; IntegrityError if it is corrupt or holds anything but tensors and a config:
    no code of a pickle is ever run. UsageError for weights that it does not hold, or a patch beside the backbone.
    """
    if not path.is_file():
        raise MissingError(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        tensors, metadata = read_tensors(path)
        if PATCH in metadata:
            hint = f"use the backbone alone; to take the two apart: dmpctl import {path} --run DIR"
            raise UsageError(f"{path} holds a backbone with a patch on it, and a patch fits a backbone alone", hint)
        if which == "ema":
            raise _no_such(path, which)
        return described_weights(path, tensors, metadata)
    value = _unpickle(path)
    tensors, taken = _unwrap(path, value, which)
    return Weights(tensors, taken, said=said_by(value))


def is_patched(path: Path) -> bool:
    """Whether the file holds a patch beside its backbone; reads no tensor, and reports no damage."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return PATCH in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _no_such(path: Path, which: str) -> UsageError:
    what = "average of its weights" if which == "ema" else "last weights beside their average"
    return UsageError(f"{path} holds no {what}", "leave --weights out")


def described_weights(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Weights:
    """Returns the backbone of a safetensors file as its metadata describes it; IntegrityError where that cannot be read."""
    content, weights = metadata.get(MODEL, metadata.get(SELF)), Weights(tensors, "the file")
    if content is None:
        return replace(weights, tensors=_plain_names(tensors))
    wrong = f"{path} describes itself in a way that cannot be read"
    return described(weights, json_object(content, f"{wrong}: it", 1), wrong)


def described(weights: Weights, about: Mapping[str, Any], wrong: str) -> Weights:
    """Returns `weights` with a description of them: metadata of their file, or backbone.json.

    IntegrityError, which begins with `wrong`, where it describes no backbone.
    """
    _refuse_more_than_there_is(weights.tensors, about, wrong)
    found = as_record(about, BackboneDescription, f"{wrong}: it")
    config: Any = found.config or {}
    try:
        shape, schedule = None if found.model is not None else DiTConfig(**config), ScheduleSpec(**about["schedule"])
    except (TypeError, UsageError) as error:
        raise IntegrityError(f"{wrong} ({error})") from None
    weights = replace(weights, config=shape, model=found.model, schedule=schedule)
    return replace(weights, data=found.data, codec=found.codec, text=found.text)


def _refuse_more_than_there_is(tensors: Mapping[str, Tensor], about: Mapping[str, Any], wrong: str) -> None:
    """IntegrityError for a description of more weights than these: a model of it would fill the memory before that is seen."""
    held = sum(tensor.numel() for tensor in tensors.values())
    config: Any = about.get("config") or about.get("model") or {}
    size = {key: value for key, value in config.items() if type(value) is int} if isinstance(config, dict) else {}
    steps = about["schedule"].get("steps", 0) if isinstance(about.get("schedule"), dict) else 0
    width = size.get("hidden_size", size.get("num_attention_heads", 1) * size.get("attention_head_dim", 1))
    depth, side = size.get("depth", size.get("num_layers", 1)), size.get("input_size", size.get("sample_size", 1))
    if max([*size.values(), depth * width**2, (side // max(1, size.get("patch_size", 1))) ** 2]) > held or depth > len(tensors):
        raise IntegrityError(f"{wrong}: it is of a larger model than its {held} numbers make", "copy the file again")
    if isinstance(steps, int) and steps > MOST_STEPS:
        raise IntegrityError(f"{wrong}: a schedule of {steps} steps is longer than {MOST_STEPS}", "copy the file again")


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(INERT_GLOBALS):  # the published training scripts store their settings too
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise anything: IndexError, struct.error, AssertionError, ...
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if forbidden:
            message = f"{path} holds more than tensors ({forbidden[1]}) and was not loaded"
            raise IntegrityError(message, "ask for a .safetensors file") from None
        reason = f"{type(error).__name__} {error}".splitlines()[0].strip()
        raise IntegrityError(f"{path} is not a readable checkpoint ({reason})") from None


def _unwrap(path: Path, value: Any, which: Literal["ema", "raw"] | None) -> tuple[dict[str, Tensor], str]:
    taken = "the file"
    held = [key for key in AVERAGE + LAST if isinstance(value, dict) and isinstance(value.get(key), dict)]
    wanted = [key for key in held if which is None or (key in AVERAGE) == (which == "ema")]
    if wanted:
        value, taken = value[wanted[0]], f"its '{wanted[0]}' entry"
    elif held or which == "ema":
        raise _no_such(path, str(which))
    found = value if isinstance(value, dict) else {}
    if not found or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()):
        raise IntegrityError(f"{path} holds no state dict (found {type(value).__name__})")
    return _plain_names(found), taken


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = dict(tensors)
    for prefix in PREFIXES * 2:  # compiled inside data-parallel, or the other way round
        if plain and all(name.startswith(prefix) for name in plain):
            plain = {name.removeprefix(prefix): value for name, value in plain.items()}
    return plain


def infer_config(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> DiTConfig:
    """The shape of a state dict in the published layout.

    `num_heads` None: as in the published model of that width. IntegrityError if this is no DiT;
    UsageError if the heads cannot be known.
    """
    try:
        width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        tokens = tensors["pos_embed"].shape[1]
        rows = tensors["y_embedder.embedding_table.weight"].shape[0]
        outputs = tensors["final_layer.linear.bias"].shape[0]
    except KeyError as error:
        raise IntegrityError(f"this is no DiT in the published layout: it lacks {error}") from None
    except (ValueError, IndexError):
        raise IntegrityError("this is no DiT in the published layout: its tensors have other dimensions") from None
    blocks = [re.match(r"blocks\.(\d{1,4})\.", name) for name in tensors]
    depth = 1 + max((int(block[1]) for block in blocks if block), default=-1)
    if not depth:
        raise IntegrityError("this is no DiT in the published layout: it lacks 'blocks.0'")
    heads = num_heads or HEADS.get(width)
    if heads is None:
        raise UsageError(
            f"a DiT of width {width} is no published shape, so its number of heads is unknown",
            "name a shape: --base DiT-S/2 --weights FILE, or say how many: dmpctl import FILE --num-heads N",
        )
    side = int(tokens**0.5) * patch
    return DiTConfig(
        side, channels, patch, width, depth, heads, 0 if rows == 1 else rows - 1, True, outputs == 2 * channels * patch * patch
    )


def dit_from(weights: Weights, num_heads: int | None = None, schedule: ScheduleSpec | None = None) -> DiT:
    """The model those weights are of; every key must fit. `schedule` None: what the file says, else DiT's linear one.

    IntegrityError on a missing or unexpected key or shape.
    """
    config = weights.config or infer_config(weights.tensors, num_heads)
    model = DiT(config, weights.schedule or schedule)
    fill(model, weights.tensors, "the DiT")
    return model


def fill(model: nn.Module, found: Mapping[str, Tensor], what: str) -> None:
    """Put a state dict into `model`; IntegrityError on a missing or unexpected key or shape."""
    wanted = model.state_dict()
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is unexpected" for name in found if name not in wanted]
    wrong += [
        f"{n} has shape {list(found[n].shape)}, expected {list(wanted[n].shape)}"
        for n in wanted
        if n in found and found[n].shape != wanted[n].shape
    ]
    if wrong:
        message = f"these weights do not fit {what} they claim to be: {'; '.join(wrong[:3])} ({len(wrong)} in all)"
        raise IntegrityError(message, "if the file holds a patch too, take the two apart: dmpctl import FILE --run DIR")
    model.load_state_dict(found)
