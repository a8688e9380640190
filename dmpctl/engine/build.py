"""From settings to things: backbone, patch, codec, source. What can fail fails here, before anything is written."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar, assert_never

import torch
from torch import nn

from dmpctl.backbones.diffusers_folder import Foreign, holds_diffusers, made, open_folder
from dmpctl.backbones.dit import FLOWS, SHAPES, DiT, DiTConfig, is_flow, shape_config
from dmpctl.backbones.dit_weights import (
    Weights,
    described_model,
    digest_of,
    dit_from,
    dit_metadata,
    fill,
    model_metadata,
    read_weights,
)
from dmpctl.backbones.pixart import PixArt, fresh, plain_config
from dmpctl.backbones.sd_unet import SdUnet, sites_in
from dmpctl.codecs.vae import Vae
from dmpctl.data.source import NAMES, open_source
from dmpctl.engine.assets import address_in, folder_at_hand, require, weights_at_hand
from dmpctl.engine.codec import open_codec
from dmpctl.engine.registry import SHIPPED
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import read_json
from dmpctl.methods.by_size import PatchBySize, by_size
from dmpctl.methods.dmp import DmpPatch, dmp_shape
from dmpctl.methods.full import FullPatch
from dmpctl.methods.lora import LoraPatch
from dmpctl.methods.prompt_tuning import PromptPatch
from dmpctl.methods.prompts import prompt_shape
from dmpctl.settings.assets import AssetRow
from dmpctl.settings.launch import Launch
from dmpctl.settings.methods import Dmp, Full, Lora, Method, PromptTuning
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Base, Data
from dmpctl.types import BackboneSpec, Codec, ScheduleSpec, Source, TextSpec

BUNDLED = {"digits": "digits-dit.safetensors"}
PUBLISHED_SHAPES = {"DiT-XL/2": "dit-xl2-256"}  # shapes with public weights, and the row of the registry that has them
BackboneModule = DiT | Foreign
PatchModule = DmpPatch | PromptPatch | PatchBySize | LoraPatch | FullPatch


@dataclass(frozen=True)
class Loaded:
    """A frozen backbone and where it came from.

    `data`: what it was trained on, `codec` and `text`: the records of the codec and of the encoder of captions it was trained
    with; None if its file does not say.
    """

    model: BackboneModule
    digest: str
    origin: str
    data: str | None
    codec: Mapping[str, Any] | None = None
    text: Mapping[str, Any] | None = None

    @property
    def spec(self) -> BackboneSpec:
        return self.model.spec


def facts_of(model: BackboneModule) -> dict[str, Any]:
    """Config and schedule of a network, JSON-able: with its weights all that makes it again."""
    schedule = {"schedule": asdict(model.schedule)}
    return ({"config": asdict(model.config)} if isinstance(model, DiT) else {"model": plain_config(model.model)}) | schedule


def metadata_of(loaded: Loaded, codec: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None) -> dict[str, str]:
    """safetensors metadata of a backbone; `codec` and `text`: the records of what it is used with, None: its own."""
    codec, text, model = codec or loaded.codec, text or loaded.text, loaded.model
    if isinstance(model, DiT):
        return dit_metadata(model.config, model.schedule, loaded.data, codec)
    return model_metadata({"schema_version": 1, **facts_of(model), "data": loaded.data, "codec": codec, "text": text})


M = TypeVar("M", bound=nn.Module)


def freeze(model: M) -> M:
    """Eval mode, no gradients: a backbone is never anything else."""
    return model.eval().requires_grad_(False)


def load_backbone(base: Base, data: str | None = None) -> Loaded:
    """The backbone that --base (and --weights) name, frozen, on the CPU. `data`: what it is for, for hints; None: not known.

    UsageError for an unknown name, MissingError where weights are needed, IntegrityError where they do not fit.
    """
    path, heads = backbone_file(base, data)
    if path.is_dir():
        return pipeline_backbone(path)
    weights = described_beside(path, read_weights(path))
    model = freeze(model_from(weights, heads, ScheduleSpec("flow") if is_flow(base.base) else None))
    return Loaded(model, digest_of(model.state_dict()), f"{path} ({weights.taken})", weights.data, weights.codec, weights.text)


def model_from(weights: Weights, num_heads: int | None = None, schedule: ScheduleSpec | None = None) -> BackboneModule:
    """The network those weights are of; every key must fit. `num_heads`, `schedule`: of a DiT whose file does not say.

    IntegrityError on a missing or unexpected key or shape.
    """
    if weights.model is None:
        return dit_from(weights, num_heads, schedule)
    model = made(weights.model, weights.schedule, (weights.text or {}).get("tokens"))
    fill(model, weights.tensors, f"the {weights.model.get('_class_name')}")
    return model


def pipeline_backbone(folder: Path) -> Loaded:
    """The backbone in a folder of diffusers, with the codec and the encoder of captions that lie beside it."""
    opened = open_folder(folder)
    model, pipeline = freeze(opened.model), opened.pipeline
    codec = text = None
    if pipeline is not None and (pipeline / "vae" / "config.json").is_file():
        vae = Vae(pipeline, str(pipeline.absolute()))
        codec = {"name": vae.name, "fingerprint": vae.fingerprint, "scale": vae.scale}
    if pipeline is not None and (pipeline / "text_encoder" / "config.json").is_file():
        text = {"name": str(pipeline.absolute())}
    return Loaded(model, digest_of(model.state_dict()), str(folder), None, codec, text)


def described_beside(path: Path, weights: Weights) -> Weights:
    """`weights`, described by the backbone.json beside them where they do not describe themselves: so in checkpoints."""
    beside = path.parent / "backbone.json"
    if weights.config is not None or path.name != "backbone.safetensors" or not beside.is_file():
        return weights
    about = read_json(beside, 1)
    if "model" in about:
        return described_model(beside, weights, about)
    try:
        config, schedule = DiTConfig(**about["config"]), ScheduleSpec(**about["schedule"])
        return replace(weights, config=config, schedule=schedule, data=about["data"], codec=about.get("codec"))
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{beside} does not describe the backbone beside it ({error})") from None


def backbone_file(base: Base, data: str | None = None) -> tuple[Path, int | None]:
    """Where the weights of --base lie (a folder: of diffusers), and the heads that a shape name fixes (None: the file says)."""
    address = address_in(base.base)
    if address is not None:
        return folder_at_hand(address), None
    if base.base in BUNDLED:
        return Path(str(resources.files("dmpctl") / "assets" / BUNDLED[base.base])), None
    shape = shape_config(base.base.removesuffix(TEXT))
    if shape is not None:
        if base.weights is None:
            raise without_weights(base.base, shape, data or "DIR")
        address = address_in(base.weights)
        return base.weights if address is None else weights_at_hand(address), shape.num_heads
    path = Path(base.base).expanduser()
    if base.base in SHIPPED and not path.exists():
        return published_file(SHIPPED[base.base]), None
    if path.is_dir() and holds_diffusers(path):
        return path, None
    if path.is_dir():
        if not (path / "backbone.safetensors").is_file():
            raise MissingError(
                f"{path} holds no finished backbone (backbone.safetensors)", "name a run of dmpctl pretrain that has ended"
            )
        return path / "backbone.safetensors", None
    if path.is_file():
        return path, None
    raise unknown_base(base.base)


def published_file(row: AssetRow, settings: Settings | None = None) -> Path:
    """The file, or the folder of diffusers, of a backbone of the registry, checked.

    MissingError with the command that fetches it; UsageError for a row that is no backbone.
    """
    if row.kind != "backbone":
        raise UsageError(f"--base {row.name} is no backbone but {row.what}", f"name one, such as {PUBLISHED_SHAPES['DiT-XL/2']}")
    return require(row.name, settings)


def without_weights(name: str, shape: DiTConfig, data: str) -> MissingError:
    """The failure for a shape without weights: where they can come from, as commands to be pasted."""
    command = f"dmpctl patch --base {name} --data {quote(data)} --weights FILE"
    if name in PUBLISHED_SHAPES:
        published = f"dmpctl patch --base {PUBLISHED_SHAPES[name]} --data {quote(data)}"
        return MissingError(f"no weights for {name}: none were named", f"the published ones: {published}; your own: {command}")
    sizes = (
        f"--hidden-size {shape.hidden_size} --depth {shape.depth} --num-heads {shape.num_heads} --patch-size {shape.patch_size}"
    )
    if name.endswith(TEXT):
        sizes += " --text-conditional --text-encoder clip-l"
    elif is_flow(name):
        sizes += " --schedule flow"
    pretrain = f"dmpctl pretrain --data {quote(data)} --codec vae-ema --size 256 {sizes}"
    hint = f"with a checkpoint of your own: {command}; or train one first: {pretrain}"
    return MissingError(f"no weights for {name}: no public checkpoint of this shape exists", hint)


def unknown_base(name: str) -> UsageError:
    """The failure for a --base that is nothing we know, with the nearest name."""
    from difflib import get_close_matches

    shapes = [f"{shape}/{patch}" for shape in SHAPES | FLOWS for patch in (2, 4, 8)]
    near = get_close_matches(name, [*BUNDLED, *shapes, *PUBLISHED_SHAPES.values(), *SHIPPED], 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else f"name one of {', '.join(BUNDLED)}, a shape such as DiT-L/2, a file or a run"
    return UsageError(f"--base {name} is no known backbone, no file and no run", hint)


TEXT = "-text"  # behind a shape: with attention to captions in every block
CLIP = TextSpec(77, 768)  # CLIP ViT-L/14's


def is_planned(base: Base) -> bool:
    """Whether a shape is named without weights, for a report that needs none."""
    return base.weights is None and shape_config(base.base.removesuffix(TEXT)) is not None


def planned_model(base: Base) -> BackboneModule:
    """The network of a shape, whatever its weights: `DiT-B/2-text` is PixArt's of that size, with captions of CLIP ViT-L/14."""
    shape = shape_config(base.base.removesuffix(TEXT))
    if shape is None:
        raise unknown_base(base.base)
    if not base.base.endswith(TEXT):
        return DiT(shape, ScheduleSpec("flow") if is_flow(base.base) else None)
    sizes = (shape.patch_size, shape.hidden_size, shape.depth, shape.num_heads, shape.learned_sigma)
    return PixArt(fresh((shape.channels, shape.input_size, shape.input_size), *sizes, CLIP), text_tokens=CLIP.tokens)


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
