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
    json_output: Annotated[bool, Field(description="Results as JSON on stdout."), Flag("json")] = False
    quiet: Annotated[bool, Field(description="No progress and no talk, results only.")] = False
    debug: Annotated[bool, Field(description="Show tracebacks.")] = False
    offline: Annotated[bool, Field(description="Never open a connection.")] = False
    dry_run: Annotated[bool, Field(description="Validate settings, assets and shapes; write nothing.")] = False
    print_config: Annotated[bool, Field(description="Print every value and where it came from, then stop.")] = False


class Run(Section, panel="Run"):
    free: ClassVar[frozenset[str]] = frozenset({"run", "allow_change"})
    run: Annotated[Path | None, Field(description="Run directory; default: runs/<data>.")] = None
    seed: Annotated[int, Field(ge=0, description="Seed of training: order, timesteps, noise.")] = 0
    allow_change: Annotated[
        str | None,
        Field(
            pattern=r"^[a-z0-9_-]+(,[a-z0-9_-]+)*$",
            description="What an unfinished run may go on with otherwise, such as prompt_lr,ema; default: nothing.",
        ),
    ] = None

    @property
    def allowed(self) -> tuple[str, ...]:
        """The names after --allow-change, as fields are called."""
        return tuple(filter(None, (self.allow_change or "").replace("-", "_").split(",")))


class Base(Section, panel="Backbone"):
    # the backbone's sha256 is compared instead
    free: ClassVar[frozenset[str]] = frozenset({"base", "weights", "preset", "backbone_dtype"})
    base: Annotated[str, Field(description="Backbone: digits (bundled), a shape (DiT-L/2), a file or a run.")] = "digits"
    weights: Annotated[Path | None, Field(description="Weights of a shape: a .pt or .safetensors file; default: none.")] = None
    backbone_dtype: Annotated[
        Literal["float32", "bf16"],
        Field(description="Linear layers of frozen blocks; bf16 halves their memory, needs --precision bf16 and changes no bit."),
    ] = "float32"
    preset: Annotated[
        Literal["auto", "dmp", "dmp+", "digits"],
        Field(
            description="Recipe for what is not given: dmp (published), dmp+ (prompts without a gate, the best under 4 %), "
            "digits; auto: digits for the bundled backbone."
        ),
    ] = "auto"


class Shape(Section, panel="Backbone"):
    hidden_size: Annotated[int, Field(ge=8, description="Width of the tokens.")] = 384
    depth: Annotated[int, Field(ge=1, description="Transformer blocks.")] = 12
    num_heads: Annotated[int, Field(ge=1, description="Attention heads.")] = 6
    patch_size: Annotated[int, Field(ge=1, description="Side of the square that becomes one token.")] = 2
    learned_sigma: Annotated[bool, Field(description="Predict the variance too.")] = True
    schedule: Annotated[
        Literal["linear", "cosine", "flow"], Field(description="Noise schedule; flow predicts a velocity (SiT).")
    ] = "linear"
    class_conditional: Annotated[bool, Field(description="Condition on the labels of the data.")] = False
    text_conditional: Annotated[bool, Field(description="Condition on the captions of the data (PixArt's transformer).")] = False

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
    data: Annotated[
        str | None,
        Field(
            description="Images: digits, ffhq, imagenet, coco, laion-art, hf://OWNER/NAME, a folder (images, parquet or tar); "
            "default: what the backbone was trained on."
        ),
    ] = None
    size: Annotated[
        int | None, Field(ge=2, description="Side of the images in pixels; default: the backbone's, or the data's own.")
    ] = None
    channels: Annotated[
        Literal[1, 3] | None, Field(description="1 grey, 3 colour; default: the backbone's, or the data's own.")
    ] = None
    hflip: Annotated[bool | None, Field(description="Mirror half of the images; default: what suits the data.")] = None
    on_bad: Annotated[Literal["fail", "skip"], Field(description="What to do about unreadable images.")] = "fail"
    num_workers: Annotated[int, Field(ge=0, description="Loader processes.")] = 0
    image_column: Annotated[str | None, Field(description="Column of the images; default: the one that holds images.")] = None
    label_column: Annotated[str | None, Field(description="Column of the labels; default: the one of classes, or label.")] = None
    caption_column: Annotated[str | None, Field(description="Column of the captions; default: text or caption.")] = None
    streaming: Annotated[
        bool, Field(description="Fetch parquet as it is used and keep none of it; shuffles within a window.")
    ] = False


