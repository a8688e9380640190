"""`dmpctl report`: what a run was asked, did and measured, as one HTML page that can be sent to anybody."""

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dmpctl.errors import DmpError, MissingError
from dmpctl.files import make_folder, read_json, write_atomic
from dmpctl.gates.figures import gates_seen, judge, site_gates, sites_table, timesteps_seen
from dmpctl.gates.plots import heat_map
from dmpctl.measuring.before_after import table as comparison_table
from dmpctl.measuring.record import sampling_words
from dmpctl.models.patch_files import added_words, load_result
from dmpctl.pages import page
from dmpctl.runs.rundir import RunDir
from dmpctl.settings.model import Settings
from dmpctl.store.cache import cache_dir
from dmpctl.types import Progress, Report

CURVES = {  # of metrics.jsonl: what it is called on the page, and whether it is drawn on a logarithmic scale
    "loss": ("training loss", False),
    "importance": ("balance loss: importance", False),
    "load": ("balance loss: load", False),
    "grad_norm": ("norm of the gradient", True),
    "images_per_sec": ("images per second", False),
}
SHEETS = 3  # contact sheets shown, the newest
SMALL = 600  # pixels: a picture narrower than this is enlarged without blur


def report(settings: Settings, path: Path, progress: Progress) -> Report:
    """Write report.html into the run, or where --out says; what a run does not have is left out."""
    run = RunDir(path.expanduser())
    config = run.config()
    out = (settings.images.out or run.path / "report.html").expanduser().absolute()
    content = page.page(f"{run.path.name}: dmpctl {config['command']}", _parts(run, config, settings, progress))
    data = {"run": str(run.path), "out": str(out), "bytes": len(content)}
    if settings.console.dry_run:
        return Report({"dry_run": True, **data}, (), ("dry run: nothing was written",))
    make_folder(out.parent)
    write_atomic(out, content)
    return Report(data, (), (f"report: {out}",))


def _parts(run: RunDir, config: Mapping[str, Any], settings: Settings, progress: Progress) -> Iterator[str]:
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))
    about = _json(run.path / "patch.json") or _json(run.path / "backbone.json") or {}
    provenance = _json(run.path / "provenance.json") or {"sessions": []}
    yield page.heading(run.path.name, 1)
    yield page.paragraph(_what(config, about), "soft")
    comparison = _newest(run.path / "metrics", "comparison-*.json")
    if comparison is not None:
        if comparison["difference"]:
            yield page.paragraph(f"Fréchet distance: {comparison['verdict']}", "verdict")
        yield page.paragraph(f"Denoising loss: {comparison['paired_loss_verdict']}", "verdict")
        yield page.heading("Patch against backbone, on the same seeds")
        yield page.table(comparison_table(comparison))
    yield from _pictures(run.path)
    yield from _measurements(run.path)
    yield from _curves(run)
    yield from _gates(run, settings, progress)
    yield from _origin(config, about, provenance)


