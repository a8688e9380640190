"""From settings to things: backbone, patch, codec, source. What can fail fails here, before anything is written."""

from typing import TypeVar, assert_never

from dmpctl.backbones.sd_unet import SdUnet, sites_in
from dmpctl.errors import UsageError
from dmpctl.methods.by_size import PatchBySize, by_size
from dmpctl.methods.dmp import DmpPatch, dmp_shape
from dmpctl.methods.full import FullPatch
from dmpctl.methods.lora import LoraPatch
from dmpctl.methods.prompt_tuning import PromptPatch
from dmpctl.methods.prompts import prompt_shape
from dmpctl.models.backbone import BackboneModule, Loaded
from dmpctl.models.codec import open_codec
from dmpctl.runs.records import CodecRecord
from dmpctl.settings.methods import Dmp, Full, Lora, Method, PromptTuning
from dmpctl.settings.model import Settings
from dmpctl.types import Codec

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


def build_codec(loaded: Loaded, settings: Settings, recorded: CodecRecord | None = None) -> Codec:
    """The codec of a backbone: the one it was trained with unless --codec says otherwise. Raises as `open_codec` does.

    `recorded`: the codec its patch was trained with, None: the backbone's own record.
    """
    channels = loaded.spec.latent_shape[0]
    return open_codec(settings, channels, recorded or loaded.codec)
