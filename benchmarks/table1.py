"""The tests of docs/table1.md made again from the CSV files beside it: p over training seeds alone, and with the images.

Usage: python -m benchmarks.table1 [docs/digits16-optimum.csv ...]: a Markdown table for each, bold where p < 0.01. The files have
no gains of single images, so the errors over images are added whole, as if images gave the same with every seed: the most
that they can be. Nothing is trained.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from scipy import stats

from dmpctl.studies.results import CellRecord, Gap, LossGap, Results, StageRecord
from dmpctl.studies.table import ALPHA, BACKBONE, StudyRow, holm, p_shown, rows_of, select, shown, spread

DOCS = Path(__file__).parent.parent / "docs"
FILES = ("digits-table1", "digits16-table1", "fashion32-table1", "digits-under", "fashion32-under")
FILES += ("digits-optimum", "digits16-optimum", "digits16-optimum-fresh", "fashion32-optimum")
MEASURES = ("paired_loss", "frechet")


def results_of(path: Path, against: Sequence[str] = ()) -> Results:
    """The study whose table.csv this is, as far as that holds it."""
    gaps = dict[tuple[str, str, str, int], Gap]()
    with path.open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["measure"] in MEASURES and line["difference"]:
                key = (line["measure"], line["stage"], line["variant"], int(line["seed"]))
                numbers = {name: float(line[name]) for name in ("backbone", "model", "difference")}
                gaps[key] = Gap(**numbers, standard_error=float(line["standard_error"]) if line["standard_error"] else None)
    about = {"schema_version": 1, "identity": "", "shaped_by": {}}
    records = {}
    for _, stage, variant, seed in gaps:
        loss, distance = (gaps.get((measure, stage, variant, seed)) for measure in MEASURES)
        cell = {"seed": seed, "choice": {}, "iterations": 0, "train_seconds": 0.0, "failed": None}
        cell |= {"added_parameters": None, "added_percent": None, "frechet": distance}
        records[stage, variant, seed] = CellRecord.model_validate(
            {**about, **cell, "paired_loss": None if loss is None else LossGap(**dict(loss), bands=[])}
        )
    sampled = dict.fromkeys(("value", "seed_sd", "noise_floor"), 0.0)
    sampled |= {"standard_error": None, "n": 0, "n_reference": 0, "other_seeds": []}
    stages = {
        stage: StageRecord.model_validate(
            {
                **about,
                "backbone": "",
                "sha256": "",
                "paired_loss": 0.0,
                "parameters": 0,
                "frechet": {**sampled, "other_seeds": []},
            }
        )
        for stage in dict.fromkeys(stage for stage, _, _ in records)
    }
    return Results(stages, records, tuple(against))


def over_seeds_alone(rows: Sequence[StudyRow]) -> list[float]:
    """Corrected p of a family by Student's test over training seeds, which is what the table said at first."""
    return holm([float(stats.ttest_1samp(list(row.differences.values()), 0).pvalue) for row in rows])


def lines_of(path: Path, against: Sequence[str] = ()) -> list[str]:
    """A Markdown table: every variant beside the backbone (and each of `against`), both measures."""
    found, lines = rows_of(results_of(path, against)), list[str]()
    for first in found:
        family = select(found, stage=first.stage, measure=first.measure, against=first.against)
        if first is not family[0] or first.mean is None:
            continue
        for row, old in zip(family, over_seeds_alone(family), strict=True):
            other = "" if row.against == BACKBONE else f" against {row.against}"
            new = "no test" if row.p_corrected is None else bold(row.p_corrected)
            parts = (shown(row.standard_error, row.measure, ""), bold(old), new)
            what = f"{row.stage}, {row.measure.replace('_', ' ')}{other}"
            lines.append(f"| {what} | {row.variant} | {spread(row, row.measure)} | {' | '.join(parts)} |")
    return ["| measure | variant | mean ± sd | standard error | p over seeds alone | p |", "|---|---|---|---|---|---|", *lines]


def bold(p: float) -> str:
    return f"**{p_shown(p)}**" if p < ALPHA else p_shown(p)


def main() -> None:
    paths = [Path(name) for name in sys.argv[1:]] or [DOCS / f"{name}.csv" for name in FILES]
    for path in paths:
        variants = {variant for _, variant, _ in results_of(path).records}
        against = [name for name in ("dmp-published", "full") if name in variants]
        sys.stdout.write("\n".join((f"## {path.stem}", "", *lines_of(path, against), "", "")))


if __name__ == "__main__":
    main()
