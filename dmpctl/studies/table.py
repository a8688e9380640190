"""What a study says: per stage, variant and measure the mean over training seeds, a paired test, and a verdict in words.

Tests are t tests of differences paired by training seed, corrected over the variants of a stage (Holm 1979).
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from scipy import stats

ALPHA = 0.01  # of the corrected p value, two-sided
BACKBONE = "backbone"
LOSS_UNIT = 1e-5
MEASURES = {"paired_loss": "paired loss (1e-5)", "frechet": "Fréchet distance"}  # name -> what people see
ONE_SEED = "one seed: no test"

Record = Mapping[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """Everything measured. `stages`: name -> figures of the backbone itself; `records`: (stage, variant, seed) -> its cell."""

    stages: Mapping[str, Record]
    records: Mapping[tuple[str, str, int], Record]
    against: tuple[str, ...] = ()

    def variants_at(self, stage: str) -> list[str]:
        """Variants that were run at a stage, in the order of the file."""
        return list(dict.fromkeys(variant for at, variant, _ in self.records if at == stage))

    def cells(self, stage: str, variant: str) -> dict[int, Record]:
        """Seed -> cell."""
        return {seed: record for (s, v, seed), record in self.records.items() if (s, v) == (stage, variant)}

    def measures(self, stage: str) -> list[str]:
        """Names of what was measured at a stage."""
        return [name for name in MEASURES if self.stages[stage][name] is not None]


def t_test(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, sd, standard error of the mean, and the two-sided t test of a mean of 0 (Student 1908).

    One value: no sd and no test. Values that are all the same: p is 1 if they are 0, else 0.
    """
    average = mean(values)
    if len(values) < 2:
        return {"mean": average, "sd": None, "standard_error": None, "t": None, "p": None}
    sd = stdev(values)
    error = sd / math.sqrt(len(values))
    if error == 0:
        return {"mean": average, "sd": 0.0, "standard_error": 0.0, "t": None, "p": 0.0 if average else 1.0}
    t = average / error
    p = float(2 * stats.t.sf(abs(t), len(values) - 1))
    return {"mean": average, "sd": sd, "standard_error": error, "t": t, "p": p}


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values of Holm's step-down procedure (1979): the k-th smallest of m times m - k + 1, never falling."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def rows_of(results: Results) -> list[Row]:
    """One row per stage x measure x comparison x variant, tested and corrected."""
    rows: list[Row] = []
    for stage in results.stages:
        for measure in results.measures(stage):
            for against in (BACKBONE, *results.against):
                rows += _family(results, stage, measure, against)
    return rows


def _family(results: Results, stage: str, measure: str, against: str) -> list[Row]:
    """The variants of a stage tested against one opponent, corrected for how many they are."""
    variants = results.variants_at(stage)
    if against != BACKBONE and against not in variants:
        return []
    rows = [_row(results, stage, measure, against, variant) for variant in variants if variant != against]
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_corrected"], row["family"] = p, len(tested)
        if row["verdict"] is None:
            row["verdict"] = word(row["mean"], p)
    return rows


def _row(results: Results, stage: str, measure: str, against: str, variant: str) -> Row:
    cells = results.cells(stage, variant)
    values, errors = _differences(cells, measure), [c[measure]["standard_error"] for c in cells.values() if measure in c]
    if against != BACKBONE:
        other = _differences(results.cells(stage, against), measure)
        values = {seed: value - other[seed] for seed, value in values.items() if seed in other}
        errors = []
    failed = len(cells) - len(values)
    figures = t_test(list(values.values())) if values else dict.fromkeys(("mean", "sd", "standard_error", "t", "p"))
    if failed:
        figures["p"] = figures["t"] = None
    image_error = math.sqrt(mean(e**2 for e in errors)) if errors and None not in errors else None
    verdict = f"failed on {failed} of {len(cells)} seeds" if failed else ONE_SEED if len(values) < 2 else None
    return {
        "stage": stage,
        "measure": measure,
        "against": against,
        "variant": variant,
        "differences": {str(seed): value for seed, value in values.items()},
        **figures,
        "image_error": image_error,
        "p_corrected": None,
        "family": None,
        "verdict": verdict,
    }


