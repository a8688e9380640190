"""Verdicts of a study: per stage, variant and measure the mean over training seeds, a paired test, and a word.

Tests are of differences paired by training seed and by image (`crossed.py`), corrected over the variants of a stage (Holm 1979).
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from dmpctl.measuring.verdict import percent
from dmpctl.metrics.crossed import FEWEST_SEEDS, CrossedTest, crossed_test
from dmpctl.studies.results import CellRecord, Gap, Results, StageRecord
from dmpctl.words import plus_minus

ALPHA = 0.01  # of the corrected p value, two-sided
BACKBONE = "backbone"
LOSS_UNIT = 1e-5
MEASURES = {"paired_loss": "paired loss (1e-5)", "frechet": "Fréchet distance"}  # name -> what people see
SHORT = {name: words.split(" (")[0] for name, words in MEASURES.items()}
FEW_SEEDS, FEW_IMAGES = f"under {FEWEST_SEEDS} seeds: no test", "too few images: no test"


@dataclass(frozen=True)
class StudyRow:
    """A variant tested against one opponent, by `differences` (seed -> number); a row of table.json.

    The figures are `CrossedTest`'s; `percent`: the mean in percent of what the backbone has; `family`: the number of tests that
    `p_corrected` is corrected for. None: there is no such number.
    """

    stage: str
    measure: str
    against: str
    variant: str
    differences: dict[str, float]
    mean: float | None
    sd: float | None
    standard_error: float | None
    image_error: float | None
    df: float | None
    t: float | None
    p: float | None
    percent: float | None
    p_corrected: float | None
    family: int | None
    verdict: str


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns adjusted p values of Holm's step-down procedure (1979): the k-th smallest of m times m - k + 1, never falling."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def rows_of(results: Results) -> list[StudyRow]:
    """Returns one row per stage x measure x comparison x variant, tested and corrected."""
    return [
        row
        for stage in results.stages
        for measure in results.measures(stage)
        for against in (BACKBONE, *results.against)
        for row in _family(results, stage, measure, against)
    ]


def _family(results: Results, stage: str, measure: str, against: str) -> list[StudyRow]:
    """The variants of a stage tested against one opponent, corrected for how many they are."""
    variants = results.variants_at(stage)
    if against != BACKBONE and against not in variants:
        return []
    rows = [_row(results, stage, measure, against, variant) for variant in variants if variant != against]
    corrected = iter(holm(tested := [row.p for row in rows if row.p is not None]))
    return [row if row.p is None else _judged(row, next(corrected), len(tested)) for row in rows]


def _judged(row: StudyRow, p: float, family: int) -> StudyRow:
    return replace(row, p_corrected=p, family=family, verdict=word(row.mean or 0.0, p))


def _row(results: Results, stage: str, measure: str, against: str, variant: str) -> StudyRow:
    """A row before the correction; its verdict is empty if it is tested."""
    count, gaps = len(results.cells(stage, variant)), results.gaps(stage, variant, measure)
    backbones = [gap.backbone for gap in gaps.values()]
    if against != BACKBONE:
        other = results.gaps(stage, against, measure)
        gaps = {seed: _between(gap, other[seed]) for seed, gap in gaps.items() if seed in other}
    values, failed = [gap.difference for gap in gaps.values()], count - len(gaps)
    gains = [gap.gains for gap in gaps.values() if gap.gains is not None]
    test = crossed_test(values, gains if len(gains) == len(gaps) else None, [gap.standard_error for gap in gaps.values()])
    if failed:
        test = replace(test, df=None, t=None, p=None)
    few = FEW_SEEDS if len(values) < FEWEST_SEEDS else FEW_IMAGES if test.p is None else ""
    return StudyRow(
        stage,
        measure,
        against,
        variant,
        {str(seed): gap.difference for seed, gap in gaps.items()},
        **vars(test),
        percent=100 * test.mean / mean(backbones) if test.mean is not None and all(backbones) else None,
        p_corrected=None,
        family=None,
        verdict=f"failed on {failed} of {count} seeds" if failed else few,
    )


def _between(one: Gap, other: Gap) -> Gap:
    """One model beside another on the same seed, image by image. Without gains, their errors are added as if independent."""
    error, gains = None, None
    if one.standard_error is not None and other.standard_error is not None:
        error = math.hypot(one.standard_error, other.standard_error)
    if one.gains is not None and other.gains is not None:
        gains = [a - b for a, b in zip(one.gains, other.gains, strict=True)]
    difference = one.difference - other.difference
    return Gap(backbone=other.model, model=one.model, difference=difference, standard_error=error, gains=gains)


def word(average: float, p_corrected: float) -> str:
    """Returns the verdict; a smaller loss or distance is better."""
    if p_corrected >= ALPHA or average == 0:
        return "no significant change"
    return "improved" if average < 0 else "worse"


def bands_of(results: Results) -> dict[tuple[str, str, int, int], CrossedTest]:
    """(stage, variant, first and last timestep of a band) -> mean and sd over seeds of the paired loss's difference."""
    found = {}
    for stage in results.stages:
        for variant in results.variants_at(stage):
            cells = [cell.paired_loss.bands for cell in results.cells(stage, variant).values() if cell.paired_loss is not None]
            for bands in zip(*cells, strict=True):
                span = int(bands[0]["from"]), int(bands[0]["to"])
                found[stage, variant, *span] = crossed_test([band["difference"] for band in bands], None, [None] * len(bands))
    return found


