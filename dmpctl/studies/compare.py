"""`dmpctl compare`: variants x seeds x stages. Each cell is trained and measured once, by all processes that share the study."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmpctl.errors import NumericalError
from dmpctl.files import json_to_bytes, make_folder, write_atomic, write_json
from dmpctl.models.build import build_patch
from dmpctl.models.sources import open_data
from dmpctl.processes.command import again_command
from dmpctl.processes.device import resolve_device
from dmpctl.processes.stop import Stop, interrupted
from dmpctl.runs.rundir import version_of
from dmpctl.settings.model import Settings
from dmpctl.settings.study import Study, Variant, read_study, settings_of
from dmpctl.studies.cell import Cell, GoingOn, cell_of, do_cell, find_going_on
from dmpctl.studies.plot import plot
from dmpctl.studies.stage import Stage, open_stage, side_of
from dmpctl.studies.table import ALPHA, Results, bands_of, console_rows, doubts, markdown, rows_of, sentences, tidy
from dmpctl.types import Progress, Report, Source

SCHEMA_VERSION = 1
POLL = 1.0  # sec between two looks at cells that another process has


@dataclass(frozen=True)
class Job:
    """A cell to be. `choice`: which point of the variant's grid a tuning cell tries, None: reported, with what was chosen."""

    stage: str
    variant: str
    seed: int
    choice: int | None = None

    @property
    def tuning(self) -> bool:
        return self.choice is not None


class Plan:
    """The study with everything it needs opened: what can fail fails here, before anything is written."""

    def __init__(self, study: Study, settings: Settings) -> None:
        self.study, self.settings = study, settings
        self.device = resolve_device(settings.launch)
        self.stages = {name: open_stage(study, name, settings, self.device) for name in study.stages}
        self.going_on: dict[tuple[str, str], GoingOn] = {}
        self._sources: dict[tuple[str, str], Source] = {}
        self._candidates: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for stage, variant, choice in self._trained():
            self._check(stage, variant, choice)

    def _trained(self) -> Iterator[tuple[Stage, str, dict[str, Any]]]:
        """Every kind of training: stage, variant and choice."""
        for stage in self.stages.values():
            for name, variant in self.study.variants.items():
                if variant.at(stage.name):
                    yield from ((stage, name, choice) for choice in variant.choices())

    def _check(self, stage: Stage, name: str, choice: Mapping[str, Any]) -> None:
        settings = self._settings(stage, name, choice, self.study.compare.seeds[0])
        if self.study.variants[name].goes_on:
            self.going_on[stage.name, name] = find_going_on(stage, name, settings)
            return
        self._source(stage, settings)
        build_patch(stage.loaded.model, settings.method)

    def _settings(self, stage: Stage, name: str, choice: Mapping[str, Any], seed: int) -> Settings:
        found = settings_of(self.study, stage.name, name, choice, seed)
        return found.model_copy(update={"launch": self.settings.launch, "sampling": stage.sampling})

    def _source(self, stage: Stage, settings: Settings) -> Source:
        """Images to train on, opened once."""
        key = (stage.name, settings.data.model_dump_json())
        if key not in self._sources:
            self._sources[key] = open_data(settings.data, stage.loaded.spec, stage.codec, stage.loaded.data)
        return self._sources[key]

    def cell(self, job: Job) -> Cell | None:
        """The cell of a job; None while its variant is not tuned."""
        variant = self.study.variants[job.variant]
        choice = self.chosen(job.stage, job.variant) if job.choice is None else variant.choices()[job.choice]
        return None if choice is None else self.cell_with(job, choice)

    def cell_with(self, job: Job, choice: Mapping[str, Any]) -> Cell:
        """The cell of a job with this choice."""
        stage, variant = self.stages[job.stage], self.study.variants[job.variant]
        settings, goes_on = self._settings(stage, job.variant, choice, job.seed), None
        if variant.goes_on:
            goes_on = self.going_on[stage.name, job.variant]
            settings = goes_on.settings.model_copy(update={"run": goes_on.settings.run.model_copy(update={"seed": job.seed})})
            return cell_of(stage, job.variant, settings, goes_on.source, choice, job.tuning, goes_on)
        return cell_of(stage, job.variant, settings, self._source(stage, settings), choice, job.tuning, None)

    def jobs(self) -> list[Job]:
        """Tuning first, then what is reported."""
        study, tuning, reporting = self.study, [], []
        for stage in study.stages:
            for name, variant in study.variants.items():
                if not variant.at(stage):
                    continue
                if self.tunes_here(stage, variant):
                    grid = range(len(variant.choices()))
                    tuning += [Job(stage, name, seed, choice) for choice in grid for seed in study.compare.tuning_seeds]
                reporting += [Job(stage, name, seed) for seed in study.compare.seeds]
        return tuning + reporting

    def tunes_here(self, stage: str, variant: Variant) -> bool:
        return len(variant.choices()) > 1 and self.study.tunes_at(stage) == stage

    def candidates(self, stage: str, name: str) -> list[dict[str, Any]] | None:
        """Every choice of a variant's grid with its tuning figures; None while some are not there. Read until all are."""
        if (stage, name) in self._candidates:
            return self._candidates[stage, name]
        found = []
        for index, choice in enumerate(self.study.variants[name].choices()):
            cells = [self.cell(Job(stage, name, seed, index)) for seed in self.study.compare.tuning_seeds]
            records = [None if cell is None else cell.record() for cell in cells]
            if any(record is None for record in records):
                return None
            gains = [record.get("paired_loss", {}).get("difference") for record in records if record is not None]
            found.append({"choice": choice, "differences": gains, "mean": mean_or_none(gains)})
        self._candidates[stage, name] = found
        return found

    def chosen(self, stage: str, name: str) -> dict[str, Any] | None:
        """The choice in force for a variant at a stage, {} where there is nothing to choose; None while tuning is not done."""
        choices = self.study.variants[name].choices()
        if len(choices) == 1:
            return choices[0]
        candidates = self.candidates(self.study.tunes_at(stage), name)
        return None if candidates is None else best(candidates, f"{stage}/{name}")


