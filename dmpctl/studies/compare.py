"""`dmpctl compare`: variants x seeds x stages. Each cell is trained and measured once, by all processes that share the study."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dmpctl.errors import Damaged, NumericalError
from dmpctl.files import json_to_bytes, make_folder, put_aside, sha256_of_json, write_atomic, write_json
from dmpctl.metrics.crossed import FEWEST_SEEDS
from dmpctl.models.build import build_patch
from dmpctl.models.sources import open_data
from dmpctl.processes.command import again_command
from dmpctl.processes.ranks import resolve_device
from dmpctl.processes.stop import Stop
from dmpctl.runs.rundir import version_of
from dmpctl.settings.model import Settings
from dmpctl.studies.cell import Cell, GoingOn, do_cell, find_going_on
from dmpctl.studies.plot import plot
from dmpctl.studies.results import CellRecord, Results
from dmpctl.studies.stage import SCHEMA_VERSION, Side, Stage, open_stage, side_of
from dmpctl.studies.study import Study, Variant, read_study, settings_of
from dmpctl.studies.table import ALPHA, bands_of, console_rows, markdown, rows_of, sentences, tidy
from dmpctl.types import Progress, Report, Source

POLL = 1.0  # sec between two looks at cells that another process has

Choice = Mapping[str, object]  # a point of a variant's grid, by the keys of the file


@dataclass(frozen=True)
class CellKey:
    """Which cell. `choice`: the point of the variant's grid that a tuning cell tries, None: reported, with the one chosen."""

    stage: str
    variant: str
    seed: int
    choice: int | None = None

    @property
    def tuning(self) -> bool:
        return self.choice is not None


@dataclass(frozen=True)
class Candidate:
    """A point of a grid, and what the paired loss gained with each tuning seed (None: it failed); `mean` None: one failed."""

    choice: Choice
    differences: list[float | None]
    mean: float | None

    @classmethod
    def of(cls, choice: Choice, differences: list[float | None]) -> "Candidate":
        """Returns a candidate with the mean of its differences."""
        there = [value for value in differences if value is not None]
        return cls(choice, differences, sum(there) / len(there) if len(there) == len(differences) else None)


def best(candidates: Sequence[Candidate], what: str) -> Choice:
    """Returns the choice of the smallest mean paired loss. NumericalError if every training failed."""
    means = [(candidate.mean, number) for number, candidate in enumerate(candidates) if candidate.mean is not None]
    if not means:
        raise NumericalError(f"no rate that {what} was tuned with gives finite numbers", "add lower ones to its grid")
    return candidates[min(means)[1]].choice