def _what(config: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """One line on what this run is."""
    if "method" in about:
        backbone = about["backbone"]
        return (
            f"A patch ({about['method']['method']}) on {backbone['base']} ({backbone['parameters']:,} parameters), trained on "
            f"{about['data']['name']} to step {about['step']}; it adds {added_words(about)}."
        )
    step = f", at step {about['step']}" if "step" in about else ", unfinished"
    return f"A run of dmpctl {config['command']}{step}."


def _pictures(path: Path) -> Iterator[str]:
    shown = []
    if (path / "before-after.png").is_file():
        alt = "Contact sheet: images of the backbone on the left, of the patched backbone on the right, from the same seeds"
        shown.append(_picture(path / "before-after.png", alt, "Backbone and patch, same seeds"))
    sheets = sorted(path.glob("samples/*/contact-sheet.png"), key=lambda sheet: sheet.stat().st_mtime_ns)[-SHEETS:]
    shown += [
        _picture(sheet, f"Contact sheet of samples {sheet.parent.name}", f"Samples {sheet.parent.name}") for sheet in sheets
    ]
    if shown:
        yield page.heading("Images")
        yield page.grid(shown)


def _picture(path: Path, alt: str, caption: str) -> str:
    from PIL import Image

    with Image.open(path) as image:
        small = image.width < SMALL
    return page.figure(path.read_bytes(), "png", alt, caption, pixels=small)


def _measurements(path: Path) -> Iterator[str]:
    rows = []
    for file in sorted(path.glob("metrics/*.json")):
        record = _json(file)
        if record is None or "reference" not in record or "metrics" not in record:
            continue
        for name, value in record["metrics"].items():
            rows.append(
                {
                    "metric": name,
                    "value": _value(value),
                    "against": record["reference"]["name"],
                    "protocol": record["protocol"]["name"],
                    "sampling": sampling_words(record.get("sampling")),
                    "measured": str(record.get("measured", ""))[:16].replace("T", " "),
                }
            )
    if rows:
        yield page.heading("Measurements")
        yield page.table(rows)


def _value(value: Mapping[str, Any]) -> str:
    """The numbers of one metric: its value and standard error, or all of them by name."""
    if "value" not in value:
        return ", ".join(f"{key} {number:.4f}" for key, number in value.items() if isinstance(number, float))
    error = value.get("standard_error", value.get("deviation"))
    return f"{value['value']:.4f}" + ("" if error is None else f" ± {error:.2g}")


def _curves(run: RunDir) -> Iterator[str]:
    lines = run.metrics()
    drawn = []
    for key, (name, log) in CURVES.items():
        found = [(line["step"], line[key]) for line in lines if key in line and not (log and line[key] <= 0)]
        if found:
            x, y = zip(*found, strict=True)
            ends = f"{y[0]:.4g} at first, {y[-1]:.4g} at last, between {min(y):.4g} and {max(y):.4g}"
            alt = f"{name} from step {x[0]} to {x[-1]}: {ends}"
            drawn.append(page.figure(page.curve(x, y, name, log), "svg+xml", alt, f"{name}: {y[-1]:.4g} at step {x[-1]}"))
    if drawn:
        yield page.heading("Training")
        yield page.grid(drawn)


def _gates(run: RunDir, settings: Settings, progress: Progress) -> Iterator[str]:
    """Gates of a finished patch that has some. What cannot be looked at here (its backbone is elsewhere) is said."""
    if not (run.path / "patch.json").is_file():
        return
    try:
        model = load_result(run.path)
        steps = timesteps_seen(model, settings.gates.timesteps)
        seen = gates_seen(model, torch.tensor(steps), settings, progress)
    except DmpError as error:
        yield page.heading("Gates")
        yield page.paragraph(f"They cannot be shown here: {error}", "soft")
        return
    if not seen:
        return
    sites = [site_gates(one.block, one.gates, one.prompts) for one in seen]
    yield page.heading("Gates")
    for line in judge(sites):
        yield page.paragraph(line)
    alt = f"Heat maps of the gate weights of {len(seen)} blocks: prompts from top to bottom, timesteps from left to right"
    yield page.figure(heat_map(seen, steps), "png", alt, "Weight of each prompt in units of 1 / N: 1 is uniform")
    yield page.hidden("Figures of each block", page.table(sites_table(sites)))


def _origin(config: Mapping[str, Any], about: Mapping[str, Any], provenance: Mapping[str, Any]) -> Iterator[str]:
    sessions = provenance["sessions"]
    yield page.heading("How to make it again")
    if sessions:
        yield page.command(shlex.join([Path(sessions[0]["argv"][0]).name, *sessions[0]["argv"][1:]]))
        if len(sessions) > 1:
            yield page.paragraph(f"It was begun {sessions[0]['at']} and gone on with {len(sessions) - 1} times.", "soft")
        last = {key: value for key, value in sessions[-1].items() if key not in ("argv", "versions")}
        yield page.pairs({**{f"{name} version": version for name, version in sessions[-1]["versions"].items()}, **last})
    if about.get("sha256"):
        yield page.pairs(
            {"sha256 of the patch": about["sha256"], "sha256 of the backbone": about.get("backbone", {}).get("sha256", "")}
        )
    for section, values in config["settings"].items():
        yield page.hidden(f"Settings: {section}", page.pairs({key: json.dumps(value) for key, value in values.items()}))


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON file of the run; None where there is none."""
    try:
        return read_json(path)
    except MissingError:
        return None


def _newest(folder: Path, pattern: str) -> dict[str, Any] | None:
    found = sorted(folder.glob(pattern))
    return _json(found[-1]) if found else None
