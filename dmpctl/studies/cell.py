"""One cell of a study, variant x seed x stage: a run directory like any other, its measures in cell.json.

A finished cell is not done again; one that was made in another way is refused; one that another process has is put off.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmpctl.backbones.dit_weights import digest_of
from dmpctl.data.source import open_source
from dmpctl.errors import InUse, NumericalError, UsageError
from dmpctl.files import make_folder, read_json, read_tensors, sha256_of, sha256_of_json, write_json, writing
from dmpctl.measuring.paired_loss import epsilon_errors, loss_difference
from dmpctl.metrics.frechet import paired_difference
from dmpctl.models.backbone import load_backbone
from dmpctl.models.patch_files import load_patch
from dmpctl.models.patched import Patched
from dmpctl.processes.accelerator import accelerator_for
from dmpctl.runs import checkpoint
from dmpctl.runs.records import Description, PatchDescription
from dmpctl.runs.rundir import RunDir
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Base
from dmpctl.studies.stage import Side, Stage, refuse_other, sampled_features
from dmpctl.training import patch, pretrain
from dmpctl.training.session import Session, train_in
from dmpctl.types import Silent, Source

SCHEMA_VERSION = 1
BANDS = 5  # of timesteps


@dataclass(frozen=True)
class GoingOn:
    """A checkpoint that a backbone's pretraining goes on from, the settings to go on with, its step, and its data."""

    checkpoint: Path
    settings: Settings
    step: int
    source: Source


@dataclass(frozen=True)
class Cell:
    """`choice`: what was taken from the variant's grid. `goes_on` None: a patch. `name` is for people: flat/dmp/seed-1."""

    name: str
    stage: Stage
    path: Path
    settings: Settings
    source: Source
    seed: int
    choice: Mapping[str, Any]
    tuning: bool
    goes_on: GoingOn | None

    def shaped_by(self) -> dict[str, Any]:
        """Everything that shapes the cell, JSON-able and flat: training, data, backbone, how it is measured."""
        measured = {"measured_" + key: value for key, value in self.stage.protocol().items()}
        found = {**self.settings.science(), "data_fingerprint": self.source.fingerprint, **measured, "tuning": self.tuning}
        if self.goes_on is not None:
            found["goes_on_from"] = sha256_of(self.goes_on.checkpoint / "trainer.json")
        return found

    @property
    def iterations(self) -> int:
        """Optimizer steps of its own, without those of the backbone."""
        return self.settings.train.iters - (0 if self.goes_on is None else self.goes_on.step)

    def record(self) -> dict[str, Any] | None:
        """cell.json, None if the cell is not done. UsageError if it was made in another way."""
        path = self.path / "cell.json"
        if not path.is_file():
            return None
        found = read_json(path, SCHEMA_VERSION)
        shaped_by = self.shaped_by()
        if found.get("identity") != sha256_of_json(shaped_by):
            refuse_other(self.path, found.get("shaped_by", {}), shaped_by)
        return found


def find_going_on(stage: Stage, variant: str, budget: Settings) -> GoingOn:
    """How this stage's backbone is trained on for `budget.train.iters` more steps, whatever the seed; nothing is written.

    UsageError, one sentence, where it cannot be: no trainer state, a decayed rate, other data.
    """
    name = stage.settings.base.base
    leave_out = f"leave {stage.name} out of the stages of {variant}"
    found = _checkpoint_of(Path(name).expanduser())
    if found is None:
        reason = f"{name} has no trainer state of dmpctl pretrain"
        raise UsageError(f"{variant} cannot go on from {stage.name}: {reason}", leave_out)
    path, run = found
    if digest_of(read_tensors(path / "backbone.safetensors")[0]) != stage.loaded.digest:
        raise UsageError(f"{variant} cannot go on from {stage.name}: {path} is not the backbone that {name} holds", leave_out)
    recorded = RunDir(run).config()
    before = Settings.from_dict(recorded["settings"])
    if before.train.lr_schedule != "constant":
        raise UsageError(
            f"{variant} cannot go on from {stage.name}: the rate of {run} has decayed (lr_schedule {before.train.lr_schedule})",
            leave_out,
        )
    if before.train.precision != budget.train.precision:
        raise UsageError(
            f"{variant} goes on from {stage.name} with precision {before.train.precision}, the others have "
            f"{budget.train.precision}",
            "give the same precision in [settings]",
        )
    published = (run / "backbone.safetensors").is_file()
    data = load_backbone(Base(base=str(run))).data if published else None  # by a name that lasts
    before = before.model_copy(update={"data": before.data.model_copy(update={"data": data or before.data.data})})
    source = open_source(before.data, before.data.size, before.data.channels)
    if source.fingerprint != recorded["science"].get("data_fingerprint"):
        raise UsageError(f"{variant} cannot go on from {stage.name}: {before.data.data} is not what it was pretrained on")
    step = checkpoint.step_of(path)
    settings = before.model_copy(
        update={
            "train": before.train.model_copy(update={"iters": step + budget.train.iters}),
            "save": budget.save,
            "launch": budget.launch,
        }
    )
    return GoingOn(path, settings, step, source)


