"""A backbone with its patch, in memory."""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from dmpctl.codecs.identity import Identity
from dmpctl.codecs.text import TextEncoder
from dmpctl.errors import UsageError
from dmpctl.methods.base import ChangedBackbone
from dmpctl.models.backbone import Loaded
from dmpctl.models.build import PatchModule, build_codec
from dmpctl.models.conditions import Prompts, encoded, open_encoder, prompts_for
from dmpctl.runs.records import PatchRecord, Which
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Data
from dmpctl.types import Backbone, Codec, Progress, Routings, Source


def conditioning_of(backbone: Backbone, time_only: bool, t: Tensor, cond: Tensor | None) -> Tensor:
    """Returns the conditioning vector c [B, D] that a patch plans with; `time_only`: the timestep's share alone."""
    return backbone.embed_time(t) if time_only else backbone.embed(t, cond)


def predict_patched(
    backbone: Backbone,
    time_only: bool,
    plan: nn.Module,
    x_t: Tensor,
    t: Tensor,
    cond: Tensor | None,
    gate_noise: Tensor | None = None,
) -> tuple[Tensor, Routings]:
    """Prediction and routing of a patched backbone; `plan` is the patch, as it is or wrapped for many processes."""
    made = plan(conditioning_of(backbone, time_only, t, cond), gate_noise)
    return (made.backbone or backbone).denoise(x_t, t, cond, made.edit), made.routing


def routing_of(
    backbone: Backbone, time_only: bool, plan: nn.Module, t: Tensor, cond: Tensor | None, gate_noise: Tensor | None = None
) -> Routings:
    """Returns the routing of `predict_patched` without running a block."""
    routing: Routings = plan(conditioning_of(backbone, time_only, t, cond), gate_noise).routing
    return routing


@dataclass(frozen=True)
class Patched:
    """A frozen backbone, and its patch (None: the backbone alone), with the codec of its images.

    `record` is patch.json, None without a patch or before it is trained. `text` reads captions, `prompts` are those of
    generated images: None where the backbone takes none, or until one asks for them. `precision`: bf16 predicts under autocast.
    """

    backbone: Loaded
    patch: PatchModule | None = None
    record: PatchRecord | None = None
    codec: Codec = field(default_factory=Identity)
    text: TextEncoder | None = None
    prompts: Prompts | None = None
    precision: Literal["no", "bf16"] = "no"

    def predict(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """Prediction [B, C or 2C, H, W] in the dtype of x, without gate noise."""
        with torch.autocast(x.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext():
            if self.patch is None:
                found = self.backbone.model.denoise(x, t, cond)
            else:
                found, _ = predict_patched(self.backbone.model, self.patch.time_only, self.patch, x, t, cond)
        return found.to(x.dtype)

    def in_precision(self, precision: Literal["no", "bf16"]) -> "Patched":
        """Returns a copy that predicts in this precision."""
        return replace(self, precision=precision)

    @property
    def network(self) -> nn.Module:
        """The backbone that is run: the frozen one, or a changed one."""
        return self.patch.changed if isinstance(self.patch, ChangedBackbone) else self.backbone.model

    def to(self, device: torch.device) -> "Patched":
        """Both parts on `device`."""
        self.backbone.model.to(device)
        if self.patch is not None:
            self.patch.to(device)
        return self

    @property
    def step(self) -> int:
        """Optimizer steps behind the patch, 0 without one."""
        return 0 if self.record is None else self.record.step

    @property
    def weights(self) -> Which | None:
        """Which of the trained weights the patch has; None without one, or where its record does not say."""
        return None if self.record is None else self.record.weights

    @property
    def patch_sha256(self) -> str | None:
        """sha256 of the patch's file, None without a patch."""
        return None if self.record is None else self.record.sha256

    def unpatched(self) -> "Patched":
        """Returns the backbone without its patch."""
        return replace(self, patch=None, record=None)

    @property
    def trained_on(self) -> str | None:
        """The images it was trained on, by a name that opens them; None if it does not say."""
        return self.backbone.data if self.record is None else self.record.data.name

    @property
    def data(self) -> Data | None:
        """The images it was trained on, with the columns named then, as a section that can be opened; None if unknown."""
        columns = {} if self.record is None else self.record.data.columns
        return None if self.trained_on is None else Data.model_validate({"data": self.trained_on, **columns})

    def with_codec(self, settings: Settings, progress: Progress | None = None) -> "Patched":
        """Returns a copy with the codec and the text encoder that the settings name; a model that was just loaded has none.

        `progress` hears what was assumed of the backbone, where no patch has recorded it; None: nobody does.
        """
        if progress is not None and self.record is None:
            self.backbone.tell(progress)
        return replace(
            self.with_text(settings), codec=build_codec(self.backbone, settings, self.record.codec if self.record else None)
        )

    def with_text(self, settings: Settings) -> "Patched":
        """Returns a copy with the text encoder that the settings name."""
        recorded = (self.record and self.record.text) or self.backbone.text
        return replace(self, text=open_encoder(settings, self.backbone.spec, recorded))

    def with_prompts(self, settings: Settings, count: int, progress: Progress, data: Source | None = None) -> "Patched":
        """Returns a copy with encoded captions for `count` generated images. `data` None: of --prompts, or of its training data.

        UsageError for a prompt that the backbone has no use for.
        """
        if self.text is None:
            if settings.prompting.prompt is not None or settings.prompting.prompts_from is not None:
                raise UsageError("--prompt needs a text-conditional backbone, this one is not", "leave it out")
            return self
        texts, about = prompts_for(settings, data or self.data, count, progress)
        return replace(self, prompts=Prompts(encoded(texts, self.text, settings, progress), tuple(texts), about))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its images."""
        return self.codec.image_shape(self.backbone.spec.latent_shape)
