"""`dmpctl report`: settings, measurements and pictures of a run as one HTML page that can be sent to anybody.

Each function below fills one section of pages/report.html.j2.
"""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from dmpctl.comparing.before_after import BeforeAfter
from dmpctl.comparing.before_after import table as comparison_table
from dmpctl.errors import Damaged, DmpError
from dmpctl.files import make_folder, read_json, write_atomic
from dmpctl.gates.figures import gates_seen, judge, sites_table
from dmpctl.gates.plots import heat_map
from dmpctl.measuring.record import SCHEMA_VERSION as RECORDS
from dmpctl.measuring.record import sampling_words
from dmpctl.measuring.verdict import distance_words
from dmpctl.models.patch_files import load_result
from dmpctl.pages.page import drawing, render, to_svg
from dmpctl.runs.records import PatchRecord, PretrainedRecord, read_record
from dmpctl.runs.rundir import RunDir
from dmpctl.sampling.pictures import read_sheet
from dmpctl.settings.model import Settings
from dmpctl.types import Progress, Report
from dmpctl.words import plus_minus

CURVES = {  # of metrics.jsonl: what it is called on the page, and whether it is drawn on a logarithmic scale
    "loss": ("training loss", False),
    "importance": ("balance loss: importance", False),
    "load": ("balance loss: load", False),
    "grad_norm": ("norm of the gradient", True),
    "images_per_sec": ("images per second", False),
}
MOST_POINTS, GROUP = 2000, 16  # of a curve with many times as many, the lowest and highest of a group stand for it
SHEETS = 3  # contact sheets shown, the newest
SMALL = 600  # pixels: a picture narrower than this is enlarged without blur

Rows = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Picture:
    """A picture on the page; `alt` says in words what it shows. `pixels`: it is enlarged without blur."""

    data: bytes
    alt: str
    caption: str
    pixels: bool = False


@dataclass(frozen=True)
class GatesSection:
    """The gates of a patch: sentences, a heat map (PNG), and figures of each block."""

    judgement: Sequence[str]
    weights: bytes
    rows: Rows


@dataclass(frozen=True)
class RunPage:
    """All that report.html.j2 shows; what the run does not have is empty. `gates` str: why they cannot be shown here.

    `record` is patch.json or backbone.json, `sessions` are those of provenance.json, `settings` those of config.json.
    """

    name: str
    command: str
    record: PatchRecord | PretrainedRecord | None
    comparison: BeforeAfter | None
    sheets: Sequence[Picture]
    measurements: Rows
    curves: Sequence[Picture]
    gates: GatesSection | str | None
    again: str
    sessions: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Mapping[str, object]]

    @property
    def title(self) -> str:
        return f"{self.name}: dmpctl {self.command}"

    @property
    def compared(self) -> Rows:
        """Table of backbone, patch and their difference."""
        return () if self.comparison is None else comparison_table(self.comparison)

    @property
    def found(self) -> dict[str, object]:
        """Versions and facts of the last session."""
        versions: Mapping[str, str] = self.sessions[-1]["versions"]
        rest = {key: value for key, value in self.sessions[-1].items() if key not in ("argv", "versions")}
        return {f"{name} version": version for name, version in versions.items()} | rest


def report(settings: Settings, path: Path, progress: Progress) -> Report:
    """Write report.html into the run, or where --out says; what a run does not have is left out."""
    run = RunDir(path.expanduser())
    left_out = list[str]()
    content = render("report", page_of(run, settings, progress, left_out))
    out = (settings.images.out or run.path / "report.html").expanduser().absolute()
    data = {"run": str(run.path), "out": str(out), "bytes": len(content)}
    if settings.console.dry_run:
        return Report({"dry_run": True, **data}, (), ("dry run: nothing was written",))
    make_folder(out.parent)
    write_atomic(out, content)
    return Report(data, (), (*left_out, f"report: {out}"))


def page_of(run: RunDir, settings: Settings, progress: Progress, left_out: list[str]) -> RunPage:
    """Returns the page of a run; what is damaged and can be done without goes to `left_out`. MissingError if it is none."""
    config, record = run.config(), record_of(run.path)
    comparisons = sorted(run.path.glob("metrics/comparison-*.json"))
    sessions = _json(run.path / "provenance.json").get("sessions", [])
    return RunPage(
        name=run.path.name,
        command=config.command,
        record=record,
        comparison=BeforeAfter.model_validate(_json(comparisons[-1])) if comparisons else None,
        sheets=contact_sheets(run.path, left_out),
        measurements=measurements(run.path),
        curves=curves(_whole_lines(run, record, left_out)),
        gates=gates(run, settings, progress),
        again=shlex.join([Path(sessions[0]["argv"][0]).name, *sessions[0]["argv"][1:]]) if sessions else "",
        sessions=sessions,
        settings=config.settings,
    )


def record_of(run: Path) -> PatchRecord | PretrainedRecord | None:
    """Returns patch.json or backbone.json of a run, None before its training has ended."""
    if (run / "patch.json").is_file():
        return read_record(run / "patch.json", PatchRecord)
    return read_record(run / "backbone.json", PretrainedRecord) if (run / "backbone.json").is_file() else None


