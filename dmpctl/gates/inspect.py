"""`dmpctl inspect-gates`: which prompts speak at which timestep, for every site. Needs no block and no image, unless asked to."""

import csv
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmpctl.diffusion.schedule import schedule_of
from dmpctl.errors import MissingError, UsageError
from dmpctl.files import make_folder, write_atomic, write_json
from dmpctl.gates.figures import (
    Seen,
    SiteGates,
    gates_seen,
    judge,
    site_gates,
    sites_table,
    timestep_similarity,
    timesteps_seen,
)
from dmpctl.gates.plots import heat_map, similarity_map
from dmpctl.measuring.paired_loss import clean_images
from dmpctl.models.patch_files import load_result, outputs_of
from dmpctl.models.patched import Patched
from dmpctl.models.sources import open_data
from dmpctl.pages import page
from dmpctl.processes.stop import Stop
from dmpctl.rng import seed_of
from dmpctl.runs import checkpoint
from dmpctl.sampling.generate import refuse_label
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Data
from dmpctl.types import Progress, Report

SCHEMA_VERSION = 1
IMAGES, LEVELS = 16, 5  # on which, and at so many timesteps, the size of an edit is measured
POLL = 1.0  # sec between looks at a run in progress


def inspect(settings: Settings, run: Path, progress: Progress) -> Report:
    """Table, JSON, pictures and a page of a run's gates, written into its gates/ (or --out).

    Under --watch again for each new checkpoint, until the run has ended or a signal comes.
    """
    if settings.gates.watch is None:
        return _inspected(settings, run, progress)
    path, report, before = run.expanduser().absolute(), None, -1
    with Stop() as stop:
        while not stop.got:
            for newest in checkpoint.complete(path / "checkpoints")[-1:]:
                step = int(newest.name.removeprefix("step-"))
                if step > before:
                    report, before = _inspected(settings, newest, progress, path), step
                    progress.say(f"step {step}: {report.lines[0]}")
            if (path / "patch.json").is_file():
                break
            _wait(settings.gates.watch, stop)
    if report is None:
        raise MissingError(f"{path} has no checkpoint yet", "wait for its first, or name another run")
    return report


def _wait(seconds: float, stop: Stop) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not stop.got:
        time.sleep(min(POLL, left))


def _inspected(settings: Settings, run: Path, progress: Progress, owner: Path | None = None) -> Report:
    """One look at a run or a checkpoint; `owner`: the run that it is a checkpoint of, None: itself."""
    model, options = load_result(run, settings.result.result_weights), settings.gates
    refuse_label(settings.images.image_label, model.backbone.spec.num_classes)
    steps = timesteps_seen(model, options.timesteps)
    seen = gates_seen(model, torch.tensor(steps), settings, progress)
    if not seen:
        raise UsageError(f"{run} has no gates: it holds no patch of --method dmp", "name a run of dmpctl patch")
    sites = [site_gates(one.block, one.gates, one.prompts) for one in seen]
    lines, rows = judge(sites), [dict(row) for row in sites_table(sites)]
    place = owner or outputs_of(run)
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "run": str(place),
        "step": model.step,
        "timesteps": steps,
        "sites": [vars(s) for s in sites],
        "judgement": list(lines),
        "gates": [one.gates.tolist() for one in seen],
        "timestep_similarity": [timestep_similarity(one.gates).tolist() for one in seen],
    }
    if options.with_backbone:
        data["edit"] = edit_sizes(model, settings, progress)
        for row, site in zip(rows, sites, strict=True):
            row["edit / tokens"] = f"{data['edit']['sites'][str(site.site)]['mean']:.2%}"
    if options.compare_with is not None:
        data["compared"] = _compared(sites, seen, options.compare_with, settings, progress)
        for row, difference in zip(rows, data["compared"]["sites"], strict=True):
            row["other: effective"] = f"{difference['effective']:.2f}"
            row["difference of weights"] = f"{difference['distance']:.3f}"
    if settings.console.dry_run:
        return Report(data, tuple(rows), (*lines, "dry run: nothing was written"))
    folder = make_folder((settings.images.out or place / "gates").absolute())
    target = folder / f"{model.step:07d}.json"
    write_json(target, data)
    lines.append(f"figures: {target}")
    if options.csv:
        write_atomic(target.with_suffix(".csv"), _csv(seen, steps))
        lines.append(f"every weight: {target.with_suffix('.csv')}")
    if options.plot:
        pictures = {"": heat_map(seen, steps), "-timesteps": similarity_map(seen, steps)}
        for name, picture in pictures.items():
            write_atomic(folder / f"{model.step:07d}{name}.png", picture)
        write_atomic(target.with_suffix(".html"), _page(data, rows, list(pictures.values())))
        lines.append(f"look at: {target.with_suffix('.html')} and {target.with_suffix('.png').name}")
    return Report(data, tuple(rows), tuple(lines))