class OpenStudy:
    """The study with everything it needs opened: what can fail fails here, before anything is written."""

    def __init__(self, study: Study, settings: Settings, progress: Progress) -> None:
        self.study, self.settings = study, settings
        device = resolve_device(settings.launch)
        self.stages = {name: open_stage(study, name, settings, device, progress) for name in study.stages}
        self.sides: dict[str, Side] = {}  # of the stages, once they were made or read
        self._going_on: dict[tuple[str, str], GoingOn] = {}
        self._sources: dict[tuple[str, str], Source] = {}
        self._candidates: dict[tuple[str, str], list[Candidate]] = {}
        for stage, name, variant in self.variants():
            for choice in variant.choices():
                cell = self.cell_with(CellKey(stage, name, study.compare.seeds[0]), choice)
                if cell.goes_on is None:
                    build_patch(self.stages[stage].loaded.model, cell.settings.method)

    def variants(self) -> Iterator[tuple[str, str, Variant]]:
        """Yields (stage, name, variant): each variant at each of its stages."""
        for stage in self.study.stages:
            yield from ((stage, name, variant) for name, variant in self.study.variants.items() if variant.at(stage))

    def in_order(self) -> list[CellKey]:
        """Returns all cells in the order in which they are done: tuning first, then what is reported."""
        compare, tuning, reporting = self.study.compare, list[CellKey](), list[CellKey]()
        for stage, name, variant in self.variants():
            if self.tunes_here(stage, variant):
                grid = range(len(variant.choices()))
                tuning += [CellKey(stage, name, seed, choice) for choice in grid for seed in compare.tuning_seeds]
            reporting += [CellKey(stage, name, seed) for seed in compare.seeds]
        return tuning + reporting

    def cell(self, key: CellKey) -> Cell | None:
        """Returns a cell; None while its variant is not tuned."""
        choices = self.study.variants[key.variant].choices()
        choice = self.chosen(key.stage, key.variant) if key.choice is None else choices[key.choice]
        return None if choice is None else self.cell_with(key, choice)

    def cell_with(self, key: CellKey, choice: Choice) -> Cell:
        """Returns a cell with this choice."""
        stage, place, goes_on = self.stages[key.stage], (key.stage, key.variant), None
        settings = settings_of(self.study, key.stage, key.variant, choice, key.seed)
        settings = settings.model_copy(update={"launch": self.settings.launch, "sampling": stage.sampling})
        if self.study.variants[key.variant].goes_on:
            goes_on = self._going_on[place] = self._going_on.get(place) or find_going_on(stage, key.variant, settings)
            settings = goes_on.settings
        source = self._source(stage, settings) if goes_on is None else goes_on.source
        folder = f"tune-{sha256_of_json(choice)[:8]}-seed-{key.seed}" if key.tuning else f"seed-{key.seed}"
        path = stage.folder / key.variant / folder
        run = settings.run.model_copy(update={"run": path, "seed": key.seed})
        name, settings = f"{key.stage}/{key.variant}/{folder}", settings.model_copy(update={"run": run})
        return Cell(name, stage, path, settings, source, choice, key.tuning, goes_on)

    def _source(self, stage: Stage, settings: Settings) -> Source:
        """Images to train on, opened once."""
        key = (stage.name, settings.data.model_dump_json())
        if key not in self._sources:
            self._sources[key] = open_data(settings.data, stage.loaded.spec, stage.codec, stage.loaded.data)
        return self._sources[key]

    def tunes_here(self, stage: str, variant: Variant) -> bool:
        """Whether a variant's grid is tried at this stage."""
        return len(variant.choices()) > 1 and self.study.compare.tune_stage in (None, stage)

    def candidates(self, stage: str, name: str) -> list[Candidate] | None:
        """Returns the grid of a variant with its tuning figures, None while some are missing. Read until all are there."""
        if (stage, name) not in self._candidates:
            found = []
            for number, choice in enumerate(self.study.variants[name].choices()):
                keys = [CellKey(stage, name, seed, number) for seed in self.study.compare.tuning_seeds]
                records = [record for key in keys if (record := self.cell_with(key, choice).record()) is not None]
                if len(records) < len(keys):
                    return None
                gains = [None if record.paired_loss is None else record.paired_loss.difference for record in records]
                found.append(Candidate.of(choice, gains))
            self._candidates[stage, name] = found
        return self._candidates[stage, name]

    def chosen(self, stage: str, name: str) -> Choice | None:
        """Returns the choice in force for a variant at a stage, {} without a grid; None while tuning is not done."""
        choices = self.study.variants[name].choices()
        if len(choices) == 1:
            return choices[0]
        candidates = self.candidates(self.study.compare.tune_stage or stage, name)
        return None if candidates is None else best(candidates, f"{stage}/{name}")

    def side(self, stage: str, progress: Progress) -> Side | None:
        """Returns the backbone's side of a stage, made or read once; None while another process is making it."""
        if stage not in self.sides and (side := side_of(self.stages[stage], progress)) is not None:
            self.sides[stage] = side
        return self.sides.get(stage)


def compare(settings: Settings, file: Path, progress: Progress) -> Report:
    """Train and measure every cell of the study in `file` that is not done yet; then table, plot and verdicts."""
    opened = OpenStudy(read_study(file), settings, progress)
    if settings.console.dry_run:
        return _planned(opened)
    for cell in filter(None, map(opened.cell, opened.in_order())):
        try:
            cell.record()  # refuses now what was made in another way
        except Damaged as error:
            aside = put_aside(cell.path / "cell.json").name
            progress.say(f"warning: {error.message}; put aside as {aside}, {cell.name} is trained and measured again")
    root = make_folder(opened.study.compare.run.expanduser().absolute())
    return _report(opened, root, _run(opened, progress))


