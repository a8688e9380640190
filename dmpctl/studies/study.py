"""The file of `dmpctl compare`: variants of `dmpctl patch`, at stages of backbones, over seeds.

Reading it checks every name; `settings_of` gives the settings of one variant: preset, then [settings], then the variant.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dmpctl.errors import MissingError, UsageError
from dmpctl.refusals import first_error
from dmpctl.settings.layers import Found, by_public_name, from_preset, named, read_toml, validated
from dmpctl.settings.measuring import Sampling
from dmpctl.settings.model import Settings
from dmpctl.settings.options import options_of
from dmpctl.settings.sections import Console, Launch
from dmpctl.words import nearest_or

Seed = Annotated[int, Field(ge=0)]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")  # of a stage or a variant: they name folders

# Options of `patch` that the file may not set, and why.
OURS = {
    **dict.fromkeys(("run", "seed", "evaluate", "held_out", "keep_last"), "is set by compare itself"),
    **dict.fromkeys(("base", "weights"), "is what [stages] is for"),
    "eval_images": "belongs into [compare]",
    "backbone_dtype": "would change the backbone that all variants share",
    **dict.fromkeys((*Launch.model_fields, *Console.model_fields, "json"), "is given on the command line"),
}
COMMON = ("precision", *Sampling.model_fields)  # the same for all variants, so in [settings] alone
GOING_ON = ("iters",)  # all that a variant with `continue` may set


class Protocol(BaseModel):
    """[compare]: where, with which seeds, and how it is measured.

    `tune_stage` None: rates are tuned at every stage by itself. `eval_data` None: the data that is trained on.
    `eval_images` 0: nothing is sampled. `extractor` None: as `dmpctl fid` chooses. `against`: variants that all others
    are tested against too, beside the backbone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    run: Path
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    tuning_seeds: tuple[Seed, ...] = ()
    tune_stage: str | None = None
    eval_data: str | None = None
    eval_images: int = Field(default=5_000, ge=0)
    extractor: Literal["pixels", "inception"] | None = None
    extractor_weights: Path | None = None
    against: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _seeds_are_apart(self) -> Self:
        for name in ("seeds", "tuning_seeds", "against"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} holds a value twice")
        if both := sorted(set(self.seeds) & set(self.tuning_seeds)):
            raise ValueError(f"seed {both[0]} is in seeds and in tuning_seeds, which have to be apart")
        if self.eval_images == 1:
            raise ValueError("eval_images 1 is no sample: a distance needs 2 at least, 0 leaves it out")
        return self