def mean_or_none(values: list[float | None]) -> float | None:
    """None if a training failed."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if len(there) == len(values) else None


def best(candidates: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """The choice of the smallest mean paired loss; NumericalError if every training failed."""
    there = [candidate for candidate in candidates if candidate["mean"] is not None]
    if not there:
        raise NumericalError(f"no rate that {what} was tuned with gives finite numbers", "add lower ones to its grid")
    found: dict[str, Any] = min(there, key=lambda candidate: float(candidate["mean"]))["choice"]
    return found


def compare(settings: Settings, file: Path, progress: Progress) -> Report:
    """Train and measure every cell of the study in `file` that is not done yet; then table, plot and verdicts."""
    study = read_study(file)
    plan = Plan(study, settings)
    if settings.console.dry_run:
        return _planned(plan)
    for cell in filter(None, map(plan.cell, plan.jobs())):
        cell.record()  # refuses now what was made in another way
    root = make_folder(study.compare.run.expanduser().absolute())
    with Stop() as stop:
        records = _run(plan, stop, progress)
    return _report(plan, root, records)


def _run(plan: Plan, stop: Stop, progress: Progress) -> dict[Job, dict[str, Any]]:
    """Do the jobs in order; those that wait for another process or for a tuning are looked at again at the end.

    The records come in the order of the jobs, whoever did them when.
    """
    waiting, done = plan.jobs(), dict[Job, dict[str, Any]]()
    with progress.track("cells", len(waiting)) as task:
        while waiting:
            before, waiting = waiting, []
            for job in before:
                if stop.got:
                    raise interrupted(stop.got, f"{len(done)} cells are done", f"go on with: {again_command()}")
                record = _one(plan, job, progress)
                if record is None:
                    waiting.append(job)
                    continue
                done[job] = record
                task.advance()
            if len(waiting) == len(before):
                time.sleep(POLL)
    return {job: done[job] for job in plan.jobs()}


def _one(plan: Plan, job: Job, progress: Progress) -> dict[str, Any] | None:
    """One job; None if it has to wait."""
    cell = plan.cell(job)
    if cell is None:
        return None
    if not job.tuning:
        _write_choice(plan, job)
    was_there = (cell.path / "cell.json").is_file()
    side = side_of(plan.stages[job.stage], plan.device, progress)
    record = None if side is None else do_cell(cell, side, plan.device)
    if record is not None and not was_there:
        progress.say(f"{cell.name}: {_in_words(record)}")
    return record


def _in_words(record: Mapping[str, Any]) -> str:
    if record["failed"]:
        return f"failed: {record['failed']}"
    loss, gap = record["paired_loss"], record.get("frechet")
    words = f"paired loss {loss['difference']:+.3g} ± {loss['standard_error']:.2g}"
    words += f", Fréchet distance {gap['difference']:+.4g}" if gap else ""
    return f"{words} ({record['train_seconds']:.0f} s of training)"


def _write_choice(plan: Plan, job: Job) -> None:
    """tuned.json of a variant that is tuned at this stage: what was chosen, and from which figures."""
    variant, path = plan.study.variants[job.variant], plan.stages[job.stage].folder / job.variant / "tuned.json"
    candidates = plan.candidates(job.stage, job.variant) if plan.tunes_here(job.stage, variant) else None
    if candidates is not None:
        found = {"chosen": best(candidates, f"{job.stage}/{job.variant}"), "candidates": candidates}
        data = json_to_bytes({"schema_version": SCHEMA_VERSION, "seeds": list(plan.study.compare.tuning_seeds), **found})
        if not path.is_file() or path.read_bytes() != data:
            write_atomic(make_folder(path.parent) / path.name, data)


def _report(plan: Plan, root: Path, records: Mapping[Job, dict[str, Any]]) -> Report:
    """Write table.md, table.json, table.csv and plot.png; they are the same whichever process writes them."""
    study = plan.study
    sides = {name: stage.sides[0].figures for name, stage in plan.stages.items() if stage.sides}
    cells = {(job.stage, job.variant, job.seed): record for job, record in records.items() if not job.tuning}
    results = Results(sides, cells, study.compare.against)
    rows = rows_of(results)
    notes = [*_notes(plan, records), *doubts(rows)]
    data = {
        "schema_version": SCHEMA_VERSION,
        "run": str(root),
        "versions": {name: version_of(name) for name in ("dmpctl", "torch", "scipy")},
        "study": {
            "compare": study.compare.model_dump(mode="json"),
            "stages": dict(study.stages),
            "settings": dict(study.settings),
            "variants": {name: variant.model_dump(mode="json", by_alias=True) for name, variant in study.variants.items()},
        },
        "stages": {name: {**figures, **plan.stages[name].protocol()} for name, figures in sides.items()},
        "cells": [{"stage": s, "variant": v, **cell} for (s, v, _), cell in cells.items()],
        "rows": rows,
        "bands": bands_of(results),
        "notes": notes,
    }
    write_json(root / "table.json", data)
    write_atomic(root / "table.md", markdown(results, rows, notes).encode())
    write_atomic(root / "table.csv", tidy(results).encode())
    write_atomic(root / "plot.png", plot(results, rows))
    lines = (*sentences(rows), *notes, f"table: {root / 'table.md'}", f"look at: {root / 'plot.png'}")
    return Report(data, console_rows(results, rows), lines)


def _notes(plan: Plan, records: Mapping[Job, dict[str, Any]]) -> list[str]:
    """What one has to know to read the numbers."""
    compare = plan.study.compare
    count = len(compare.seeds)
    notes = ["a negative difference is an improvement; ± is the standard deviation over training seeds"]
    if count > 1:
        tested = f"t test over {count} training seeds, Holm-corrected over the variants of a stage"
        notes.append(f"verdicts: {tested}, p < {ALPHA:g}; for these images and this backbone")
    else:
        notes.append("one training seed: nothing is tested, and another seed may say otherwise")
    trained_on = {record["shaped_by"]["data_fingerprint"] for record in records.values()}
    if trained_on & {stage.source.fingerprint for stage in plan.stages.values()}:
        notes.append("measured on images that were trained on (eval_data names others)")
    for name, variant in plan.study.variants.items():
        for stage in plan.stages:
            choice = plan.chosen(stage, name) if variant.at(stage) and plan.tunes_here(stage, variant) else None
            notes += [] if choice is None else [_tuned_note(variant, stage, name, choice, compare.tuning_seeds)]
    return notes


def _tuned_note(variant: Variant, stage: str, name: str, choice: Mapping[str, Any], seeds: tuple[int, ...]) -> str:
    """What tuning chose; a choice at the edge of its grid may not be the best there is."""
    words = ", ".join(f"{key} {value}" for key, value in choice.items())
    edges = [key for key, values in variant.tune.items() if len(values) > 1 and choice.get(key) in (values[0], values[-1])]
    edge = f"; {', '.join(edges)} is at the end of its grid: a wider one may do better" if edges else ""
    return f"{stage}/{name} was tuned on seed {', '.join(map(str, seeds))}: {words}{edge}"


def _planned(plan: Plan) -> Report:
    """--dry-run: how many cells there are, how many are done, and what each variant resolves to."""
    jobs, table, kinds, counts = plan.jobs(), list[dict[str, str]](), list[dict[str, Any]](), [0, 0]
    for stage in plan.stages:
        for name, variant in plan.study.variants.items():
            mine = [job for job in jobs if (job.stage, job.variant) == (stage, name)]
            if not mine:
                continue
            done = sum(cell is not None and cell.record() is not None for cell in map(plan.cell, mine))
            counts[0], counts[1] = counts[0] + len(mine), counts[1] + done
            choice = plan.chosen(stage, name)
            cell = plan.cell_with(Job(stage, name, mine[-1].seed), choice or variant.choices()[0])
            resolved = cell.settings.science() | {"iters": cell.iterations}
            kinds.append({"stage": stage, "variant": name, "cells": len(mine), "done": done})
            kinds[-1] |= {"tuned": choice, "settings": resolved}
            table.append(_planned_row(stage, name, variant, choice, resolved, f"{done} of {len(mine)}"))
    data = {"dry_run": True, "run": str(plan.study.compare.run), "cells": counts[0], "done": counts[1], "variants": kinds}
    return Report(data, tuple(table), (f"{counts[0]} cells, {counts[1]} of them are done", "dry run: nothing was written"))


def _planned_row(
    stage: str, name: str, variant: Variant, choice: Mapping[str, Any] | None, resolved: Mapping[str, Any], done: str
) -> dict[str, str]:
    options = [f"{key} {value}" for key, value in variant.options.items() if key != "method"]
    options += [f"{key} {(choice or {}).get(key) or ' or '.join(map(str, values))}" for key, values in variant.tune.items()]
    method = "the backbone, trained on" if variant.goes_on else str(resolved["method"])
    row = {"stage": stage, "variant": name, "trains": method, "iterations": str(resolved["iters"])}
    return row | {"options": ", ".join(options) or "-", "done": done}