def _run(opened: OpenStudy, progress: Progress) -> dict[CellKey, CellRecord]:
    """Do the cells in order; those that wait for another process or for a tuning are looked at again at the end.

    The records come in the order of the keys, whoever did them when.
    """
    waiting, done = opened.in_order(), dict[CellKey, CellRecord]()

    def there() -> str:
        cells = filter(None, map(opened.cell, opened.in_order()))
        return f"{sum((cell.path / 'cell.json').is_file() for cell in cells)} cells are done"

    with Stop(there, f"go on with: {again_command()}") as stop, progress.track("cells", len(waiting)) as task, stop.soon():
        while waiting:
            before, waiting = waiting, []
            for key in before:
                stop.check()
                record = _one(opened, key, progress)
                if record is None:
                    waiting.append(key)
                    continue
                done[key] = record
                task.advance()
            if len(waiting) == len(before):
                time.sleep(POLL)
    return {key: done[key] for key in opened.in_order()}


def _one(opened: OpenStudy, key: CellKey, progress: Progress) -> CellRecord | None:
    """Do one cell; None if it has to wait."""
    cell = opened.cell(key)
    if cell is None:
        return None
    if not key.tuning:
        _write_choice(opened, key)
    was_there = (cell.path / "cell.json").is_file()
    side = opened.side(key.stage, progress)
    record = None if side is None else do_cell(cell, side)
    if record is not None and not was_there:
        progress.say(f"{cell.name}: {_in_words(record)}")
    return record


def _in_words(record: CellRecord) -> str:
    loss, gap = record.paired_loss, record.frechet
    if loss is None:
        return f"failed: {record.failed}"
    words = f"paired loss {loss.difference:+.3g} ± {loss.standard_error:.2g}"
    words += f", Fréchet distance {gap.difference:+.4g}" if gap else ""
    return f"{words} ({record.train_seconds:.0f} s of training)"


def _write_choice(opened: OpenStudy, key: CellKey) -> None:
    """Write tuned.json of a variant that is tuned at this stage: the choice, and the figures it was made from."""
    if not opened.tunes_here(key.stage, opened.study.variants[key.variant]):
        return
    candidates = opened.candidates(key.stage, key.variant)
    if candidates is not None:
        about = {"schema_version": SCHEMA_VERSION, "seeds": list(opened.study.compare.tuning_seeds)}
        chosen = opened.chosen(key.stage, key.variant)
        data = json_to_bytes({**about, "chosen": chosen, "candidates": [asdict(candidate) for candidate in candidates]})
        path = opened.stages[key.stage].folder / key.variant / "tuned.json"
        if not path.is_file() or path.read_bytes() != data:
            write_atomic(make_folder(path.parent) / path.name, data)


def _report(opened: OpenStudy, root: Path, records: Mapping[CellKey, CellRecord]) -> Report:
    """Write table.md, table.json, table.csv and plot.png; they are the same whichever process writes them."""
    study = opened.study
    cells = {(key.stage, key.variant, key.seed): record for key, record in records.items() if not key.tuning}
    sides = {name: opened.sides[name].record for name in study.stages if name in opened.sides}
    results = Results(sides, cells, study.compare.against)
    rows = rows_of(results)
    notes = _notes(opened, records)
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
        "stages": {name: {**record.figures(), **opened.stages[name].protocol()} for name, record in sides.items()},
        "cells": [{"stage": s, "variant": v, **cell.figures()} for (s, v, _), cell in cells.items()],
        "rows": [asdict(row) for row in rows],
        "bands": [
            {"stage": s, "variant": v, "from": a, "to": b, "mean": t.mean, "sd": t.sd}
            for (s, v, a, b), t in bands_of(results).items()
        ],
        "notes": notes,
    }
    write_json(root / "table.json", data)
    write_atomic(root / "table.md", markdown(results, rows, notes).encode())
    write_atomic(root / "table.csv", tidy(results).encode())
    write_atomic(root / "plot.png", plot(results, rows))
    lines = (*sentences(rows), *notes, f"table: {root / 'table.md'}", f"look at: {root / 'plot.png'}")
    return Report(data, console_rows(results, rows), lines)