def _checkpoint_of(base: Path) -> tuple[Path, Path] | None:
    """(checkpoint, its run) that a --base of `dmpctl pretrain` stands for: the newest of a run, or the one that is named."""
    named = checkpoint.complete(base / "checkpoints") if (base / "config.json").is_file() else []
    if not named and base.is_dir():
        named = [path for path in checkpoint.complete(base.absolute().parent) if path.name == base.absolute().name]
    if not named or not (named[-1] / "backbone.json").is_file():
        return None
    run = named[-1].absolute().parent.parent
    return (named[-1].absolute(), run) if (run / "config.json").is_file() else None


def cell_of(
    stage: Stage,
    variant: str,
    settings: Settings,
    source: Source,
    choice: Mapping[str, Any],
    tuning: bool,
    goes_on: GoingOn | None,
) -> Cell:
    """The cell of one variant; `settings` are those it is trained with, on `source`."""
    seed = settings.run.seed
    folder = f"tune-{sha256_of_json(choice)[:8]}-seed-{seed}" if tuning else f"seed-{seed}"
    path = stage.folder / variant / folder
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"run": path})})
    return Cell(f"{stage.name}/{variant}/{folder}", stage, path, settings, source, seed, choice, tuning, goes_on)


def do_cell(cell: Cell, side: Side, device: torch.device) -> dict[str, Any] | None:
    """The record of a cell: as it is on disk, or after training and measuring it. None while another process has it.

    A training that ends in numbers that are not finite is a result too: `failed` says so. Interrupted after saving.
    """
    done, leftover = cell.record(), cell.path / "checkpoints"
    if done is not None and not leftover.exists():
        return done
    try:
        run = RunDir(cell.path).__enter__()
    except InUse:
        return None
    try:
        done = cell.record() or _finished(cell, run, side, device)
        with writing(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
    finally:
        run.__exit__(None, None, None)
    return done


def _finished(cell: Cell, run: RunDir, side: Side, device: torch.device) -> dict[str, Any]:
    failed, measures, described = None, {}, {"added_parameters": None, "added_percent": None}
    first = 0 if cell.goes_on is None else cell.goes_on.step
    try:
        described = _train(cell, run)
        measures = measured(_model(cell), cell.stage, side, cell.tuning, device)
    except NumericalError as error:
        failed = error.message
    shaped_by = cell.shaped_by()
    record = {
        "schema_version": SCHEMA_VERSION,
        "identity": sha256_of_json(shaped_by),
        "shaped_by": shaped_by,
        "seed": cell.seed,
        "choice": dict(cell.choice),
        "iterations": cell.iterations,
        "train_seconds": round(seconds_of(run.metrics(), first), 2),
        "failed": failed,
        **described,
        **measures,
    }
    write_json(run.path / "cell.json", record)
    return record


def _train(cell: Cell, run: RunDir) -> dict[str, Any]:
    """Train inside the open run, as `dmpctl patch` or `dmpctl pretrain` does; returns what the model adds."""
    session = _session(cell)
    accelerator = accelerator_for(cell.settings)
    if cell.goes_on is not None:
        _begin_from(cell.goes_on, cell, run, session)
    cell.stage.loaded.model.to(accelerator.device)
    train_in(run, session, cell.settings, accelerator, Silent())
    patch.refuse_changed_backbone(cell.stage.loaded)
    described = session.subject.described
    if isinstance(described, PatchDescription):
        return {"added_parameters": described.added_parameters, "added_percent": described.added_percent}
    return {"added_parameters": cell.stage.loaded.spec.parameters, "added_percent": 100.0}


def _session(cell: Cell) -> Session[Description]:
    stage, settings = cell.stage, cell.settings
    if cell.goes_on is None:
        return patch.session_of(settings, stage.loaded, stage.codec, cell.source)
    config = pretrain.config_for(settings, stage.codec, cell.goes_on.source)
    return pretrain.session_of(settings, config, stage.loaded.spec.schedule, stage.codec, cell.goes_on.source, stage.text)


def _begin_from(goes_on: GoingOn, cell: Cell, run: RunDir, session: Session[Description]) -> None:
    """Put the backbone's checkpoint into a run that has none yet, by one rename."""
    if not (run.path / "config.json").is_file():
        run.begin("pretrain", session.science(cell.settings), cell.settings.to_dict(), {"goes_on_from": str(goes_on.checkpoint)})
    if not checkpoint.complete(run.checkpoints):
        target = make_folder(run.checkpoints) / goes_on.checkpoint.name
        half = target.with_name(f"{target.name}.tmp")
        with writing(target):
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(goes_on.checkpoint, half)
            half.rename(target)


def _model(cell: Cell) -> Patched:
    """What the cell's training has made, as it is on disk."""
    if cell.goes_on is None:
        return cell.stage.fitted(load_patch(cell.path, cell.settings.base))
    return cell.stage.fitted(Patched(load_backbone(Base(base=str(cell.path)))))


def measured(model: Patched, stage: Stage, side: Side, tuning: bool, device: torch.device) -> dict[str, Any]:
    """A model beside the stage's backbone; when tuning, the paired loss alone, under a noise that is never reported on.

    Differences are model minus backbone, negative is better. NumericalError where they are not finite.
    """
    before = side.tuning_errors if tuning else side.errors
    errors, steps = epsilon_errors(model, stage.source, device, stage.noise_seed(tuning), Silent())
    loss = loss_difference(before, errors, steps)
    if not math.isfinite(loss.patched):
        raise NumericalError(f"the trained model gives a loss of {loss.patched}")
    width = stage.loaded.spec.schedule.steps / BANDS
    bands = []
    for band in range(BANDS):
        rows = [row for row, t in enumerate(steps) if band * width <= t < (band + 1) * width]
        part = loss_difference(before[rows], errors[rows], [steps[row] for row in rows])
        span = {"from": round(band * width), "to": round((band + 1) * width) - 1}
        bands.append({**span, "difference": part.difference, "standard_error": part.standard_error})
    found: dict[str, Any] = {
        "paired_loss": {
            "backbone": loss.backbone,
            "model": loss.patched,
            "difference": loss.difference,
            "standard_error": loss.standard_error,
            "bands": bands,
        }
    }
    if not tuning and stage.extractor is not None and side.features is not None and side.reference is not None:
        seed = stage.sampling.sample_seed
        features = sampled_features(model, stage, seed, device, Silent(), stage.extractor)
        gap = paired_difference(features, side.features, side.reference)
        found["frechet"] = {
            "backbone": gap.b.value,
            "model": gap.a.value,
            "difference": gap.value,
            "standard_error": gap.standard_error,
        }
    return found


def seconds_of(lines: list[dict[str, Any]], first: int) -> float:
    """Seconds of training behind the lines of metrics.jsonl, whatever interrupted it; `first`: the step it began at."""
    total, step = 0.0, first
    for line in lines:
        total += (line["step"] - step) / line["steps_per_sec"] if line["steps_per_sec"] else 0.0
        step = line["step"]
    return total