class Sampling(Section, panel="Sampling", science=False):
    sampler: Annotated[
        Literal["ddpm", "ddim", "dpm-solver++", "unipc", "euler", "heun", "euler-maruyama"],
        Field(description="Sampler; the last three are for a flow (SiT)."),
    ] = "ddpm"
    steps: Annotated[int, Field(ge=1, le=1000, description="Denoising steps.")] = 250
    eta: Annotated[float, Field(ge=0, le=1, description="Noise of DDIM, 0 = deterministic.")] = 0.0
    cfg: Annotated[float, Field(ge=0, description="Guidance scale, 1 = none.")] = 1.0
    cfg_channels: Annotated[
        Literal["auto", "3", "all"],
        Field(description="Channels that guidance acts on; auto: 3 with classes (published DiT), all with captions."),
    ] = "auto"
    sample_seed: Annotated[int, Field(ge=0, description="Seed of images: image k depends on (seed, k) alone.")] = 0
    sample_batch: Annotated[int, Field(ge=1, description="Images denoised at once.")] = 256
    sample_precision: Annotated[
        Literal["no", "bf16"],
        Field(description="bf16: blocks under autocast, which other images come of; as the patch was trained."),
    ] = "no"


class Result(Section, panel="Run", science=False):
    result_weights: Annotated[
        Literal["ema", "raw"] | None,
        Field(description="Average of the trained weights, or the last ones; default: what the run ended with."),
        Flag("weights"),
    ] = None


class Images(Section, panel="Images", science=False):
    num_images: Annotated[int, Field(ge=1, description="How many images.")] = 64
    image_label: Annotated[int | None, Field(ge=0, description="Class of all images; default: drawn."), Flag("label")] = None
    image_format: Annotated[Literal["png", "npz"], Field(description="PNG folder, or one npz as ADM's."), Flag("format")] = "png"
    unpatched: Annotated[bool, Field(description="Sample the backbone without its patch.")] = False
    out: Annotated[Path | None, Field(description="Where to write; default: inside the run.")] = None


class Text(Section, panel="Text", science=False):  # the encoder's fingerprint is compared instead
    text_encoder: Annotated[
        str | None,
        Field(description="Encoder of captions: clip-l, pixart-t5 or a folder; default: what the backbone was trained with."),
    ] = None
    text_tokens: Annotated[
        int | None,
        Field(ge=2, description="Tokens of a caption; default: as the backbone was trained, else the encoder's."),
    ] = None
    text_batch: Annotated[int, Field(ge=1, description="Captions encoded at once.")] = 32
    captions_per_image: Annotated[
        int | None, Field(ge=1, description="Captions of each image that are encoded and trained on; default: all.")
    ] = None


class Prompting(Section, panel="Text", science=False):
    prompt: Annotated[str | None, Field(description="Caption of all images; default: captions of --prompts.")] = None
    prompts_from: Annotated[
        str | None,
        Field(description="Captions: a file, one on each line, or data such as coco-val; default: the run's own data."),
        Flag("prompts"),
    ] = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.prompt is not None and self.prompts_from is not None:
            raise ValueError("prompt and prompts both say what the images show, give one of the two")
        return self


class CodecSection(Section, panel="Codec", science=False):  # the codec's fingerprint is compared instead
    codec: Annotated[
        str,
        Field(description="Pixels to latents: identity, vae-ema, vae-mse or a folder; auto: what the backbone was trained with."),
    ] = "auto"
    codec_batch: Annotated[int, Field(ge=1, description="Images encoded or decoded at once.")] = 32
    latents: Annotated[bool, Field(description="Encode the images once, and keep their latents in the cache.")] = True
