"""Typed records of a study: stage.json of a backbone, cell.json of a training, and all of them together."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dmpctl.errors import UsageError
from dmpctl.files import plain_json
from dmpctl.metrics.frechet import FidEstimate
from dmpctl.runs.records import Record
from dmpctl.settings.options import defaults_of
from dmpctl.words import differences

TRAINING = ("patch", "pretrain")  # commands whose settings shape a cell


class Gap(Record):
    """A model beside the backbone. `difference` is model minus backbone, negative is better; its error is over images.

    A Fréchet distance's is of the debiased ones. `gains`: what each image adds to it, with that mean; None in older records,
    and where there are too few images.
    """

    backbone: float
    model: float
    difference: float
    standard_error: float | None
    gains: list[float] | None = None


class LossGap(Gap):
    """The paired loss, and its difference per band of timesteps, each with from, to, difference and standard_error."""

    bands: list[dict[str, int | float]]


class Shaped(Record):
    """A file that is not made again while everything that shapes it stays: `identity` is the sha256 of `shaped_by`."""

    schema_version: int
    identity: str
    shaped_by: dict[str, object]


class CellRecord(Shaped):
    """cell.json. `failed`: why the training has no measures; the parameters added are then None if it had not begun."""

    left_out = ("paired_loss", "frechet")
    seed: int
    choice: dict[str, object]
    iterations: int
    train_seconds: float
    failed: str | None
    added_parameters: int | None
    added_percent: float | None
    paired_loss: LossGap | None = None
    frechet: Gap | None = None

    def gap(self, measure: str) -> Gap | None:
        """The difference in a measure, None where there is no such number."""
        return self.frechet if measure == "frechet" else self.paired_loss

    def figures(self) -> dict[str, object]:
        """Returns the record without the gains of single images, JSON-able."""
        gains = {"gains"}
        written = self.model_dump(mode="json", exclude_unset=True, exclude={"paired_loss": gains, "frechet": gains})
        return {key: value for key, value in written.items() if value is not None or key not in self.left_out}


@dataclass(frozen=True, kw_only=True)
class SampledDistance(FidEstimate):
    """The Fréchet distance of the backbone's own samples; how it moves with the sampling seed, and that of real images."""

    other_seeds: list[float]
    seed_sd: float
    noise_floor: float


class StageRecord(Shaped):
    """stage.json: the backbone itself. `backbone`: where it came from; `frechet` None: nothing is sampled."""

    backbone: str
    sha256: str
    paired_loss: float
    parameters: int
    frechet: SampledDistance | None

    def figures(self) -> dict[str, object]:
        """Returns all that was measured, JSON-able."""
        return self.model_dump(include={"paired_loss", "parameters", "frechet"})


@dataclass(frozen=True)
class Results:
    """Everything measured: the backbone of each stage, and (stage, variant, seed) -> its cell."""

    stages: Mapping[str, StageRecord]
    records: Mapping[tuple[str, str, int], CellRecord]
    against: tuple[str, ...] = ()

    def variants_at(self, stage: str) -> list[str]:
        """Variants that were run at a stage, in the order of the file."""
        return list(dict.fromkeys(variant for at, variant, _ in self.records if at == stage))

    def cells(self, stage: str, variant: str) -> dict[int, CellRecord]:
        """Seed -> cell."""
        return {seed: record for (s, v, seed), record in self.records.items() if (s, v) == (stage, variant)}

    def gaps(self, stage: str, variant: str, measure: str) -> dict[int, Gap]:
        """Seed -> difference from the backbone, of the cells that have one."""
        found = {seed: cell.gap(measure) for seed, cell in self.cells(stage, variant).items()}
        return {seed: gap for seed, gap in found.items() if gap is not None}

    def measures(self, stage: str) -> list[str]:
        """Names of what was measured at a stage."""
        return ["paired_loss"] if self.stages[stage].frechet is None else ["paired_loss", "frechet"]


def refuse_other(path: Path, before: Mapping[str, object], now: Mapping[str, object]) -> None:
    """UsageError if what `path` recorded was shaped by other values.

    A setting that the record does not know is newer than it: it stands at its default there.
    """
    defaults = {name: value for command in TRAINING for name, value in defaults_of(command).items()}
    before = {key: defaults[key] for key in now if key in defaults} | dict(before)
    changed = [f"{key}: {old} there, {new} now" for key, old, new in differences(before, plain_json(now))]
    if changed:
        raise UsageError(
            f"{path} was made in another way ({'; '.join(changed[:4])})", "name another run in [compare], or restore the file"
        )