class Variant(BaseModel):
    """[variants.NAME]: options of `dmpctl patch` (`options`), a grid of them to choose from, and the stages it is run at.

    `goes_on` (`continue` in the file): the backbone itself, trained on. `stages` None: all.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    goes_on: bool = Field(default=False, alias="continue")
    stages: tuple[str, ...] | None = None
    tune: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def choices(self) -> list[dict[str, Any]]:
        """Every point of the grid, by the keys of the file; [{}] without a grid."""
        return [dict(zip(self.tune, point, strict=True)) for point in itertools.product(*self.tune.values())]

    def at(self, stage: str) -> bool:
        """Whether it is run at this stage."""
        return self.stages is None or stage in self.stages


@dataclass(frozen=True)
class Study:
    """The file, checked. `stages`: name -> what --base takes; `settings`: options of every variant."""

    path: Path
    compare: Protocol
    stages: Mapping[str, str]
    settings: Mapping[str, object]
    variants: Mapping[str, Variant]


def read_study(path: Path) -> Study:
    """Read and check the file of a study.

    MissingError if it is not there; UsageError, one sentence with the nearest name, for an unknown key or a wrong value.
    """
    if not path.is_file():
        raise MissingError(f"{path} is not there", "name the TOML file of a study")
    tables = read_toml(path)
    _known(tables, ("compare", "stages", "settings", "variants"), str(path), "table of a study")
    for name in ("compare", "stages", "variants"):
        if not isinstance(tables.get(name), dict) or not tables[name]:
            raise UsageError(f"{path} has no [{name}]", "dmpctl compare --help says what it holds")
    fields = Protocol.model_fields
    protocol = {name if (name := key.replace("-", "_")) in fields else key: value for key, value in tables["compare"].items()}
    _known(protocol, fields, f"{path} [compare]", "setting")
    compare = _model(Protocol, protocol, f"{path} [compare]")
    stages, settings = tables["stages"], tables.get("settings", {})
    variants: dict[str, Variant] = {}
    for name, value in tables["variants"].items():
        if not isinstance(value, dict):
            raise UsageError(f"{path} [variants]: {name} should be a table of options, found {value!r}")
        where = f"{path} [variants.{name}]"
        variant = variants[name] = _model(Variant, value, where)
        _known(variant.stages or (), stages, f"{where} stages", "stage")
        given = _options(variant.options, where, COMMON) | _options(variant.tune, f"{where} tune", COMMON)
        if variant.goes_on and (more := [key for key in given if key not in GOING_ON or key in variant.tune]):
            raise UsageError(f"{given[more[0]].where} cannot be set beside continue: it goes on as the backbone was pretrained")
    for what, names in (("stage", stages), ("variant", variants)):
        for name in names:
            if not NAME.fullmatch(name) or name == "backbone":
                raise UsageError(f"{path}: {name!r} cannot be the name of a {what}", "use letters, digits, _, + and -")
    for name, base in stages.items():
        if not isinstance(base, str):
            raise UsageError(f"{path} [stages]: {name}: found {base!r}, expected what --base takes")
    _options(settings, f"{path} [settings]")
    _known(compare.against, variants, f"{path} [compare] against", "variant")
    _known([compare.tune_stage] if compare.tune_stage else [], stages, f"{path} [compare] tune_stage", "stage")
    for name, variant in variants.items():
        if len(variant.choices()) > 1:
            where, stage = f"{path} [variants.{name}]", compare.tune_stage
            if not compare.tuning_seeds:
                raise UsageError(f"{where}: tune needs tuning_seeds in [compare]", "name seeds that are not in seeds")
            if stage is not None and not variant.at(stage):
                raise UsageError(f"{where}: it is tuned at stage {stage}, which is not among its stages")
    return Study(path, compare, stages, settings, variants)


M = TypeVar("M", bound=BaseModel)


def _model(kind: type[M], values: Mapping[str, object], where: str) -> M:
    """A table as its model. UsageError that names the key."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{where}: {first_error(error, kind).sentence}", "dmpctl compare --help says what it holds") from None


def _known(names: Iterable[str], known: Iterable[str], where: str, what: str) -> None:
    """UsageError, with the nearest name, for a name that is not known."""
    for name in names:
        if name not in known:
            otherwise = f"name one of {', '.join(known)}"
            raise UsageError(f"{where}: {name} is no {what}", nearest_or(name, known, otherwise))


def _options(values: Mapping[str, object], where: str, refused: Sequence[str] = ()) -> dict[str, Found]:
    """Keys as fields of `dmpctl patch`, each with its origin; UsageError for one that is unknown, twice there or not its own."""
    found = named(values, where, by_public_name("patch"), ("continue", "stages", "tune"))
    for key in values:
        public = key.replace("-", "_")
        if public in OURS:
            raise UsageError(f"{where}: {key} {OURS[public]}")
        if public in refused:
            raise UsageError(f"{where}: {key} is the same for all variants", "move it to [settings]")
    return found


def settings_of(
    study: Study, stage: str, variant: str | None = None, choice: Mapping[str, object] | None = None, seed: int | None = None
) -> Settings:
    """Settings of `dmpctl patch` for one variant at one stage, without an environment.

    `variant` None: [settings] alone. `choice`: a point of its grid, None for none. `seed` None: the first of the seeds.
    UsageError that names the file and the key.
    """
    options = options_of("patch")
    where = f"{study.path} [settings]"
    found = _options(study.settings, where)
    if variant is not None:
        where = f"{study.path} [variants.{variant}]"
        found |= _options(study.variants[variant].options, where) | _options(choice or {}, f"{where} tune")
    found["base"] = Found(study.stages[stage], f"{study.path} [stages]: {stage}")
    found["seed"] = Found(study.compare.seeds[0] if seed is None else seed, f"{study.path} [compare]: seeds")
    ours = {"evaluate": False, "held_out": None, "keep_last": 1, "quiet": True}
    found |= {name: Found(value, "compare") for name, value in ours.items()}
    try:
        return validated(from_preset(found, options) | found, options)
    except UsageError as error:
        if str(study.path) in error.message:
            raise
        raise UsageError(f"{where}: {error.message}", error.hint) from None