def tidy(results: Results) -> str:
    """Returns CSV: one line per stage x variant x seed x measure; empty where there is no such number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("stage", "variant", "seed", "measure", "model", "backbone", "difference", "standard_error"))
    for key, cell in results.records.items():
        for measure in results.measures(key[0]):
            gap = cell.gap(measure)
            numbers = (gap.model, gap.backbone, gap.difference, gap.standard_error) if gap else (None,) * 4
            writer.writerow((*key, measure, *numbers))
        for band in cell.paired_loss.bands if cell.paired_loss else ():
            name = f"paired_loss_t{band['from']}-{band['to']}"
            writer.writerow((*key, name, None, None, band["difference"], band["standard_error"]))
        for name in ("added_parameters", "added_percent", "iterations", "train_seconds"):
            writer.writerow((*key, name, getattr(cell, name), None, None, None))
    return text.getvalue()


def shown(value: float | None, measure: str, sign: str = "+") -> str:
    """Returns a number in the unit of its measure."""
    if value is None:
        return "-"
    places, value = (2, value / LOSS_UNIT) if measure == "paired_loss" else (4, value)
    return f"{value:{sign}.{places}f}" if value == 0 or abs(value) >= 10**-places else f"{value:{sign}.1g}"


def p_shown(p: float | None) -> str:
    """Returns a p value; "-" where nothing was tested."""
    return "-" if p is None else "< 1e-4" if p < 1e-4 else f"{p:.4f}"


def spread(of: CrossedTest | StudyRow, measure: str) -> str:
    """Returns mean ± sd in the unit of the measure."""
    return shown(of.mean, measure) + ("" if of.sd is None else f" ± {shown(of.sd, measure, '')}")


def share(row: StudyRow) -> str:
    """Returns ` (-0.31 %)`: how much that is of what the backbone has; empty where that is not known."""
    return "" if row.percent is None else f" ({percent(row.percent / 100)})"


def facts(cells: Mapping[int, CellRecord]) -> dict[str, str]:
    """Returns the costs of a variant: added parameters, iterations, mean seconds of training, seeds."""
    first = next(iter(cells.values()))
    added = "-" if first.added_percent is None else f"{first.added_parameters:,} ({first.added_percent:.2f} %)"
    seconds = mean(cell.train_seconds for cell in cells.values())
    return {"added": added, "iterations": str(first.iterations), "seconds": f"{seconds:.3g}", "seeds": str(len(cells))}


def select(rows: Iterable[StudyRow], **wanted: str) -> list[StudyRow]:
    """Returns the rows whose fields have these values."""
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def console_rows(results: Results, rows: Sequence[StudyRow]) -> tuple[dict[str, str], ...]:
    """Returns the table for people: one row per stage and variant, against the backbone."""
    table = []
    for stage in results.stages:
        for variant in results.variants_at(stage):
            line = {"stage": stage, "variant": variant, **facts(results.cells(stage, variant))}
            for row in select(rows, stage=stage, variant=variant, against=BACKBONE):
                verdict = row.verdict if row.p_corrected is None else f"{row.verdict} (p {p_shown(row.p_corrected)})"
                line |= {MEASURES[row.measure]: spread(row, row.measure) + share(row), f"{SHORT[row.measure]} is": verdict}
            table.append(line)
    return tuple(table)


def sentences(rows: Iterable[StudyRow]) -> list[str]:
    """Returns the verdicts of each stage and measure against the backbone, and of each comparison, in a sentence."""
    groups: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        key = f"{row.stage}, {SHORT[row.measure]} against {row.against}"
        groups.setdefault(key, {}).setdefault(row.verdict, []).append(row.variant)
    return [
        f"{key}: " + "; ".join(f"{verdict}: {', '.join(variants)}" for verdict, variants in verdicts.items())
        for key, verdicts in groups.items()
    ]


def markdown(results: Results, rows: Sequence[StudyRow], notes: Sequence[str]) -> str:
    """Returns table.md: per stage the backbone, one table per measure, and the paired loss per band of timesteps."""
    lines = ["# dmpctl compare", "", *(f"- {note}" for note in notes), ""]
    for stage, backbone in results.stages.items():
        lines += [f"## {stage}", "", _backbone_line(backbone), ""]
        for measure in results.measures(stage):
            lines += [f"### {MEASURES[measure]}: difference from the backbone", ""]
            tested = select(rows, stage=stage, measure=measure, against=BACKBONE)
            lines += _table([_line(results, rows, row) for row in tested])
        table: dict[str, dict[str, str]] = {}
        for (at, variant, first, last), test in bands_of(results).items():
            if at == stage:
                line = table.setdefault(variant, {"variant": variant})
                line[f"t {first}-{last}"] = spread(test, "paired_loss")
        if table:
            title = "### Paired loss (1e-5) per band of timesteps: mean ± sd over seeds"
            lines += [title, "", *_table(list(table.values()))]
    return "\n".join(lines)


def _backbone_line(backbone: StageRecord) -> str:
    text, gap = f"Backbone: {backbone.parameters:,} parameters, paired loss {backbone.paired_loss:.6f}", backbone.frechet
    if gap is None:
        return text + "."
    error = "" if gap.debiased is None else f" (debiased {gap.debiased:.4f}{plus_minus(gap.standard_error, '.4f')} over images)"
    seeds = f"sd {gap.seed_sd:.4f} over {1 + len(gap.other_seeds)} sampling seeds"
    return f"{text}; Fréchet distance {gap.value:.4f}{error}, {seeds}; noise floor (real images) {gap.noise_floor:.4f}."


def _line(results: Results, rows: Sequence[StudyRow], row: StudyRow) -> dict[str, str]:
    """A line of a measure's table: a variant against the backbone, then against each opponent."""
    line = {
        "variant": row.variant,
        **facts(results.cells(row.stage, row.variant)),
        "mean ± sd over seeds": spread(row, row.measure) + share(row),
    }
    errors = {"standard error": row.standard_error, "of it over images": row.image_error}
    line |= {name: shown(error, row.measure, "") for name, error in errors.items()}
    line |= {"p (Holm)": p_shown(row.p_corrected), "verdict": row.verdict}
    for other in select(rows, stage=row.stage, measure=row.measure, variant=row.variant):
        if other.against != BACKBONE:
            line[f"against {other.against}"] = f"{spread(other, row.measure)}, p {p_shown(other.p_corrected)}: {other.verdict}"
    return line


def _table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Rows as a Markdown table; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]
