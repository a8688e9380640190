"""One cell of a study, variant x seed x stage: a run directory like any other, its measures in cell.json.

A finished cell is not done again; one that was made in another way is refused; one that another process has is put off.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from dmpctl.backbones.dit_weights import digest_of
from dmpctl.comparing.paired_loss import loss_difference
from dmpctl.data.source import open_source
from dmpctl.errors import InUse, NumericalError, UsageError
from dmpctl.files import make_folder, read_tensors, sha256_of, sha256_of_json, write_json, writing
from dmpctl.metrics.frechet import paired_gains
from dmpctl.models.backbone import load_backbone
from dmpctl.models.patch_files import load_patch
from dmpctl.models.patched import Patched
from dmpctl.processes.accelerator import accelerator_for
from dmpctl.runs import checkpoint
from dmpctl.runs.records import Description, PatchDescription, read_record
from dmpctl.runs.rundir import RunDir
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Base
from dmpctl.studies.results import CellRecord, Gap, LossGap, refuse_other
from dmpctl.studies.stage import SCHEMA_VERSION, Side, Stage
from dmpctl.training import patch, pretrain
from dmpctl.training.session import Session, train_in
from dmpctl.types import Silent, Source

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
    """`choice`: the values taken from the variant's grid. `goes_on` None: a patch. `name` is for people: flat/dmp/seed-1."""

    name: str
    stage: Stage
    path: Path
    settings: Settings
    source: Source
    choice: Mapping[str, object]
    tuning: bool
    goes_on: GoingOn | None

    @property
    def first_step(self) -> int:
        """Optimizer steps of the backbone that it goes on from."""
        return 0 if self.goes_on is None else self.goes_on.step

    @property
    def iterations(self) -> int:
        """Optimizer steps of its own."""
        return self.settings.train.iters - self.first_step

    def shaped_by(self) -> dict[str, object]:
        """Everything that shapes the cell, JSON-able and flat: training, data, backbone, how it is measured."""
        measured = {"measured_" + key: value for key, value in self.stage.protocol().items()}
        found = {**self.settings.science(), "data_fingerprint": self.source.fingerprint, **measured, "tuning": self.tuning}
        if self.goes_on is not None:
            found["goes_on_from"] = sha256_of(self.goes_on.checkpoint / "trainer.json")
        return found

    def record(self) -> CellRecord | None:
        """cell.json, None if the cell is not done. UsageError if it was made in another way."""
        path = self.path / "cell.json"
        if not path.is_file():
            return None
        found = read_record(path, CellRecord)
        refuse_other(self.path, found.shaped_by, self.shaped_by())
        return found


def find_going_on(stage: Stage, variant: str, budget: Settings) -> GoingOn:
    """How this stage's backbone is trained on for `budget.train.iters` more steps, whatever the seed; nothing is written.

    UsageError, one sentence, where it cannot be: no trainer state, a decayed rate, other data.
    """
    name, cannot = stage.settings.base.base, f"{variant} cannot go on from {stage.name}"
    leave_out = f"leave {stage.name} out of the stages of {variant}"
    path = _checkpoint_of(Path(name).expanduser())
    if path is None:
        raise UsageError(f"{cannot}: {name} has no trainer state of dmpctl pretrain", leave_out)
    run = path.parent.parent
    if digest_of(read_tensors(path / "backbone.safetensors")[0]) != stage.loaded.digest:
        raise UsageError(f"{cannot}: {path} is not the backbone that {name} holds", leave_out)
    recorded = RunDir(run).config()
    before = Settings.from_dict(recorded.settings)
    if before.train.lr_schedule != "constant":
        raise UsageError(f"{cannot}: the rate of {run} has decayed (lr_schedule {before.train.lr_schedule})", leave_out)
    if before.train.precision != budget.train.precision:
        raise UsageError(
            f"{variant} goes on from {stage.name} with precision {before.train.precision}, the others have "
            f"{budget.train.precision}",
            "give the same precision in [settings]",
        )
    published = (run / "backbone.safetensors").is_file()
    lasting = load_backbone(Base(base=str(run))).data if published else None  # a name that still means the same elsewhere
    data = before.data.model_copy(update={"data": lasting or before.data.data})
    source = open_source(data, data.size, data.channels)
    if source.fingerprint != recorded.science.get("data_fingerprint"):
        raise UsageError(f"{cannot}: {data.data} is not what it was pretrained on")
    step = checkpoint.step_of(path)
    train = before.train.model_copy(update={"iters": step + budget.train.iters})
    settings = before.model_copy(update={"data": data, "train": train, "save": budget.save, "launch": budget.launch})
    return GoingOn(path, settings, step, source)


def _checkpoint_of(base: Path) -> Path | None:
    """The checkpoint that a --base of `dmpctl pretrain` stands for: the newest of a run, or the one that is named."""
    named = checkpoint.complete(base / "checkpoints") if (base / "config.json").is_file() else []
    if not named and base.is_dir():
        named = [path for path in checkpoint.complete(base.absolute().parent) if path.name == base.absolute().name]
    if not named or not (named[-1] / "backbone.json").is_file():
        return None
    found = named[-1].absolute()
    return found if (found.parent.parent / "config.json").is_file() else None


