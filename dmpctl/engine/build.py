"""From settings to things: backbone, patch, codec, source. What can fail fails here, before anything is written."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar, assert_never

import torch
from torch import nn

from dmpctl.backbones.dit import SHAPES, DiT, DiTConfig, shape_config
from dmpctl.backbones.dit_weights import Weights, digest_of, dit_from, read_weights
from dmpctl.data.source import NAMES, open_source
from dmpctl.engine.assets import address_in, require, weights_at_hand
from dmpctl.engine.codec import open_codec
from dmpctl.engine.registry import SHIPPED
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import read_json
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
from dmpctl.types import BackboneSpec, Codec, ScheduleSpec, Source

BUNDLED = {"digits": "digits-dit.safetensors"}
PUBLISHED_SHAPES = {"DiT-XL/2": "dit-xl2-256"}  # shapes with public weights, and the row of the registry that has them
PatchModule = DmpPatch | PromptPatch | LoraPatch | FullPatch


@dataclass(frozen=True)
class Loaded:
    """A frozen backbone and where it came from.

    `data`: what it was trained on, `codec`: the record of the codec it was trained with; None if its file does not say.
    """

    model: DiT
    digest: str
    origin: str
    data: str | None
    codec: Mapping[str, Any] | None = None

    @property
    def spec(self) -> BackboneSpec:
        return self.model.spec


M = TypeVar("M", bound=nn.Module)


def freeze(model: M) -> M:
    """Eval mode, no gradients: a backbone is never anything else."""
    return model.eval().requires_grad_(False)


def load_backbone(base: Base, data: str | None = None) -> Loaded:
    """The backbone that --base (and --weights) name, frozen, on the CPU. `data`: what it is for, for hints; None: not known.

    UsageError for an unknown name, MissingError where weights are needed, IntegrityError where they do not fit.
    """
    path, heads = backbone_file(base, data)
    weights = described_beside(path, read_weights(path))
    model = freeze(dit_from(weights, heads))
    return Loaded(model, digest_of(model.state_dict()), f"{path} ({weights.taken})", weights.data, weights.codec)


def described_beside(path: Path, weights: Weights) -> Weights:
    """`weights`, described by the backbone.json beside them where they do not describe themselves: so in checkpoints."""
    beside = path.parent / "backbone.json"
    if weights.config is not None or path.name != "backbone.safetensors" or not beside.is_file():
        return weights
    about = read_json(beside, 1)
    try:
        config, schedule = DiTConfig(**about["config"]), ScheduleSpec(**about["schedule"])
        return replace(weights, config=config, schedule=schedule, data=about["data"], codec=about.get("codec"))
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{beside} does not describe the backbone beside it ({error})") from None


def backbone_file(base: Base, data: str | None = None) -> tuple[Path, int | None]:
    """Where the weights of --base lie, and the heads that a shape name fixes (None: the file says)."""
    if base.base in BUNDLED:
        return Path(str(resources.files("dmpctl") / "assets" / BUNDLED[base.base])), None
    shape = shape_config(base.base)
    if shape is not None:
        if base.weights is None:
            raise without_weights(base.base, shape, data or "DIR")
        address = address_in(base.weights)
        return base.weights if address is None else weights_at_hand(address), shape.num_heads
    path = Path(base.base).expanduser()
    if base.base in SHIPPED and not path.exists():
        return published_file(SHIPPED[base.base]), None
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
    """The file of a backbone of the registry, checked; MissingError with the command that fetches it.

    UsageError for a row that is no backbone, or one in a layout of others.
    """
    if row.kind != "backbone":
        raise UsageError(f"--base {row.name} is no backbone but {row.what}", f"name one, such as {PUBLISHED_SHAPES['DiT-XL/2']}")
    if row.allow or row.parts:
        hint = f"take the original layout, such as --base {PUBLISHED_SHAPES['DiT-XL/2']}"
        raise UsageError(f"--base {row.name} ({row.what}) is in a layout of its own, which cannot be patched yet", hint)
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
    pretrain = f"dmpctl pretrain --data {quote(data)} --codec vae-ema --size 256 {sizes}"
    hint = f"with a checkpoint of your own: {command}; or train one first: {pretrain}"
    return MissingError(f"no weights for {name}: no public checkpoint of this shape exists", hint)


def unknown_base(name: str) -> UsageError:
    """The failure for a --base that is nothing we know, with the nearest name."""
    from difflib import get_close_matches

    shapes = [f"{shape}/{patch}" for shape in SHAPES for patch in (2, 4, 8)]
    near = get_close_matches(name, [*BUNDLED, *shapes, *PUBLISHED_SHAPES.values(), *SHIPPED], 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else f"name one of {', '.join(BUNDLED)}, a shape such as DiT-L/2, a file or a run"
    return UsageError(f"--base {name} is no known backbone, no file and no run", hint)


def planned_config(base: Base) -> DiTConfig | None:
    """Config of a shape named without weights, for a report that needs none; None where weights are at hand."""
    return shape_config(base.base) if base.weights is None else None


def build_patch(model: DiT, method: Method, seed: int = 0) -> PatchModule:
    """A fresh patch for this backbone, which is not changed; `seed`: of a start that is random.

    UsageError where the settings do not fit the backbone.
    """
    match method:
        case Dmp():
            return DmpPatch(dmp_shape(model.spec, method), method, seed)
        case PromptTuning():
            return PromptPatch(prompt_shape(model.spec, method), method, seed)
        case Lora():
            return LoraPatch(model, method, seed)
        case Full():
            return FullPatch(model, method)
        case _:
            assert_never(method)


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
    return open_images(data.model_copy(update={"data": name}), height, channels, settings)


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
