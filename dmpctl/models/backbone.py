"""From the word after --base to a frozen backbone: bundled, a shape and its weights, a file, a run, a folder of diffusers."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

from torch import nn

from dmpctl.backbones.diffusers_folder import Foreign, holds_diffusers, made, open_folder
from dmpctl.backbones.dit import DiT, DiTConfig, shape_config
from dmpctl.backbones.dit_weights import (
    Weights,
    described,
    digest_of,
    dit_from,
    dit_metadata,
    fill,
    known,
    model_metadata,
    read_weights,
)
from dmpctl.backbones.pixart import PixArt, fresh, plain_config
from dmpctl.backbones.told import Given
from dmpctl.codecs.vae import Vae
from dmpctl.errors import Damaged, MissingError, UsageError
from dmpctl.files import read_json, sha256_of
from dmpctl.runs.records import CodecRecord, EncoderRecord
from dmpctl.settings.sections import Base
from dmpctl.store.locate import PUBLISHED_SHAPES, locate
from dmpctl.store.registry import shipped
from dmpctl.store.shapes import TEXT, is_flow
from dmpctl.types import BackboneSpec, Progress, ScheduleSpec, TextSpec

BackboneModule = DiT | Foreign


@dataclass(frozen=True)
class Loaded:
    """A frozen backbone and where it came from.

    `data`: what it was trained on, `codec` and `text`: the records of the codec and of the encoder of captions it was trained
    with; None if its file does not say. `assumed`: what neither the file nor an option says, in sentences.
    """

    model: BackboneModule
    digest: str
    origin: str
    data: str | None
    codec: CodecRecord | None = None
    text: EncoderRecord | None = None
    assumed: tuple[str, ...] = ()

    def tell(self, progress: Progress) -> None:
        """Say what was assumed, a line each."""
        for line in self.assumed:
            progress.say(f"{self.origin}: {line}")

    @property
    def spec(self) -> BackboneSpec:
        return self.model.spec


def facts_of(model: BackboneModule) -> dict[str, Any]:
    """Config and schedule of a network, JSON-able: with its weights all that makes it again."""
    schedule = {"schedule": asdict(model.schedule)}
    return ({"config": asdict(model.config)} if isinstance(model, DiT) else {"model": plain_config(model.model)}) | schedule


def metadata_of(loaded: Loaded, codec: CodecRecord | None = None, text: EncoderRecord | None = None) -> dict[str, str]:
    """safetensors metadata of a backbone; `codec` and `text`: the records of what it is used with, None: its own."""
    codec, text, model = codec or loaded.codec, text or loaded.text, loaded.model
    if isinstance(model, DiT):
        return dit_metadata(model.config, model.schedule, loaded.data, codec)
    return model_metadata(plain_config(model.model), model.schedule, loaded.data, codec, text, model.inference)


M = TypeVar("M", bound=nn.Module)


def freeze(model: M) -> M:
    """Eval mode, no gradients: a backbone is never anything else."""
    return model.eval().requires_grad_(False)


def load_backbone(base: Base, data: str | None = None) -> Loaded:
    """The backbone that --base (and --weights) name, frozen, on the CPU. `data`: what it is for, for hints; None: not known.

    UsageError for an unknown name, MissingError where weights are needed, IntegrityError where they do not fit.
    """
    path, shape = backbone_file(base, data)
    if path.is_dir():
        loaded = pipeline_backbone(path)
        return loaded if loaded.text is not None else replace(loaded, text=needed_encoder(base.base))
    return loaded_from(path, known(path, described_beside(path, read_weights(path)), Given(shape)))


def loaded_from(path: Path, weights: Weights) -> Loaded:
    """The frozen backbone of a file that was read; IntegrityError where a key does not fit."""
    model = freeze(model_from(weights))
    where, own = f"{path} ({weights.taken})", (weights.data, weights.codec, weights.text)
    return Loaded(model, digest_of(model.state_dict()), where, *own, weights.assumed)


def model_from(weights: Weights) -> BackboneModule:
    """The network those weights are of; IntegrityError on a missing or unexpected key or shape."""
    if weights.model is None:
        return dit_from(weights)
    model = made(weights.model, weights.schedule, weights.text.tokens if weights.text else None)
    model.inference = weights.inference
    fill(model, weights.tensors, f"the {weights.model.get('_class_name')}")
    return model


def pipeline_backbone(folder: Path) -> Loaded:
    """The backbone in a folder of diffusers, with the codec and the encoder of captions that lie beside it."""
    model, pipeline = open_folder(folder)
    freeze(model)
    codec = text = None
    if pipeline is not None and (pipeline / "vae" / "config.json").is_file():
        vae = Vae(pipeline, str(pipeline.absolute()))
        codec = CodecRecord(name=vae.name, fingerprint=vae.fingerprint, scale=vae.scale)
    if pipeline is not None and (pipeline / "text_encoder" / "config.json").is_file():
        text = EncoderRecord(name=str(pipeline.absolute()))
    return Loaded(model, digest_of(model.state_dict()), str(folder), None, codec, text)


def needed_encoder(name: str) -> EncoderRecord | None:
    """The encoder of captions that a backbone of the registry needs, by its row; None where it needs none."""
    rows = shipped()
    needs = rows[name].needs if name in rows else ()
    return next((EncoderRecord(name=need) for need in needs if rows[need].kind == "text"), None)


def described_beside(path: Path, weights: Weights) -> Weights:
    """`weights`, described by the backbone.json beside them where they do not describe themselves: so in checkpoints.

    Damaged where it knows them with another hash.
    """
    beside = path.parent / "backbone.json"
    if path.name != "backbone.safetensors" or not beside.is_file():
        return weights
    about = read_json(beside, 1)
    if about.get("sha256") not in (None, found := sha256_of(path)):
        raise Damaged(f"{path} is damaged: sha256 {found}, expected {about['sha256']}", "copy the backbone again")
    return weights if weights.config else described(weights, about, f"{beside} does not describe the backbone beside it")


def backbone_file(base: Base, data: str | None = None) -> tuple[Path, str | None]:
    """Where the weights of --base lie (a folder: of diffusers), and the shape that it names (None: the file says)."""
    shape = shape_named(base.base)
    if shape is not None:
        if base.weights is None:
            raise without_weights(base.base, shape, data or "DIR")
        return locate(base.weights, "weights"), base.base.removesuffix(TEXT)
    path = locate(base.base, "backbone")
    fetched = path != Path(base.base).expanduser()  # and so whatever its row or address says
    if fetched or path.is_file() or holds_diffusers(path):
        return path, None
    if not (path / "backbone.safetensors").is_file():
        raise MissingError(
            f"{path} holds no finished backbone (backbone.safetensors)", "name a run of dmpctl pretrain that has ended"
        )
    return path / "backbone.safetensors", None


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
    why = "none were named" if is_flow(name) else "no public checkpoint of this shape exists"
    return MissingError(f"no weights for {name}: {why}", hint)


CLIP = TextSpec(77, 768)  # CLIP ViT-L/14's


def shape_named(name: str) -> DiTConfig | None:
    """Sizes of a published shape, with captions or without; None if `name` is none."""
    return shape_config(name.removesuffix(TEXT))


def is_planned(base: Base) -> bool:
    """Whether a shape is named without weights, for a report that needs none."""
    return base.weights is None and shape_named(base.base) is not None


def planned_model(base: Base) -> BackboneModule:
    """The network of a shape, whatever its weights: `DiT-B/2-text` is PixArt's of that size, with captions of CLIP ViT-L/14."""
    shape = shape_named(base.base)
    if shape is None:
        raise UsageError(f"--base {base.base} is no shape", "name one such as DiT-L/2")
    if not base.base.endswith(TEXT):
        return DiT(shape, ScheduleSpec("flow") if is_flow(base.base) else None)
    return PixArt(fresh(shape, CLIP), text_tokens=CLIP.tokens)
