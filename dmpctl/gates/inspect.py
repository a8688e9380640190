"""`dmpctl inspect-gates`: which prompts speak at which timestep, for every site. Needs no block and no image, unless asked to."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmpctl.comparing.paired_loss import clean_images
from dmpctl.diffusion.schedule import schedule_of
from dmpctl.errors import MissingError, UsageError
from dmpctl.files import make_folder, write_atomic, write_json
from dmpctl.gates.figures import GatesSeen, gates_seen, judge, sites_table, timestep_similarity, timesteps_seen
from dmpctl.gates.plots import heat_map, similarity_map
from dmpctl.models.patch_files import load_result, outputs_of
from dmpctl.models.patched import Patched, conditioning_of
from dmpctl.models.sources import open_data
from dmpctl.pages.page import render
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


@dataclass(frozen=True)
class GatesPage:
    """All that pages/gates.html.j2 shows: sentences, a table of the sites, and two pictures (PNG)."""

    title: str
    step: int
    judgement: Sequence[str]
    rows: Sequence[Mapping[str, str]]
    weights: bytes
    similarity: bytes


@dataclass(frozen=True)
class EditSize:
    """|edit| / |tokens| at one site: its mean, and its value at each timestep."""

    mean: float
    by_timestep: list[float]


@dataclass(frozen=True)
class EditSizes:
    """Sizes of the edits of each site (its number as JSON has it), measured on so many images."""

    timesteps: list[int]
    images: int
    sites: dict[str, EditSize]


def inspect(settings: Settings, run: Path, progress: Progress) -> Report:
    """Write table, JSON, pictures and a page of a run's gates into its gates/ (or --out).

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
    seen = gates_seen(model, settings, progress)
    if not seen.blocks:
        raise UsageError(f"{run} has no gates: it holds no patch of --method dmp", "name a run of dmpctl patch")
    sites, place = seen.figures, owner or outputs_of(run)
    lines, rows = judge(sites), sites_table(sites)
    data: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "run": str(place),
        "step": model.step,
        "timesteps": seen.timesteps,
        "sites": [vars(site) for site in sites],
        "judgement": list(lines),
        "gates": [one.gates.tolist() for one in seen.blocks],
        "timestep_similarity": [timestep_similarity(one.gates).tolist() for one in seen.blocks],
    }
    if options.with_backbone:
        edit = edit_sizes(model, settings, progress)
        data["edit"] = asdict(edit)
        for row, site in zip(rows, sites, strict=True):
            row["edit / tokens"] = f"{edit.sites[str(site.site)].mean:.2%}"
    if options.compare_with is not None:
        other = load_result(options.compare_with, settings.result.result_weights)
        found = _beside(seen, gates_seen(other, settings, progress), options.compare_with)
        data["compared"] = {"run": str(outputs_of(options.compare_with)), "step": other.step, "sites": found}
        for row, theirs in zip(rows, found, strict=True):
            row["other: effective"] = f"{theirs['effective']:.2f}"
            row["difference of weights"] = f"{theirs['distance']:.3f}"
    if settings.console.dry_run:
        return Report(data, tuple(rows), (*lines, "dry run: nothing was written"))
    target = make_folder((settings.images.out or place / "gates").absolute()) / f"{model.step:07d}.json"
    write_json(target, data)
    written = [f"figures: {target}"]
    if options.csv:
        write_atomic(target.with_suffix(".csv"), _csv(seen))
        written.append(f"every weight: {target.with_suffix('.csv')}")
    if options.plot:
        page = GatesPage(f"Gates of {place.name}", model.step, lines, rows, heat_map(seen), similarity_map(seen))
        write_atomic(target.with_suffix(".png"), page.weights)
        write_atomic(target.with_name(f"{target.stem}-timesteps.png"), page.similarity)
        write_atomic(target.with_suffix(".html"), render("gates", page))
        written.append(f"look at: {target.with_suffix('.html')} and {target.with_suffix('.png').name}")
    return Report(data, tuple(rows), (*lines, *written))


def _csv(seen: GatesSeen) -> bytes:
    """site, timestep, prompt, weight: one line for each."""
    lines = ["site,timestep,prompt,weight"]
    for one in seen.blocks:
        for t, weights in zip(seen.timesteps, one.gates.tolist(), strict=True):
            lines += [f"{one.block},{t},{prompt},{weight:.8g}" for prompt, weight in enumerate(weights)]
    return "\n".join([*lines, ""]).encode()


def _beside(seen: GatesSeen, theirs: GatesSeen, other: Path) -> list[dict[str, float]]:
    """Figures of the gates of the run `other`, `distance`: from these weights, mean over timesteps and prompts in 1 / N."""
    if [(one.block, one.gates.shape) for one in theirs.blocks] != [(one.block, one.gates.shape) for one in seen.blocks]:
        raise UsageError(
            f"the gates of {other} are of other sites or sizes", "compare runs on one backbone, with one shape of patch"
        )
    gaps = [one.gates - mine.gates for mine, one in zip(seen.blocks, theirs.blocks, strict=True)]
    distances = [float(gap.abs().mean() * gap.shape[-1]) for gap in gaps]
    return [{**vars(site), "distance": distance} for site, distance in zip(theirs.figures, distances, strict=True)]


@torch.no_grad()
def edit_sizes(model: Patched, settings: Settings, progress: Progress) -> EditSizes:
    """Returns the ratio of the norms of an edit and of the tokens it enters, per site and timestep, mean over images.

    On images the patch was trained on, noised; runs the backbone. UsageError where nothing says which images.
    """
    model = model.with_codec(settings)
    spec = model.backbone.spec
    source = open_data(model.data or Data(), spec, model.codec, None, settings, progress)
    count = min(IMAGES, len(source))
    chosen = [i * len(source) // count for i in range(count)]
    x0, told, numbers = clean_images(model, source, chosen, torch.device("cpu"), progress)
    cond = None if told is None else told.of(numbers)
    schedule, steps = schedule_of(spec.schedule), timesteps_seen(model, 2 * LEVELS + 1)[1::2]
    ratios: dict[int, list[float]] = {}
    for t in steps:
        at = torch.full((len(x0),), t)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed_of(0, "edit", t)))
        for site, ratio in _ratios(model, schedule.add_noise(x0, at, noise), at, cond).items():
            ratios.setdefault(site, []).append(ratio)
    sites = {str(site): EditSize(sum(values) / len(values), values) for site, values in sorted(ratios.items())}
    return EditSizes(steps, count, sites)


def _ratios(model: Patched, x_t: Tensor, t: Tensor, cond: Tensor | None) -> dict[int, float]:
    """|edit| / |tokens| at each site that is edited by adding."""
    network, patch = model.backbone.model, model.patch
    if patch is None:
        return {}
    edit = patch.plan(conditioning_of(network, patch.time_only, t, cond)).edit
    found: dict[int, float] = {}

    def watched(site: int, tokens: Tensor) -> Tensor:
        edited = tokens if edit is None else edit(site, tokens)
        if edited is not tokens and edited.shape == tokens.shape:
            found[site] = float(((edited - tokens).flatten(1).norm(dim=1) / tokens.flatten(1).norm(dim=1)).mean())
        return edited

    network.denoise(x_t, t, cond, watched)
    return found
