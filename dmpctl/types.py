"""The protocols that the rooms meet through, and the small frozen records that pass between them.

Shapes: B batch, T tokens, D width, L patched sites, N prompts, C/H/W channels, height, width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, runtime_checkable

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

Prediction = Literal["epsilon", "velocity"]
ScheduleKind = Literal["linear", "cosine", "scaled-linear", "flow"]
Cleaning = Literal["none", "lower", "pixart"]  # of captions: as they are; in lower case; PixArt's whole cleaning
Unit = Literal["it", "B"]


@dataclass(frozen=True)
class Site:
    """A place where tokens can be edited: the input of one transformer block."""

    tokens: int
    width: int


@dataclass(frozen=True)
class ScheduleSpec:
    """The noise schedule a backbone was trained with; a patch refuses any other.

    `flow` is no Gaussian diffusion: x_t = (1 - t / steps) x_0 + (t / steps) noise (SiT, rectified flow).
    """

    kind: ScheduleKind = "linear"
    steps: int = 1000


@dataclass(frozen=True)
class Inference:
    """How a scheduler file of diffusers picks timesteps and steps along them: its keys, which mean what they mean there.

    None: the file does not say, and each sampler does what diffusers' own does.
    """

    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    skip_prk_steps: bool = True
    variance_type: str | None = None


@dataclass(frozen=True)
class TextSpec:
    """Sizes of the text states that a backbone attends to: `tokens` of them, each of `width` numbers."""

    tokens: int
    width: int


@dataclass(frozen=True)
class BackboneSpec:
    """Facts of a backbone, which everything outside its room is built from.

    `latent_shape` is (C, H, W) of the noised latents. `num_classes` 0 means no labels; `text` None means no captions.
    `null_class` is the label that means "no class", for guidance; None where there is none. `cond_width` is the width D of
    the vectors that `embed` returns; None: the width of the sites. `inference`: of its scheduler file, None: as ADM and DiT.
    """

    latent_shape: tuple[int, int, int]
    sites: tuple[Site, ...]
    prediction: Prediction
    learned_sigma: bool
    schedule: ScheduleSpec
    num_classes: int
    parameters: int
    null_class: int | None = None
    text: TextSpec | None = None
    cond_width: int | None = None
    inference: Inference | None = None


def text_parts(cond: Tensor) -> tuple[Tensor, Tensor]:
    """Returns states [B, T, D] and mask bool [B, T] of conditions [B, T, D + 1], whose last column is 1 where a token counts."""
    return cond[..., :-1].contiguous(), cond[..., -1] > 0.5


class Edit(Protocol):
    """A function that a method applies to the tokens [B, T, D] that enter block `site`; it returns tokens of that shape."""

    def __call__(self, site: int, tokens: Tensor) -> Tensor: ...


class Backbone(Protocol):
    """A frozen denoiser: eval mode, no gradient for its weights, always."""

    @property
    def spec(self) -> BackboneSpec: ...

    @property
    def linears(self) -> Mapping[str, tuple[str, ...]]:
        """Linear layers by purpose (`qkv`, `proj`, `mlp`): the ends of the names of their modules."""
        ...

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the modules whose inputs are the sites, in order."""
        ...

    def embed(self, t: Tensor, cond: Tensor | None) -> Tensor:
        """Returns the conditioning vector c [B, D] of timesteps t [B] and `cond`.

        `cond`: labels int64 [B], or text [B, T, D + 1] (`text_parts`); None for an unconditional backbone.
        """
        ...

    def embed_time(self, t: Tensor) -> Tensor:
        """Returns the timestep's share of `embed`, [B, D]."""
        ...

    def denoise(self, x: Tensor, t: Tensor, cond: Tensor | None, edit: Edit | None = None) -> Tensor:
        """Returns the prediction [B, C or 2C, H, W] for noised x [B, C, H, W]; `edit` None leaves the tokens alone."""
        ...


@dataclass(frozen=True)
class Routing:
    """How prompts were mixed. `gates` [L, B, N] sum to 1 over N.

    `load` [L, N] is the expected number of samples that keep each prompt under fresh gate noise
    (Shazeer et al. 2017, appendix A); None where it is undefined (k = N, or no gate noise).
    """

    gates: Tensor
    load: Tensor | None = None


# One for a patch with one gate; several where sites differ in size; None without gates.
Routings = Routing | tuple[Routing, ...] | None


@dataclass(frozen=True)
class Plan:
    """How a patch changes the backbone for one batch of conditioning vectors.

    `edit` None leaves the tokens alone; `routing` is None for a method without gates; `backbone` has changed weights and is
    run instead of the frozen one, None: the frozen one runs.
    """

    edit: Edit | None = None
    routing: Routings = None
    backbone: Backbone | None = None


class ParamGroup(TypedDict):
    """Parameters that are trained at one learning rate, as torch's optimizers take them."""

    name: str
    params: list[nn.Parameter]
    lr: float