def _differences(cells: Mapping[int, Record], measure: str) -> dict[int, float]:
    """Seed -> difference from the backbone, of the cells that have one."""
    return {seed: float(cell[measure]["difference"]) for seed, cell in cells.items() if measure in cell}


def word(average: float, p_corrected: float) -> str:
    """The verdict; a smaller loss or distance is better."""
    if p_corrected >= ALPHA or average == 0:
        return "no significant change"
    return "improved" if average < 0 else "worse"


def bands_of(results: Results) -> list[Row]:
    """Paired loss per band of timesteps: one row per stage x variant x band, difference from the backbone."""
    rows = []
    for stage in results.stages:
        for variant in results.variants_at(stage):
            cells = [cell["paired_loss"]["bands"] for cell in results.cells(stage, variant).values() if "paired_loss" in cell]
            for bands in zip(*cells, strict=True):
                found = t_test([band["difference"] for band in bands])
                figures = {key: found[key] for key in ("mean", "sd", "standard_error")}
                rows.append({"stage": stage, "variant": variant, "from": bands[0]["from"], "to": bands[0]["to"], **figures})
    return rows


def tidy(results: Results) -> str:
    """CSV: one line per stage x variant x seed x measure; empty where there is no such number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("stage", "variant", "seed", "measure", "model", "backbone", "difference", "standard_error"))
    keys = ("model", "backbone", "difference", "standard_error")
    for (stage, variant, seed), cell in results.records.items():
        for measure in results.measures(stage):
            found = cell.get(measure, {})
            writer.writerow((stage, variant, seed, measure, *(found.get(key) for key in keys)))
        for band in cell.get("paired_loss", {}).get("bands", ()):
            name = f"paired_loss_t{band['from']}-{band['to']}"
            writer.writerow((stage, variant, seed, name, None, None, band["difference"], band["standard_error"]))
        for name in ("added_parameters", "added_percent", "iterations", "train_seconds"):
            writer.writerow((stage, variant, seed, name, cell[name], None, None, None))
    return text.getvalue()


def shown(value: float | None, measure: str, sign: str = "+") -> str:
    """A number in the unit of its measure."""
    if value is None:
        return "-"
    places, value = (2, value / LOSS_UNIT) if measure == "paired_loss" else (4, value)
    return f"{value:{sign}.{places}f}" if value == 0 or abs(value) >= 10**-places else f"{value:{sign}.1g}"


def p_shown(p: float | None) -> str:
    """A p value; "-" where nothing was tested."""
    return "-" if p is None else "< 1e-4" if p < 1e-4 else f"{p:.4f}"


def spread(row: Row) -> str:
    """mean ± sd."""
    return shown(row["mean"], row["measure"]) + ("" if row["sd"] is None else f" ± {shown(row['sd'], row['measure'], '')}")


def facts(cells: Mapping[int, Record]) -> dict[str, str]:
    """What a variant costs: added parameters, iterations, mean seconds of training, seeds."""
    first = next(iter(cells.values()))
    added = "-" if first["added_percent"] is None else f"{first['added_parameters']:,} ({first['added_percent']:.2f} %)"
    seconds = mean(cell["train_seconds"] for cell in cells.values())
    return {"added": added, "iterations": str(first["iterations"]), "seconds": f"{seconds:.3g}", "seeds": str(len(cells))}


def console_rows(results: Results, rows: Sequence[Row]) -> tuple[dict[str, str], ...]:
    """The table for people: one row per stage and variant, against the backbone."""
    table = []
    for stage in results.stages:
        for variant in results.variants_at(stage):
            line = {"stage": stage, "variant": variant, **facts(results.cells(stage, variant))}
            for row in rows:
                if (row["stage"], row["variant"], row["against"]) == (stage, variant, BACKBONE):
                    name, p = MEASURES[row["measure"]], row["p_corrected"]
                    verdict = row["verdict"] if p is None else f"{row['verdict']} (p {p_shown(p)})"
                    line |= {name: spread(row), f"{name.split(' (')[0]} is": verdict}
            table.append(line)
    return tuple(table)


def sentences(rows: Iterable[Row]) -> list[str]:
    """The verdicts of each stage and measure against the backbone, and of each comparison, in a sentence."""
    groups: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for row in rows:
        key = (row["stage"], row["measure"], row["against"])
        groups.setdefault(key, {}).setdefault(row["verdict"], []).append(row["variant"])
    found = []
    for (stage, measure, against), verdicts in groups.items():
        words = "; ".join(f"{verdict}: {', '.join(variants)}" for verdict, variants in verdicts.items())
        found.append(f"{stage}, {MEASURES[measure].split(' (')[0]} against {against}: {words}")
    return found


def doubts(rows: Iterable[Row]) -> list[str]:
    """Verdicts that the training seeds agree on, but that other images might not bear out (under 2 standard errors)."""
    return [
        f"{row['stage']}, {MEASURES[row['measure']].split(' (')[0]}: {row['variant']} is {row['verdict']} on these images, "
        "yet within two standard errors over images"
        for row in rows
        if row["verdict"] in ("improved", "worse")
        and row["image_error"] is not None
        and abs(row["mean"]) < 2 * row["image_error"]
    ]


def markdown(results: Results, rows: Sequence[Row], notes: Sequence[str]) -> str:
    """table.md: per stage the backbone, one table per measure, and the paired loss per band of timesteps."""
    lines = ["# dmpctl compare", "", *(f"- {note}" for note in notes), ""]
    for stage, figures in results.stages.items():
        lines += [f"## {stage}", "", _backbone_line(figures), ""]
        for measure in results.measures(stage):
            lines += [f"### {MEASURES[measure]}: difference from the backbone", ""]
            lines += _table(_measure_table(results, rows, stage, measure))
        bands = [row for row in bands_of(results) if row["stage"] == stage]
        if bands:
            lines += ["### Paired loss (1e-5) per band of timesteps: mean ± sd over seeds", "", *_table(_band_table(bands))]
    return "\n".join(lines)


def _backbone_line(figures: Record) -> str:
    text = f"Backbone: {figures['parameters']:,} parameters, paired loss {figures['paired_loss']:.6f}"
    if figures["frechet"] is None:
        return text + "."
    gap = figures["frechet"]
    error = "" if gap["standard_error"] is None else f" ± {gap['standard_error']:.4f} over images"
    seeds = f"sd {gap['seed_sd']:.4f} over {1 + len(gap['other_seeds'])} sampling seeds"
    return f"{text}; Fréchet distance {gap['value']:.4f}{error}, {seeds}; noise floor (real images) {gap['noise_floor']:.4f}."


def _measure_table(results: Results, rows: Sequence[Row], stage: str, measure: str) -> list[dict[str, str]]:
    table = []
    for row in rows:
        if (row["stage"], row["measure"], row["against"]) != (stage, measure, BACKBONE):
            continue
        line = {"variant": row["variant"], **facts(results.cells(stage, row["variant"])), "mean ± sd": spread(row)}
        errors = {"standard error": row["standard_error"], "over images": row["image_error"]}
        line |= {name: shown(error, measure, "") for name, error in errors.items()}
        line |= {"p (Holm)": p_shown(row["p_corrected"]), "verdict": row["verdict"]}
        for other in rows:
            same = (other["stage"], other["measure"], other["variant"]) == (stage, measure, row["variant"])
            if same and other["against"] != BACKBONE:
                p = p_shown(other["p_corrected"])
                line[f"against {other['against']}"] = f"{spread(other)}, p {p}: {other['verdict']}"
        table.append(line)
    return table


def _band_table(bands: Sequence[Row]) -> list[dict[str, str]]:
    table: dict[str, dict[str, str]] = {}
    for row in bands:
        line = table.setdefault(row["variant"], {"variant": row["variant"]})
        line[f"t {row['from']}-{row['to']}"] = spread({**row, "measure": "paired_loss"})
    return list(table.values())


def _table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Rows as a Markdown table; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]
