"""Every option of every command, declared once: name, type, bounds, help. Flags, DMPCTL_* and TOML keys follow.

A field named `batch_size` is the flag `--batch-size`, the variable `DMPCTL_BATCH_SIZE` and the TOML key
`batch_size` (or `batch-size`). Names are unique across sections, so no prefix is ever needed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, Unpack, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator


@dataclass(frozen=True)
class Flag:
    """The option's public name where the field cannot carry it (`json` would hide a method of BaseModel)."""

    name: str


def choices_of(annotation: object) -> tuple[Any, ...]:
    """The values of a Literal (or of a Literal | None); empty for any other type."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for part in get_args(annotation) for choice in choices_of(part))


class Section(BaseModel):
    """A panel of `--help` and a table of config.json; both are arguments of the class, `class Run(Section, panel="Run")`.

    `science`: a change of its fields makes it another experiment, but for those named in `free`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    panel: ClassVar[str]
    science: ClassVar[bool] = True
    free: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, panel: str | None = None, science: bool = True, **config: Unpack[ConfigDict]) -> None:
        super().__init_subclass__(**config)
        cls.science = science
        if panel is not None:  # methods that share a section inherit its panel
            cls.panel = panel


class Console(Section, panel="Console", science=False):
    json_output: Annotated[bool, Flag("json")] = Field(default=False, description="Results as JSON on stdout.")
    quiet: bool = Field(default=False, description="No progress and no talk, results only.")
    debug: bool = Field(default=False, description="Show tracebacks.")
    offline: bool = Field(default=False, description="Never open a connection.")
    dry_run: bool = Field(default=False, description="Validate settings, assets and shapes; write nothing.")
    print_config: bool = Field(default=False, description="Print every value and where it came from, then stop.")


class Run(Section, panel="Run"):
    free: ClassVar[frozenset[str]] = frozenset({"run", "allow_change"})
    run: Path | None = Field(default=None, description="Run directory; default: runs/<data>.")
    seed: int = Field(default=0, ge=0, description="Seed of training: order, timesteps, noise.")
    allow_change: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9_-]+(,[a-z0-9_-]+)*$",
        description="What an unfinished run may go on with otherwise, such as prompt_lr,ema; default: nothing.",
    )

    @property
    def allowed(self) -> tuple[str, ...]:
        """The names after --allow-change, as fields are called."""
        return tuple(filter(None, (self.allow_change or "").replace("-", "_").split(",")))


class Base(Section, panel="Backbone"):
    # the backbone's sha256 is compared instead
    free: ClassVar[frozenset[str]] = frozenset({"base", "weights", "preset", "backbone_dtype"})
    base: str = Field(default="digits", description="Backbone: digits (bundled), a shape (DiT-L/2), a file or a run.")
    weights: Path | None = Field(default=None, description="Weights of a shape: a .pt or .safetensors file; default: none.")
    backbone_dtype: Literal["float32", "bf16"] = Field(
        default="float32",
        description="Linear layers of frozen blocks; bf16 halves their memory, needs --precision bf16 and changes no bit.",
    )
    preset: Literal["auto", "dmp", "dmp+", "digits"] = Field(
        default="auto",
        description=(
            "Recipe for what is not given: dmp (published), dmp+ (prompts without a gate, the best under 4 %), "
            "digits; auto: digits for the bundled backbone."
        ),
    )


class Shape(Section, panel="Backbone"):
    hidden_size: int = Field(default=384, ge=8, description="Width of the tokens.")
    depth: int = Field(default=12, ge=1, description="Transformer blocks.")
    num_heads: int = Field(default=6, ge=1, description="Attention heads.")
    patch_size: int = Field(default=2, ge=1, description="Side of the square that becomes one token.")
    learned_sigma: bool = Field(default=True, description="Predict the variance too.")
    schedule: Literal["linear", "cosine", "flow"] = Field(
        default="linear", description="Noise schedule; flow predicts a velocity (SiT)."
    )
    class_conditional: bool = Field(default=False, description="Condition on the labels of the data.")
    text_conditional: bool = Field(default=False, description="Condition on the captions of the data (PixArt's transformer).")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        return self

    @model_validator(mode="after")
    def _one_condition(self) -> Self:
        if self.class_conditional and self.text_conditional:
            raise ValueError("class_conditional and text_conditional are two kinds of condition, give one of the two")
        if self.text_conditional and self.schedule == "flow":
            raise ValueError("text_conditional needs schedule linear or cosine, found flow")
        return self


