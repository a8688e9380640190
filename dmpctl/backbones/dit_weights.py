"""Weights of a DiT: reading our files and other people's, finding the shape they have, and their identity."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from dmpctl.backbones.dit import DiT, DiTConfig, shape_config
from dmpctl.backbones.told import Given, told
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import json_object, read_tensors
from dmpctl.foreign.said import Scalar, said_by, said_in
from dmpctl.foreign.tensors import refuse_unsound, unpickled
from dmpctl.foreign.unwrapped import unwrapped
from dmpctl.runs.records import BackboneDescription, CodecRecord, EncoderRecord, as_record
from dmpctl.store.shapes import SHAPES
from dmpctl.types import Inference, ScheduleSpec

SELF = "dmpctl.dit"  # metadata of a DiT that describes itself
MODEL = "dmpctl.model"  # metadata of a backbone that is a model of diffusers
PATCH = "dmpctl.patch"  # metadata of a file that holds a patch beside its backbone
MOST_STEPS = 100_000  # of a noise schedule
SCALE = 0.18215  # of Stable Diffusion's latents


@dataclass(frozen=True)
class Weights:
    """A state dict in the published layout. `taken`: the part of the file that it came from, in words.

    The rest is the file's own description, None where it has none (other people's files): `config` of a DiT, or `model`,
    diffusers' config of another network; `codec` whose latents it denoises; `text`, the encoder of its captions.
    `said`: the plain values of the config that other people's files carry, by dotted path; `assumed`: what nothing says, in
    sentences; `average`: whether these are an average of what was trained.
    """

    tensors: dict[str, Tensor]
    taken: str
    config: DiTConfig | None = None
    schedule: ScheduleSpec | None = None
    data: str | None = None
    said: Mapping[str, Scalar] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    average: bool = False
    codec: CodecRecord | None = None
    text: EncoderRecord | None = None
    model: Mapping[str, JsonValue] | None = None
    inference: Inference | None = None


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
    inference: Inference | None = None,
) -> dict[str, str]:
    """safetensors metadata of a model of diffusers: as of a DiT, with its own config and the encoder of its captions."""
    value = {"schema_version": 1, "model": dict(config), "schedule": asdict(schedule), "data": data}
    value |= {"codec": codec and codec.to_json(), "text": text and text.to_json()}
    value |= {} if inference is None else {"inference": asdict(inference)}
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
            raise UsageError(f"{path} holds no average of its weights", "leave --weights out")
        return described_weights(path, tensors, metadata)
    value = unpickled(path)
    return _of_others(path, value, which, said_by(value) if isinstance(value, dict) else {})


def _of_others(path: Path, value: object, which: Literal["ema", "raw"] | None, said: Mapping[str, Scalar]) -> Weights:
    found = unwrapped(path, value, which)
    refuse_unsound(found.tensors, path)
    aside = f"{found.beside} tensors beside those below '{found.prefix}' were left out"
    return Weights(found.tensors, found.words, said=said, assumed=(aside,) if found.beside else (), average=found.average)


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


def described_weights(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Weights:
    """Returns the backbone of a safetensors file as its metadata describes it; IntegrityError where that cannot be read."""
    content, weights = metadata.get(MODEL, metadata.get(SELF)), Weights(tensors, "the file")
    if content is None:
        return _of_others(path, tensors, None, said_in(metadata))
    refuse_unsound(tensors, path)
    wrong = f"{path} describes itself in a way that cannot be read"
    return described(weights, json_object(content, f"{wrong}: it", 1), wrong)


def described(weights: Weights, about: Mapping[str, Any], wrong: str) -> Weights:
    """Returns `weights` with a description of them: metadata of their file, or backbone.json.

    IntegrityError, which begins with `wrong`, where it describes no backbone.
    """
    found = as_record(about, BackboneDescription, f"{wrong}: it")
    refuse_larger(found.config or found.model or {}, sum(tensor.numel() for tensor in weights.tensors.values()), wrong)
    if found.schedule.steps > MOST_STEPS:
        raise IntegrityError(f"{wrong}: a schedule of {found.schedule.steps} steps is longer than {MOST_STEPS}", "copy it again")
    config: Any = found.config or {}
    try:
        shape, schedule = None if found.model is not None else DiTConfig(**config), ScheduleSpec(**about["schedule"])
    except (TypeError, UsageError) as error:
        raise IntegrityError(f"{wrong} ({error})") from None
    weights = replace(weights, config=shape, model=found.model, schedule=schedule)
    return replace(weights, data=found.data, codec=found.codec, text=found.text, inference=found.inference)


def refuse_larger(config: Mapping[str, Any], held: int, wrong: str) -> None:
    """IntegrityError for a config of a larger model than `held` numbers make: it would fill the memory before that is seen."""
    size = {key: value for key, value in config.items() if type(value) is int}
    width = size.get("hidden_size", size.get("num_attention_heads", 1) * size.get("attention_head_dim", 1))
    depth, side = size.get("depth", size.get("num_layers", 1)), size.get("input_size", size.get("sample_size", 1))
    if max([*size.values(), depth * width**2, (side // max(1, size.get("patch_size", 1))) ** 2]) > held:
        raise IntegrityError(f"{wrong}: it is of a larger model than its {held} numbers make", "copy the file again")


def known(path: Path, weights: Weights, given: Given) -> Weights:
    """Returns `weights` with the model they are of: as their file describes itself, or as `told` reads it.

    UsageError where an option says something else. Raises as `told` does.
    """
    if weights.config is None and weights.model is None:
        found = told(path, weights.tensors, weights.said, given)
        codec = weights.codec or (CodecRecord(name=found.codec, fingerprint=None, scale=SCALE) if found.codec else None)
        weights = replace(weights, tensors=found.tensors, config=found.config, schedule=found.schedule)
        weights = replace(weights, codec=codec, assumed=(*weights.assumed, *found.assumed))
    elif weights.schedule is not None and given.schedule not in (None, weights.schedule.kind):
        raise UsageError(
            f"{path} says that its schedule is {weights.schedule.kind}, not {given.schedule}", "leave --schedule out"
        )
    if given.shape is not None and weights.config is not None:
        _refuse_other_shape(path, weights.config, given.shape)
    return weights


def _refuse_other_shape(path: Path, config: DiTConfig, name: str) -> None:
    shape = shape_config(name)
    if shape is None:
        raise UsageError(f"--shape {name} is no published shape", f"known: {', '.join(SHAPES)}, each with /2, /4 or /8")
    for key in ("patch_size", "hidden_size", "depth", "num_heads"):
        wanted, found = getattr(shape, key), getattr(config, key)
        if wanted != found:
            raise UsageError(f"{path} is no {name}: its {key} is {found}, not {wanted}", f"leave {name} out")


def dit_from(weights: Weights, num_heads: int | None = None, schedule: ScheduleSpec | None = None) -> DiT:
    """The model those weights are of; every key must fit. `schedule` None: what the file says, else DiT's linear one.

    IntegrityError on a missing or unexpected key or shape.
    """
    if weights.config is None:
        found = told(weights.taken, weights.tensors, weights.said, Given(heads=num_heads))
        schedule = schedule or found.schedule
        weights = replace(weights, config=found.config, tensors=found.tensors)
    assert weights.config is not None
    model = DiT(weights.config, weights.schedule or schedule)
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
        apart = "it holds a patch too, take the two apart: dmpctl import FILE --run DIR"
        raise IntegrityError(message, apart if "prompt_embeddings" in found else "name the weights of one whole model")
    model.load_state_dict(found)
