"""Every option of every command, declared once: name, type, bounds, help. Flags, DMPCTL_* and TOML keys follow.

A field named `batch_size` is the flag `--batch-size`, the variable `DMPCTL_BATCH_SIZE` and the TOML key
`batch_size` (or `batch-size`). Names are unique across sections, so no prefix is ever needed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, Unpack, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dmpctl.refusals import Clash, Takes


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
    allow_change: Annotated[str | None, Takes("names of settings, joined by commas", "ema")] = Field(
        default=None,
        pattern=r"^[a-z0-9_-]+(,[a-z0-9_-]+)*$",
        description="Settings you may change when resuming, such as prompt_lr,ema; default: none.",
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
        description="Frozen linear layers. bf16 halves their memory and changes no bit; it needs --precision bf16.",
    )
    preset: Literal["auto", "dmp", "dmp-code", "dmp+", "digits"] = Field(
        default="auto",
        description=(
            "Defaults for options you do not set: dmp (the paper's text), dmp-code (its published code), "
            "dmp+ (prompts without a gate, the best under 4 %), digits; auto: digits for the bundled backbone."
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
    def _one_transformer(self) -> Self:
        if self.hidden_size % self.num_heads:
            fits = max(heads for heads in range(1, self.num_heads) if self.hidden_size % heads == 0)
            raise Clash(self, "{hidden_size} is not a multiple of {num_heads}", f"say {{num_heads:{fits}}}, or another width")
        if self.class_conditional and self.text_conditional:
            raise Clash(
                self,
                "{class_conditional} and {text_conditional} are two kinds of condition",
                "leave {class_conditional:-} or {text_conditional:-} out",
            )
        if self.text_conditional and self.schedule == "flow":
            raise Clash(
                self,
                "{text_conditional} needs {schedule:linear} or {schedule:cosine}, found {schedule}",
                "say {schedule:linear}, or leave {text_conditional:-} out",
            )
        return self


class Data(Section, panel="Data"):
    free: ClassVar[frozenset[str]] = frozenset(  # the data's fingerprint is compared instead
        {"data", "num_workers", "image_column", "label_column", "caption_column", "follow_links"}
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
    on_bad: Literal["fail", "skip"] = Field(default="fail", description="What to do about images that cannot be read.")
    num_workers: int = Field(default=0, ge=0, description="Loader processes.")
    image_column: str | None = Field(default=None, description="Column of the images; default: the one that holds images.")
    label_column: str | None = Field(
        default=None, description="Column of the labels, or none; default: the one of classes, or label."
    )
    caption_column: str | None = Field(default=None, description="Column of the captions; default: text or caption.")
    follow_links: bool = Field(default=False, description="Use links in the data that lead out of its folder.")
    streaming: bool = Field(
        default=False, description="Fetch parquet while training and keep none of it. Images are shuffled within a window."
    )


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


class CodecSection(Section, panel="Codec", science=False):  # the codec's fingerprint is compared instead
    codec: str = Field(
        default="auto",
        description="Pixels to latents: identity, vae-ema, vae-mse or a folder; auto: what the backbone was trained with.",
    )
    codec_batch: int = Field(default=32, ge=1, description="Images encoded or decoded at once.")
    latents: bool = Field(default=True, description="Encode each image once, and keep its latents in the cache.")


class Launch(Section, panel="Launch", science=False):
    device: Annotated[str, Takes("auto, cpu, cuda, cuda:N or mps", "cpu")] = Field(
        default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N or mps."
    )
    cpu: bool = Field(default=False, description="Same as --device cpu.")
    deterministic: bool = Field(default=False, description="Deterministic kernels (slower on a GPU).")
    threads: int | None = Field(
        default=None, ge=1, description="Threads of a process on a CPU; default: OMP_NUM_THREADS, or what suits the model."
    )
    compile: bool = Field(default=False, description="Compile the blocks with torch.compile; faster on a GPU.")
    tf32: bool = Field(default=True, description="TF32 for float32 matrix products on a GPU, as published.")
    num_processes: int | None = Field(default=None, ge=1, description="Processes on this machine; default: one per GPU.")
    nnodes: Annotated[str, Takes("a number of machines, or at least:at most such as 2:4", "1")] = Field(
        default="1",
        pattern=r"^[1-9]\d*(:[1-9]\d*)?$",
        description="Number of machines, or at least:at most. Start the same command on each.",
    )
    node_rank: int | None = Field(default=None, ge=0, description="This machine's number; default: detected.")
    rdzv_endpoint: str | None = Field(default=None, description="HOST:PORT where several machines meet; default: none.")
    max_restarts: int = Field(default=0, ge=0, description="How many times to restart processes that failed.")
    rank_timeout: int = Field(default=1800, ge=1, description="Seconds to wait for a process that does not answer.")
    requeue: bool = Field(
        default=False, description="Exit 75 after SIGTERM or SIGUSR1, which asks a scheduler to queue the job again."
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.cpu and self.device not in ("auto", "cpu"):
            raise Clash(self, "{cpu} and {device} contradict each other", "leave {cpu:-} or {device:-} out")
        low, high = self.nodes
        if high < low:
            swapped = f"say {{nnodes:{high}:{low}}}"
            raise Clash(self, f"{{nnodes}} asks for at most {high} machines and for at least {low}", swapped)
        if high > 1 and self.rdzv_endpoint is None:
            raise Clash(
                self,
                "{nnodes} needs {rdzv_endpoint:-}, the HOST:PORT where the machines meet",
                "add {rdzv_endpoint:HOST:29500} with the name of the first machine",
            )
        return self

    @property
    def nodes(self) -> tuple[int, int]:
        """Machines: at least, at most."""
        low, _, high = self.nnodes.partition(":")
        return int(low), int(high or low)