def do_cell(cell: Cell, side: Side) -> CellRecord | None:
    """Returns the record of a cell: from disk, or after training and measuring it. None while another process has it.

    A training that ends in numbers that are not finite is a result too: `failed` says so. Interrupted after saving.
    """
    done, leftover = cell.record(), cell.path / "checkpoints"
    if done is not None and not leftover.exists():
        return done
    with ExitStack() as held:
        try:
            run = held.enter_context(RunDir(cell.path))
        except InUse:
            return None
        done = cell.record() or _finished(cell, run, side)
        with writing(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
    return done


def _finished(cell: Cell, run: RunDir, side: Side) -> CellRecord:
    failed, loss, distance, added, percent = None, None, None, None, None
    try:
        added, percent = _train(cell, run)
        base = cell.settings.base
        model = load_patch(cell.path, base) if cell.goes_on is None else Patched(load_backbone(Base(base=str(cell.path))))
        loss, distance = measured(cell.stage.fitted(model), cell.stage, side, cell.tuning)
    except NumericalError as error:
        failed = error.message
    shaped_by = cell.shaped_by()
    record = CellRecord(
        schema_version=SCHEMA_VERSION,
        identity=sha256_of_json(shaped_by),
        shaped_by=shaped_by,
        seed=cell.settings.run.seed,
        choice=dict(cell.choice),
        iterations=cell.iterations,
        train_seconds=round(seconds_of(run.metrics.lines(), cell.first_step), 2),
        failed=failed,
        added_parameters=added,
        added_percent=percent,
        paired_loss=loss,
        frechet=distance,
    )
    write_json(run.path / "cell.json", record.to_json())
    return record


def _train(cell: Cell, run: RunDir) -> tuple[int, float]:
    """Train inside the open run, as `dmpctl patch` or `dmpctl pretrain` does; returns the parameters added, and their percent."""
    stage, settings, goes_on = cell.stage, cell.settings, cell.goes_on
    session: Session[Description]
    if goes_on is None:
        session = patch.session_of(settings, stage.loaded, stage.codec, cell.source)
    else:
        config = pretrain.config_for(settings, stage.codec, goes_on.source)
        session = pretrain.session_of(settings, config, stage.loaded.spec.schedule, stage.codec, goes_on.source, stage.text)
        _begin_from(goes_on.checkpoint, run, session.science(settings), settings)
    accelerator = accelerator_for(settings)
    stage.loaded.model.to(accelerator.device)
    train_in(run, session, settings, accelerator, Silent())
    patch.refuse_changed_backbone(stage.loaded)
    described = session.subject.described
    if isinstance(described, PatchDescription):
        return described.added_parameters, described.added_percent
    return stage.loaded.spec.parameters, 100.0


def _begin_from(start: Path, run: RunDir, science: Mapping[str, object], settings: Settings) -> None:
    """Put the backbone's checkpoint into a run that has none yet, by one rename."""
    if not (run.path / "config.json").is_file():
        run.begin("pretrain", science, settings.to_dict(), {"goes_on_from": str(start)})
    if not checkpoint.complete(run.checkpoints):
        target = make_folder(run.checkpoints) / start.name
        half = target.with_name(f"{target.name}.tmp")
        with writing(target):
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(start, half)
            half.rename(target)


def measured(model: Patched, stage: Stage, side: Side, tuning: bool) -> tuple[LossGap, Gap | None]:
    """Returns paired loss and Fréchet distance of a model beside the stage's backbone; of tuning the loss alone.

    The noise of tuning is never reported on. NumericalError where the loss is not finite.
    """
    before = side.tuning_errors if tuning else side.errors
    errors, steps = stage.errors(model, tuning)
    loss = loss_difference(before, errors, steps)
    if not math.isfinite(loss.patched):
        raise NumericalError(f"the trained model gives a loss of {loss.patched}")
    width, bands = stage.loaded.spec.schedule.steps / BANDS, []
    for start, end in pairwise(band * width for band in range(BANDS + 1)):
        rows = [row for row, t in enumerate(steps) if start <= t < end]
        part = loss_difference(before[rows], errors[rows], [steps[row] for row in rows])
        span = {"from": round(start), "to": round(end) - 1}
        bands.append({**span, "difference": part.difference, "standard_error": part.standard_error})
    gap = LossGap(
        backbone=loss.backbone,
        model=loss.patched,
        difference=loss.difference,
        standard_error=loss.standard_error,
        gains=(errors - before).mean(0).tolist(),
        bands=bands,
    )
    if tuning or stage.extractor is None or side.features is None or side.reference is None:
        return gap, None
    found, gains = paired_gains(stage.sampled_features(model, stage.extractor), side.features, side.reference)
    return gap, Gap(
        backbone=found.b.value,
        model=found.a.value,
        difference=found.value,
        standard_error=found.standard_error,
        gains=None if gains is None else gains.tolist(),
    )


def seconds_of(lines: Sequence[Mapping[str, float]], first: int) -> float:
    """Returns the seconds of training behind the lines of metrics.jsonl, whatever interrupted it; it began at step `first`."""
    total, step = 0.0, float(first)
    for line in lines:
        total += (line["step"] - step) / line["steps_per_sec"] if line["steps_per_sec"] else 0.0
        step = line["step"]
    return total
