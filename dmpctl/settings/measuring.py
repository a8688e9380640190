"""How results are looked at: the comparison that ends a training, distances, gates."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dmpctl.settings.sections import Flag, Section

_METRIC = "fid|sfid|is|pr|dc|kid|fid-infinity|clip-score"
SMALL_SIDE = 32  # pixels: below it, Inception has nothing to say


class Evaluate(Section, panel="Evaluation", science=False):
    evaluate: Annotated[bool, Field(description="End with a comparison of backbone and patch.")] = True
    eval_images: Annotated[int, Field(ge=2, description="Images sampled for each side of the comparison.")] = 5_000


class Fid(Section, panel="Distance", science=False):
    reference: Annotated[
        str | None,
        Field(description="Real images: a source, a folder, an npz, or a file of statistics; default: the run's own data."),
    ] = None
    protocol: Annotated[
        Literal["adm", "pytorch-fid", "clean", "dinov2", "pixels"] | None,
        Field(description="Whose numbers these shall be comparable with; default: adm, pixels for images under 32 pixels."),
    ] = None
    extractor: Annotated[
        str | None,
        Field(
            pattern=r"^(pixels|inception|dinov2|timm:\S+)$",
            description="Features instead of the protocol's: pixels, inception, dinov2 or timm:NAME; default: none.",
        ),
    ] = None
    extractor_weights: Annotated[
        Path | None, Field(description="Weights of the extractor, a file; default: the cached ones.")
    ] = None
    metrics: Annotated[
        str,
        Field(
            pattern=rf"^({_METRIC})(,({_METRIC}))*$",
            description="Of fid, sfid, is, pr, dc, kid, fid-infinity, clip-score, joined by commas; fid is always there.",
        ),
    ] = "fid"
    clip: Annotated[str, Field(description="CLIP for clip-score: clip-l, or a folder.")] = "clip-l"
    max_images: Annotated[int, Field(ge=2, description="Images compared.")] = 50_000
    allow_small: Annotated[bool, Field(description="Allow fewer images than features.")] = False
    stream: Annotated[bool, Field(description="Make a run's images for this alone, and write none.")] = False
    save_stats: Annotated[
        Path | None, Field(description="Write the reference's statistics to this .safetensors file; default: none.")
    ] = None
    noise_floor: Annotated[bool, Field(description="Measure one half of the real images against the other, too.")] = False
    versus: Annotated[
        str | None, Field(description="A run or folder on the same seeds: the paired difference from it; default: none.")
    ] = None
    show: Annotated[bool, Field(description="Show what was measured of the run before, and measure nothing.")] = False
    fail_above: Annotated[float | None, Field(ge=0, description="Exit 6 where the distance is larger; default: none.")] = None
    fail_unless_better_than: Annotated[
        str | None, Field(description="Exit 6 where the distance is not smaller than that of this run or folder; default: none.")
    ] = None
    strict: Annotated[bool, Field(description="Exit 6 also where a threshold lies within 2 standard errors.")] = False

    @model_validator(mode="after")
    def _one_comparison(self) -> Self:
        if self.versus is not None and self.fail_unless_better_than not in (None, self.versus):
            raise ValueError("versus and fail_unless_better_than name two different things to compare with, give one of the two")
        return self

    @property
    def wanted(self) -> tuple[str, ...]:
        """The metrics asked for, each once."""
        return tuple(dict.fromkeys(("fid", *self.metrics.split(","))))


class Gates(Section, panel="Gates", science=False):
    timesteps: Annotated[int, Field(ge=2, le=1000, description="Timesteps looked at, evenly spaced.")] = 50
    plot: Annotated[bool, Field(description="Write heat maps (PNG) and a page that stands alone (HTML).")] = True
    csv: Annotated[bool, Field(description="Write every weight as a line of a CSV file, too.")] = False
    with_backbone: Annotated[
        bool, Field(description="Run the backbone on some images: the size of the edit beside the tokens.")
    ] = False
    compare_with: Annotated[
        Path | None, Field(description="Another run on the same backbone, beside this one; default: none."), Flag("compare")
    ] = None
    watch: Annotated[
        float | None, Field(ge=1, description="Look again every so many seconds at a run in progress; default: once.")
    ] = None