class Patch(Protocol):
    """The trainable part: a module whose forward is `plan`, so that it can be wrapped for many processes."""

    def plan(self, c: Tensor, noise: Tensor | None = None) -> Plan:
        """Returns the plan for conditioning c [B, D]; `noise` [B, L, N] standard normal, None: no gate noise."""
        ...

    @property
    def time_only(self) -> bool:
        """Whether `plan` wants the timestep's share of the conditioning alone (`Backbone.embed_time`)."""
        ...

    @property
    def added(self) -> int:
        """Count of the numbers that the patch adds and that are needed after training, as the paper counts them."""
        ...

    def merged(self) -> dict[str, Tensor] | None:
        """Returns the backbone's state dict with this patch folded in; None where the patch is no change of weights."""
        ...

    def noise_shape(self) -> tuple[int, ...] | None:
        """Returns the shape of one sample's gate noise, None if the method draws none."""
        ...

    def param_groups(self) -> list[ParamGroup]:
        """Returns AdamW parameter groups with their learning rates; together exactly the patch's parameters."""
        ...

    def penalty(self, routing: Routings) -> dict[str, Tensor]:
        """Returns weighted balance losses by name, each a scalar; empty where there is nothing to balance."""
        ...


@dataclass(frozen=True)
class Moments:
    """Posterior of a codec over latents [B, C, H, W]; `logvar` None means exactly `mean`."""

    mean: Tensor
    logvar: Tensor | None = None


class Codec(Protocol):
    """Pixels (uint8 [B, C, H, W]) to latents (float32) and back."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """sha256 over the weights and settings that make latents and pixels."""
        ...

    @property
    def scale(self) -> float:
        """Factor on raw latents; `encode` returns and `decode` takes scaled ones."""
        ...

    def latent_shape(self, channels: int, size: int) -> tuple[int, int, int]:
        """Returns (C, H, W) of the latents of images with this many channels and this side in pixels."""
        ...

    def image_shape(self, latents: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns (C, H, W) of the images behind latents (C, H, W)."""
        ...

    def encode(self, images: Tensor) -> Moments: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class Source(Protocol):
    """A finite list of images. Item i never changes: uint8 [C, S, S] and a label (0 without classes).

    Where images are encoded already (`batches.latents`) an item is their moments instead, floating [2C, h, w].
    """

    @property
    def name(self) -> str: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def mirror(self) -> bool:
        """Whether a mirrored image is still one of these images (digits: no)."""
        ...

    @property
    def fingerprint(self) -> str:
        """sha256 over the files or arrays that the items come from."""
        ...

    def __len__(self) -> int: ...

    def item(self, index: int) -> tuple[Tensor, int]: ...


@runtime_checkable
class Ordered(Protocol):
    """A source that is read best in an order of its own, such as one that is fetched part by part."""

    def order(self, generator: Generator) -> Tensor:
        """Returns the order of one epoch, int64 [n]: each index once."""
        ...


@dataclass(frozen=True)
class Outputs:
    """An extractor's outputs for a batch of B images: `features` float32 [B, width], the space that distances are taken in.

    `logits` [B, K] of a network with classes (Inception Score), `spatial` [B, W] of its feature maps (sFID); else None.
    """

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class Extractor(Protocol):
    """Images to features: uint8 [B, C, H, W] -> float32 [B, width]."""

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Identity of weights and preprocessing, recorded with every number."""
        ...

    def __call__(self, images: Tensor) -> Tensor: ...

    def outputs(self, images: Tensor) -> Outputs:
        """Returns all outputs of one pass over the images; the features equal those of a plain call."""
        ...


class Denoiser(Protocol):
    """The model that a sampler calls: x [B, C, H, W], t [B] in the original 0..steps-1 -> prediction [B, C or 2C, H, W].

    For a flow, t is floating, in 0..steps.
    """

    def __call__(self, x: Tensor, t: Tensor) -> Tensor: ...


class Draw(Protocol):
    """Fresh standard normal noise [B, C, H, W], each image from its own generator."""

    def __call__(self) -> Tensor: ...


@dataclass(frozen=True)
class Report:
    """The result of a command: `data` is JSON (all that --json prints); people see `table` (rows), then `lines` (sentences).

    `exit_code` is not 0 where the command did its work and the answer is no: a threshold that was not met.
    """

    data: dict[str, Any]
    table: tuple[dict[str, str], ...] = ()
    lines: tuple[str, ...] = ()
    exit_code: int = 0


class Progress(Protocol):
    """Carries events from a command at work up to whatever shows them."""

    def track(self, what: str, total: int, start: int = 0, unit: Unit = "it") -> ProgressTask:
        """A piece of work of `total` steps (0: not known), or bytes with the unit B."""
        ...

    def say(self, message: str) -> None:
        """One line of talk (stderr)."""
        ...


class ProgressTask(Protocol):
    """One running piece of work."""

    def advance(self, by: int = 1, **figures: float) -> None:
        """`figures` are shown beside the bar: loss, images/s."""
        ...

    def __enter__(self) -> ProgressTask: ...

    def __exit__(self, *exc: object) -> None: ...


class Silent:
    """No progress, no talk; also the task that shows nothing."""

    def track(self, what: str, total: int, start: int = 0, unit: Unit = "it") -> ProgressTask:
        return self

    def say(self, message: str) -> None:
        return None

    def advance(self, by: int = 1, **figures: float) -> None:
        return None

    def __enter__(self) -> ProgressTask:
        return self

    def __exit__(self, *exc: object) -> None:
        return None