class Data(Section, panel="Data"):
    free: ClassVar[frozenset[str]] = frozenset(  # the data's fingerprint is compared instead
        {"data", "num_workers", "image_column", "label_column", "caption_column"}
    )
    data: str | None = Field(
        default=None,
        description=(
            "Images: digits, ffhq, imagenet, coco, laion-art, hf://OWNER/NAME, a folder (images, parquet or tar); "
            "default: what the backbone was trained on."
        ),
    )
    size: int | None = Field(
        default=None, ge=2, description="Side of the images in pixels; default: the backbone's, or the data's own."
    )
    channels: Literal[1, 3] | None = Field(
        default=None, description="1 grey, 3 colour; default: the backbone's, or the data's own."
    )
    hflip: bool | None = Field(default=None, description="Mirror half of the images; default: what suits the data.")
    on_bad: Literal["fail", "skip"] = Field(default="fail", description="What to do about unreadable images.")
    num_workers: int = Field(default=0, ge=0, description="Loader processes.")
    image_column: str | None = Field(default=None, description="Column of the images; default: the one that holds images.")
    label_column: str | None = Field(default=None, description="Column of the labels; default: the one of classes, or label.")
    caption_column: str | None = Field(default=None, description="Column of the captions; default: text or caption.")
    streaming: bool = Field(
        default=False, description="Fetch parquet as it is used and keep none of it; shuffles within a window."
    )


class Sampling(Section, panel="Sampling", science=False):
    sampler: Literal["ddpm", "ddim", "dpm-solver++", "unipc", "euler", "heun", "euler-maruyama"] = Field(
        default="ddpm", description="Sampler; the last three are for a flow (SiT)."
    )
    steps: int = Field(default=250, ge=1, le=1000, description="Denoising steps.")
    eta: float = Field(default=0.0, ge=0, le=1, description="Noise of DDIM, 0 = deterministic.")
    cfg: float = Field(default=1.0, ge=0, description="Guidance scale, 1 = none.")
    cfg_channels: Literal["auto", "3", "all"] = Field(
        default="auto", description="Channels that guidance acts on; auto: 3 with classes (published DiT), all with captions."
    )
    sample_seed: int = Field(default=0, ge=0, description="Seed of images: image k depends on (seed, k) alone.")
    sample_batch: int = Field(default=256, ge=1, description="Images denoised at once.")
    sample_precision: Literal["no", "bf16"] = Field(
        default="no", description="bf16: blocks under autocast, which other images come of; as the patch was trained."
    )


class Result(Section, panel="Run", science=False):
    result_weights: Annotated[Literal["ema", "raw"] | None, Flag("weights")] = Field(
        default=None, description="Average of the trained weights, or the last ones; default: what the run ended with."
    )


class Images(Section, panel="Images", science=False):
    num_images: int = Field(default=64, ge=1, description="How many images.")
    image_label: Annotated[int | None, Flag("label")] = Field(
        default=None, ge=0, description="Class of all images; default: drawn."
    )
    image_format: Annotated[Literal["png", "npz"], Flag("format")] = Field(
        default="png", description="PNG folder, or one npz as ADM's."
    )
    unpatched: bool = Field(default=False, description="Sample the backbone without its patch.")
    out: Path | None = Field(default=None, description="Where to write; default: inside the run.")


class Text(Section, panel="Text", science=False):  # the encoder's fingerprint is compared instead
    text_encoder: str | None = Field(
        default=None,
        description="Encoder of captions: clip-l, pixart-t5 or a folder; default: what the backbone was trained with.",
    )
    text_tokens: int | None = Field(
        default=None, ge=2, description="Tokens of a caption; default: as the backbone was trained, else the encoder's."
    )
    text_batch: int = Field(default=32, ge=1, description="Captions encoded at once.")
    captions_per_image: int | None = Field(
        default=None, ge=1, description="Captions of each image that are encoded and trained on; default: all."
    )


class Prompting(Section, panel="Text", science=False):
    prompt: str | None = Field(default=None, description="Caption of all images; default: captions of --prompts.")
    prompts_from: Annotated[str | None, Flag("prompts")] = Field(
        default=None, description="Captions: a file, one on each line, or data such as coco-val; default: the run's own data."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.prompt is not None and self.prompts_from is not None:
            raise ValueError("prompt and prompts both say what the images show, give one of the two")
        return self


class CodecSection(Section, panel="Codec", science=False):  # the codec's fingerprint is compared instead
    codec: str = Field(
        default="auto",
        description="Pixels to latents: identity, vae-ema, vae-mse or a folder; auto: what the backbone was trained with.",
    )
    codec_batch: int = Field(default=32, ge=1, description="Images encoded or decoded at once.")
    latents: bool = Field(default=True, description="Encode the images once, and keep their latents in the cache.")
