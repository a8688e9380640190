"""The plot of a study: one panel per stage and measure, a dot per training seed, the zero line is the backbone."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from dmpctl.pages.page import drawing, to_png
from dmpctl.studies.results import Results, StageRecord
from dmpctl.studies.table import BACKBONE, LOSS_UNIT, MEASURES, StudyRow, select

# Okabe and Ito's palette, told apart by every kind of colour vision; the marker says the same.
STYLES = {"improved": ("#0072B2", "v"), "worse": ("#D55E00", "^")}
OTHER = ("#555555", "o")
WIDE = 10  # times the median of the means, beyond which the scale is linear about zero and logarithmic further out


def plot(results: Results, rows: Sequence[StudyRow]) -> bytes:
    """PNG. Differences from the backbone, left is better; a bar is the mean ± sd, grey is the backbone's sampling noise."""
    stages = list(results.stages)
    measures = list(dict.fromkeys(measure for stage in stages for measure in results.measures(stage)))
    heights = [0.9 + 0.32 * len(results.variants_at(stage)) for stage in stages]
    figure = drawing(1.6 + 4.2 * len(measures), 0.4 + sum(heights))
    axes = figure.subplots(len(stages), len(measures), squeeze=False, height_ratios=heights)
    for across, stage in zip(axes, stages, strict=True):
        for axis, measure in zip(across, measures, strict=True):
            _panel(axis, select(rows, stage=stage, measure=measure, against=BACKBONE), measure, results.stages[stage])
            axis.set_title(f"{stage}: {MEASURES[measure]}", fontsize=10)
        for axis in across[1:]:
            axis.set_yticklabels([])
    legend = "difference from the backbone, left is better · ▼ improved  ▲ worse  ● no significant change or no test"
    figure.supxlabel(legend + "\ngrey: the backbone's distance over sampling seeds, ± sd" * ("frechet" in measures), fontsize=9)
    return to_png(figure)


def _panel(axis: Any, rows: Sequence[StudyRow], measure: str, backbone: StageRecord) -> None:
    """Variants from top to bottom."""
    unit = LOSS_UNIT if measure == "paired_loss" else 1.0
    axis.axvline(0, color="black", linewidth=1, zorder=1)
    for place, row in enumerate(rows):
        colour, marker = STYLES.get(row.verdict, OTHER)
        values = [value / unit for value in row.differences.values()]
        axis.plot(values, [place + 0.18] * len(values), ".", color=colour, alpha=0.6, markersize=5, zorder=2)
        if row.mean is not None:
            error = None if row.sd is None else row.sd / unit
            style = {"fmt": marker, "color": colour, "markersize": 5, "capsize": 3, "zorder": 3}
            axis.errorbar(row.mean / unit, place - 0.1, xerr=error, **style)
    if measure == "frechet" and backbone.frechet is not None:
        limits, noise = axis.get_xlim(), backbone.frechet.seed_sd
        axis.axvspan(-noise, noise, color="#DDDDDD", zorder=0)
        axis.set_xlim(limits)  # the dots choose the scale, however wide the noise is
    means = [abs(row.mean) / unit for row in rows if row.mean]
    if means and max(means) > WIDE * median(means):  # one variant that does harm would squeeze all others into the zero line
        linear = 10 ** round(math.log10(2 * median(means)))  # a power of ten, so that a tick stands where the linear part ends
        axis.set_xscale("symlog", linthresh=linear)
    axis.set_yticks(range(len(rows)), [row.variant for row in rows], fontsize=9)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", color="#EEEEEE", zorder=0)