def _whole_lines(run: RunDir, record: PatchRecord | PretrainedRecord | None, left_out: list[str]) -> Iterator[dict[str, float]]:
    """The lines of the log that are what was written; which are not, and whether its end is missing, goes to `left_out`."""
    damaged, last, path = list[int](), 0.0, run.path / "metrics.jsonl"
    for line in run.metrics.read(damaged.append):
        last = line["step"]
        yield line
    if damaged:
        which = ", ".join(map(str, damaged[:3])) + (", ..." if len(damaged) > 3 else "")
        left_out.append(f"warning: lines {which} of {path} are damaged, and left out")
    if record is not None and last < record.step and path.is_file():
        left_out.append(f"warning: {path} is damaged: it ends at step {last:g} of {record.step}")


def contact_sheets(run: Path, left_out: list[str]) -> list[Picture]:
    """Returns the sheet of before and after, and the newest sheets of samples; damaged ones go to `left_out`."""
    alt = "Contact sheet: images of the backbone on the left, of the patched backbone on the right, from the same seeds"
    wanted = [(run / "before-after.png", alt, "Backbone and patch, same seeds")] if (run / "before-after.png").is_file() else []
    sheets = sorted(run.glob("samples/*/contact-sheet.png"), key=lambda sheet: sheet.stat().st_mtime_ns)[-SHEETS:]
    wanted += [(sheet, f"Contact sheet of samples {sheet.parent.name}", f"Samples {sheet.parent.name}") for sheet in sheets]
    found = []
    for path, words, caption in wanted:
        try:
            found.append(Picture(path.read_bytes(), words, caption, pixels=read_sheet(path).shape[2] < SMALL))
        except Damaged as error:
            left_out.append(f"warning: {error.message}, and left out")
    return found


def measurements(run: Path) -> list[dict[str, str]]:
    """Returns a row for each metric of each measurement of the run."""
    records = map(_json, sorted(run.glob("metrics/*.json")))
    return [
        {
            "metric": name,
            "value": _value(value),
            "against": record["reference"]["name"],
            "protocol": record["protocol"]["name"],
            "sampling": sampling_words(record.get("sampling")),
            "measured": str(record.get("measured", ""))[:16].replace("T", " "),
        }
        for record in records
        if "reference" in record and "metrics" in record
        for name, value in record["metrics"].items()
    ]


def _value(value: Mapping[str, Any]) -> str:
    """The numbers of one metric: its value and standard error, or all of them by name."""
    if "value" not in value:
        return ", ".join(f"{key} {number:.4f}" for key, number in value.items() if isinstance(number, float))
    if value.get("debiased") is not None:
        return distance_words(value["value"], value["debiased"], value["standard_error"])
    return f"{value['value']:.4f}{plus_minus(value.get('standard_error', value.get('deviation')), '.2g')}"


def curves(lines: Iterable[Mapping[str, float]]) -> list[Picture]:
    """Returns a curve over the steps for each of CURVES that the lines of metrics.jsonl have, which are read once."""
    found, points = [], {key: list[tuple[float, float]]() for key in CURVES}
    for line in lines:
        for key, (_, log) in CURVES.items():
            if key in line and not (log and line[key] <= 0):
                points[key].append((line[key], line["step"]))
                if len(points[key]) > GROUP * MOST_POINTS:
                    points[key] = thinned(points[key])
    for key, (name, _) in CURVES.items():
        if points[key]:
            y, x = zip(*points[key], strict=True)
            ends = f"{y[0]:.4g} at first, {y[-1]:.4g} at last, between {min(y):.4g} and {max(y):.4g}"
            alt = f"{name} from step {x[0]} to {x[-1]}: {ends}"
            found.append(Picture(curve(x, y, name, CURVES[key][1]), alt, f"{name}: {y[-1]:.4g} at step {x[-1]}"))
    return found


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns, of each GROUP of (value, step) in a row, the lowest and the highest; the first and the last one stay."""
    inner = points[1:-1]
    groups = (inner[start : start + GROUP] for start in range(0, len(inner), GROUP))
    kept = [point for group in groups for point in sorted({min(group), max(group)}, key=itemgetter(1))]
    return [points[0], *kept, points[-1]]


def curve(x: Sequence[float], y: Sequence[float], name: str, log: bool = False) -> bytes:
    """Returns a line as SVG: `name` against the step."""
    figure = drawing(4.2, 2.5)
    from matplotlib import rc_context  # after `drawing`, which says where matplotlib may write

    with rc_context({"font.size": 9}):
        axis = figure.subplots()
        axis.plot(x, y, linewidth=1.3, color="#1f5fa8", marker="o" if len(x) < 3 else None, markersize=3)
        axis.set_xlabel("step")
        axis.set_ylabel(name)
        if log:
            axis.set_yscale("log")
        axis.grid(alpha=0.25)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        return to_svg(figure, name)


def gates(run: RunDir, settings: Settings, progress: Progress) -> GatesSection | str | None:
    """Returns the gates of a finished patch, None where it has none; or why they cannot be shown: its backbone is elsewhere."""
    if not (run.path / "patch.json").is_file():
        return None
    try:
        seen = gates_seen(load_result(run.path), settings, progress)
    except DmpError as error:
        return str(error)
    return GatesSection(judge(seen.figures), heat_map(seen), sites_table(seen.figures)) if seen.blocks else None


def _json(path: Path) -> dict[str, Any]:
    """A JSON file of the run; empty where there is none."""
    return read_json(path, RECORDS) if path.is_file() else {}
