"""How images are made and results looked at: sampling, the comparison that ends a training, distances, gates."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, cast, get_args

from pydantic import Field, model_validator

from dmpctl.refusals import Among, Clash, Takes
from dmpctl.settings.sections import Flag, Section

Metric = Literal["fid", "sfid", "is", "pr", "dc", "kid", "fid-infinity", "clip-score"]
_METRIC = "|".join(get_args(Metric))
SMALL_SIDE = 32  # pixels: below it, Inception has nothing to say


class Evaluate(Section, panel="Evaluation"):
    free: ClassVar[frozenset[str]] = frozenset({"evaluate", "eval_images"})
    evaluate: bool = Field(default=True, description="End with a comparison of backbone and patch.")
    eval_images: int = Field(default=5_000, ge=2, description="Images sampled for each side of the comparison.")
    held_out: float | None = Field(
        default=None,
        ge=0,
        lt=0.5,
        description="Share of the images that is never trained on, for the paired loss; default: 0.05 from 2000 images on.",
    )


class Fid(Section, panel="Distance", science=False):
    reference: str | None = Field(
        default=None, description="Real images: a source, a folder, an npz, or a file of statistics; default: the run's own data."
    )
    protocol: Literal["adm", "pytorch-fid", "clean", "dinov2", "pixels"] | None = Field(
        default=None,
        description="Published protocol to follow, so that numbers compare; default: adm, or pixels for images under 32 pixels.",
    )
    extractor: Annotated[str | None, Takes("pixels, inception, dinov2 or timm:NAME", "inception")] = Field(
        default=None,
        pattern=r"^(pixels|inception|dinov2|timm:\S+)$",
        description="Features instead of the protocol's: pixels, inception, dinov2 or timm:NAME; default: none.",
    )
    extractor_weights: Path | None = Field(
        default=None, description="Weights of the extractor, a file; default: the cached ones."
    )
    metrics: Annotated[str, Among(get_args(Metric))] = Field(
        default="fid",
        pattern=rf"^({_METRIC})(,({_METRIC}))*$",
        description="Of fid, sfid, is, pr, dc, kid, fid-infinity, clip-score, joined by commas; fid is always there.",
    )
    clip: str = Field(default="clip-l", description="CLIP for clip-score: clip-l, or a folder.")
    max_images: int = Field(
        default=50_000, ge=2, description="Images compared; of a run of dmpctl patch as many as its --eval-images, if not given."
    )
    allow_small: bool = Field(default=False, description="Allow fewer images than features.")
    stream: bool = Field(default=False, description="Sample a run's images in memory, and write none of them.")
    save_stats: Path | None = Field(
        default=None, description="Write the reference's statistics to this .safetensors file; default: none."
    )
    noise_floor: bool = Field(default=False, description="Also measure one half of the real images against the other.")
    versus: str | None = Field(
        default=None,
        description="Also measure the paired difference from this run or folder, sampled from the same seeds; default: none.",
    )
    show: bool = Field(default=False, description="Show earlier measurements of the run, and measure nothing.")
    fail_above: float | None = Field(default=None, ge=0, description="Exit 6 where the distance is larger; default: none.")
    fail_unless_better_than: str | None = Field(
        default=None, description="Exit 6 where the distance is not smaller than that of this run or folder; default: none."
    )
    strict: bool = Field(default=False, description="Also exit 6 where the distance is within 2 standard errors of a threshold.")

    @model_validator(mode="after")
    def _one_comparison(self) -> Self:
        if self.versus is not None and self.fail_unless_better_than not in (None, self.versus):
            raise Clash(
                self,
                "{versus} and {fail_unless_better_than} name two different things to compare with",
                "leave {versus:-} out: {fail_unless_better_than:-} compares, too",
            )
        return self

    @property
    def wanted(self) -> tuple[Metric, ...]:
        """The metrics asked for, each once."""
        return tuple(cast(dict[Metric, None], dict.fromkeys(("fid", *self.metrics.split(",")))))


class Gates(Section, panel="Gates", science=False):
    timesteps: int = Field(default=50, ge=2, le=1000, description="How many timesteps to look at, evenly spaced.")
    plot: bool = Field(default=True, description="Write heat maps (PNG) and a page that stands alone (HTML).")
    csv: bool = Field(default=False, description="Also write every weight as a line of a CSV file.")
    with_backbone: bool = Field(
        default=False,
        description="Also run the backbone on some images, to compare the size of the edit with that of the tokens.",
    )
    compare_with: Annotated[Path | None, Flag("compare")] = Field(
        default=None, description="Another run on the same backbone, to show beside this one; default: none."
    )
    watch: float | None = Field(
        default=None, ge=1, description="Repeat every so many seconds, for a run in progress; default: once."
    )


class Sampling(Section, panel="Sampling", science=False):
    sampler: Literal["ddpm", "ddim", "pndm", "dpm-solver++", "unipc", "euler", "heun", "dopri5", "euler-maruyama"] = Field(
        default="ddpm", description="Sampler; the last four are for a flow (SiT)."
    )
    steps: int = Field(default=250, ge=1, le=1000, description="Denoising steps; of dopri5 the most it may take.")
    eta: float = Field(default=0.0, ge=0, le=1, description="Noise of DDIM, 0 = deterministic.")
    cfg: float = Field(default=1.0, ge=0, description="Guidance scale, 1 = none.")
    cfg_channels: Literal["auto", "3", "all"] = Field(
        default="auto", description="Channels that guidance acts on; auto: 3 with classes (published DiT), all with captions."
    )
    sample_seed: int = Field(default=0, ge=0, description="Seed of images: image k depends on (seed, k) alone.")
    sample_batch: int = Field(default=256, ge=1, description="Images denoised at once.")
    sample_precision: Literal["no", "bf16"] = Field(
        default="no", description="bf16: autocast in the blocks. It changes the images; match the precision of training."
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


class Prompting(Section, panel="Text", science=False):
    prompt: str | None = Field(default=None, description="Caption of all images; default: captions of --prompts.")
    prompts_from: Annotated[str | None, Flag("prompts")] = Field(
        default=None,
        description="Captions: a file, one on each line (blank ones count not), or coco-val; default: the run's own data.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.prompt is not None and self.prompts_from is not None:
            raise Clash(
                self, "{prompt} and {prompts_from} both say what the images show", "leave {prompt:-} or {prompts_from:-} out"
            )
        return self