def _notes(opened: OpenStudy, records: Mapping[CellKey, CellRecord]) -> list[str]:
    """All that one has to know to read the numbers."""
    count = len(opened.study.compare.seeds)
    notes = ["a negative difference is an improvement; ± is the standard deviation over training seeds"]
    if count >= FEWEST_SEEDS:
        tested = f"t test over {count} training seeds and the images with their noise, both as samples"
        notes.append(f"verdicts: {tested}, Holm-corrected over the variants of a stage, p < {ALPHA:g}; for this backbone")
    else:
        notes.append(f"under {FEWEST_SEEDS} training seeds: nothing is tested, and another seed may say otherwise")
    gaps = [gap for record in records.values() for gap in (record.paired_loss, record.frechet) if gap is not None]
    if any(gap.gains is None and gap.standard_error is not None for gap in gaps):
        older = "their errors over images are the most that they can be, their distances have the bias of few images"
        notes.append(f"some records are older and have no gains of single images: {older}")
    trained_on = {record.shaped_by["data_fingerprint"] for record in records.values()}
    if trained_on & {stage.source.fingerprint for stage in opened.stages.values()}:
        notes.append("measured on images that were trained on (eval_data names others)")
    for name, variant in opened.study.variants.items():
        for stage in opened.stages:
            choice = opened.chosen(stage, name) if variant.at(stage) and opened.tunes_here(stage, variant) else None
            notes += [] if choice is None else [_tuned_note(opened.study, stage, name, choice)]
    return notes


def _tuned_note(study: Study, stage: str, name: str, choice: Choice) -> str:
    """The choice that tuning made; one at the edge of its grid may not be the best there is."""
    words, grid = ", ".join(f"{key} {value}" for key, value in choice.items()), study.variants[name].tune
    edges = [key for key, values in grid.items() if len(values) > 1 and choice.get(key) in (values[0], values[-1])]
    edge = f"; {', '.join(edges)} is at the end of its grid: a wider one may do better" if edges else ""
    return f"{stage}/{name} was tuned on seed {', '.join(map(str, study.compare.tuning_seeds))}: {words}{edge}"


def _planned(opened: OpenStudy) -> Report:
    """--dry-run: how many cells there are, how many are done, and what each variant resolves to."""
    table, kinds, total, finished = list[dict[str, str]](), list[dict[str, object]](), 0, 0
    for stage, name, variant in opened.variants():
        keys = [key for key in opened.in_order() if (key.stage, key.variant) == (stage, name)]
        done = sum(cell is not None and cell.record() is not None for cell in map(opened.cell, keys))
        total, finished = total + len(keys), finished + done
        choice = opened.chosen(stage, name)
        cell = opened.cell_with(keys[-1], choice or variant.choices()[0])
        kind = {"stage": stage, "variant": name, "cells": len(keys), "done": done, "tuned": choice}
        kinds.append({**kind, "settings": cell.settings.science() | {"iters": cell.iterations}})
        options = [f"{key} {value}" for key, value in variant.options.items() if key != "method"]
        options += [f"{key} {(choice or {}).get(key) or ' or '.join(map(str, grid))}" for key, grid in variant.tune.items()]
        trains = "the backbone, trained on" if variant.goes_on else cell.settings.method.method
        row = {"stage": stage, "variant": name, "trains": trains, "iterations": str(cell.iterations)}
        table.append({**row, "options": ", ".join(options) or "-", "done": f"{done} of {len(keys)}"})
    data = {"dry_run": True, "run": str(opened.study.compare.run), "cells": total, "done": finished, "variants": kinds}
    return Report(data, tuple(table), (f"{total} cells, {finished} of them are done", "dry run: nothing was written"))