def _csv(seen: Sequence[Seen], steps: Sequence[int]) -> bytes:
    """site, timestep, prompt, weight: one line for each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("site", "timestep", "prompt", "weight"))
    for one in seen:
        for t, weights in zip(steps, one.gates.tolist(), strict=True):
            writer.writerows((one.block, t, prompt, f"{weight:.8g}") for prompt, weight in enumerate(weights))
    return text.getvalue().encode()


def _page(data: dict[str, Any], rows: Sequence[dict[str, str]], pictures: Sequence[bytes]) -> bytes:
    """The same as one HTML page that stands alone."""
    count = len(data["sites"])
    down = f"Heat maps of the gate weights of {count} blocks: prompts from top to bottom, timesteps from left to right"
    alike = f"Correlation of the gates of every two timesteps, for each of {count} blocks"
    parts = [
        page.heading(f"Gates of {Path(data['run']).name} at step {data['step']}", 1),
        *(page.paragraph(line, "verdict") for line in data["judgement"]),
        page.table(rows),
        page.heading("Which prompts speak at which timestep"),
        page.figure(pictures[0], "png", down, "Weight of each prompt in units of 1 / N: 1 is uniform"),
        page.heading("How alike the gates of two timesteps are"),
        page.figure(
            pictures[1], "png", alike, "Blocks of one colour along the diagonal are stages of denoising; 0 is a uniform gate"
        ),
    ]
    return page.page(f"Gates of {Path(data['run']).name}", parts)


def _compared(
    sites: Sequence[SiteGates], seen: Sequence[Seen], other: Path, settings: Settings, progress: Progress
) -> dict[str, Any]:
    """The same figures of another run, and how far its weights are from these, mean over timesteps and prompts in 1 / N."""
    model = load_result(other, settings.result.result_weights)
    theirs = gates_seen(model, torch.tensor(timesteps_seen(model, settings.gates.timesteps)), settings, progress)
    if [(one.block, one.gates.shape) for one in theirs] != [(one.block, one.gates.shape) for one in seen]:
        raise UsageError(
            f"the gates of {other} are of other sites or sizes", "compare runs on one backbone, with one shape of patch"
        )
    found = []
    for mine, one in zip(seen, theirs, strict=True):
        figures = vars(site_gates(one.block, one.gates, one.prompts))
        found.append({**figures, "distance": float((mine.gates - one.gates).abs().mean() * mine.gates.shape[-1])})
    return {"run": str(outputs_of(other)), "step": model.step, "sites": found}


@torch.no_grad()
def edit_sizes(model: Patched, settings: Settings, progress: Progress) -> dict[str, Any]:
    """How large an edit is beside the tokens it enters: the ratio of their norms, per site and timestep, mean over images.

    On images the patch was trained on, noised; runs the backbone. UsageError where nothing says which images.
    """
    model = model.with_codec(settings)
    spec = model.backbone.spec
    source = open_data(model.data or Data(), spec, model.codec, None, settings)
    count = min(IMAGES, len(source))
    x0, told, numbers = clean_images(model, source, count, torch.device("cpu"), progress)
    cond = None if told is None else told.of(numbers)
    schedule, steps = schedule_of(spec.schedule), timesteps_seen(model, 2 * LEVELS + 1)[1::2]
    ratios: dict[int, list[float]] = {}
    for t in steps:
        at = torch.full((len(x0),), t)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed_of(0, "edit", t)))
        for site, ratio in _ratios(model, schedule.add_noise(x0, at, noise), at, cond).items():
            ratios.setdefault(site, []).append(ratio)
    sites = {str(site): {"mean": sum(values) / len(values), "by_timestep": values} for site, values in sorted(ratios.items())}
    return {"timesteps": steps, "images": count, "sites": sites}


def _ratios(model: Patched, x_t: Tensor, t: Tensor, cond: Tensor | None) -> dict[int, float]:
    """|edit| / |tokens| at each site that is edited by adding."""
    network, patch = model.backbone.model, model.patch
    if patch is None:
        return {}
    edit = patch.plan(network.embed_time(t) if patch.time_only else network.embed(t, cond)).edit
    found: dict[int, float] = {}

    def watched(site: int, tokens: Tensor) -> Tensor:
        edited = tokens if edit is None else edit(site, tokens)
        if edited is not tokens and edited.shape == tokens.shape:
            found[site] = float(((edited - tokens).flatten(1).norm(dim=1) / tokens.flatten(1).norm(dim=1)).mean())
        return edited

    network.denoise(x_t, t, cond, watched)
    return found
