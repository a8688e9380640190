"""From settings to things: backbone, patch, codec, source. What can fail fails here, before anything is written."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, assert_never

import torch

from dmpctl.backbones.sd_unet import SdUnet, sites_in
from dmpctl.data.source import NAMES, open_source
from dmpctl.engine.assets import require
from dmpctl.engine.backbone import BackboneModule, Loaded
from dmpctl.engine.codec import open_codec
from dmpctl.errors import UsageError
from dmpctl.methods.by_size import PatchBySize, by_size
from dmpctl.methods.dmp import DmpPatch, dmp_shape
from dmpctl.methods.full import FullPatch
from dmpctl.methods.lora import LoraPatch
from dmpctl.methods.prompt_tuning import PromptPatch
from dmpctl.methods.prompts import prompt_shape
from dmpctl.settings.launch import Launch
from dmpctl.settings.methods import Dmp, Full, Lora, Method, PromptTuning
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Data
from dmpctl.types import BackboneSpec, Codec, Source

PatchModule = DmpPatch | PromptPatch | PatchBySize | LoraPatch | FullPatch


def build_patch(model: BackboneModule, method: Method, seed: int = 0) -> PatchModule:
    """A fresh patch for this backbone, which is not changed; `seed`: of a start that is random.

    UsageError where the settings do not fit the backbone.
    """
    match method:
        case Dmp():
            own = in_part(method, model)
            return by_size(model.spec, own, lambda blocks: DmpPatch(dmp_shape(model.spec, own, blocks), own, seed))
        case PromptTuning():
            alike = in_part(method, model)
            return by_size(model.spec, alike, lambda blocks: PromptPatch(prompt_shape(model.spec, alike, blocks), alike, seed))
        case Lora():
            return LoraPatch(model, method, seed)
        case Full():
            return FullPatch(model, method)
        case _:
            assert_never(method)


P = TypeVar("P", Dmp, PromptTuning)


def in_part(method: P, model: BackboneModule) -> P:
    """The method with --sites as blocks; UsageError where the backbone has no such parts."""
    if method.sites == "all":
        return method
    if not isinstance(model, SdUnet):
        raise UsageError(f"--sites {method.sites} is for a U-Net", "name blocks: --prompt-sites 0-3")
    chosen = sites_in(model.block_names, method.sites)
    if not chosen:
        raise UsageError(f"this U-Net has no transformer block in its {method.sites} part", "use --sites all")
    return method.model_copy(update={"sites": "all", "prompt_sites": ",".join(map(str, chosen))})


def build_codec(loaded: Loaded, settings: Settings, recorded: Mapping[str, Any] | None = None) -> Codec:
    """The codec of a backbone: the one it was trained with unless --codec says otherwise. Raises as `open_codec` does.

    `recorded`: of the codec its patch was trained with, None: the backbone's own record.
    """
    channels = loaded.spec.latent_shape[0]
    return open_codec(settings.codec, partial(require, settings=settings), channels, recorded or loaded.codec)


def own_data(data: Data, settings: Settings) -> Data:
    """The same, with a row of the user's own (kind "data") as what can be opened without it: a path, or an hf:// address.

    MissingError with the command that fetches it; UsageError for a row that is no data.
    """
    rows = {row.name: row for row in settings.assets.rows}
    name = data.data
    if name not in rows or name in NAMES or Path(name).expanduser().exists():
        return data  # a row of a published name changes what is fetched under it, not how it is found
    row = rows[name]
    if row.kind != "data":
        raise UsageError(f"--data {name} is a row of kind {row.kind}", 'give that row kind = "data"')
    place = f"hf://{row.repo}@{row.revision or 'main'}" if row.repo is not None else str(require(name, settings))
    return data.model_copy(update={"data": place})


def open_images(data: Data, size: int | None, channels: int | None, settings: Settings | None = None) -> Source:
    """The images that `data` names; what is published is looked for in the cache of downloads. Raises as `open_source` does.

    `size` and `channels` None: the data's own. `settings`: with the user's own rows of the registry, None: the shipped ones.
    """
    own = data if settings is None else own_data(data, settings)
    return open_source(own, size, channels, partial(require, settings=settings))


def open_data(data: Data, spec: BackboneSpec, codec: Codec, trained_on: str | None, settings: Settings | None = None) -> Source:
    """The images to train on, in the size and channels the backbone takes; `trained_on`: the default for --data.

    `settings` as for `open_images`.
    """
    name = data.data or trained_on
    if name is None:
        raise UsageError("nothing says which images to patch on", "add --data digits or --data DIR")
    channels, height, _ = codec.image_shape(spec.latent_shape)
    if data.size not in (None, height):
        raise UsageError(f"this backbone takes {height}x{height} images, --size says {data.size}", "leave --size out")
    if data.channels not in (None, channels):
        raise UsageError(
            f"this backbone takes images of {channels} channels, --channels says {data.channels}", "leave --channels out"
        )
    source = open_images(data.model_copy(update={"data": name}), height, channels, settings)
    if spec.num_classes and source.num_classes != spec.num_classes:
        raise UsageError(
            f"this backbone has {spec.num_classes} classes, {source.name} has {source.num_classes or 'none'}",
            "name data with the classes that it was trained on, in the same order",
        )
    return source


def resolve_device(launch: Launch) -> torch.device:
    """The device to use; UsageError where it is not there."""
    if launch.cpu or launch.device == "cpu":
        return torch.device("cpu")
    if launch.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(launch.device)
    there = torch.cuda.device_count() if device.type == "cuda" else int(torch.backends.mps.is_available())
    if there <= (device.index or 0):
        raise UsageError(f"--device {launch.device} is not there ({there} found)", "use --device cpu")
    return device
