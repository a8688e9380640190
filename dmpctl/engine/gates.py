"""`dmpctl inspect-gates`: which prompts speak at which timestep, for every site. Needs no block and no image."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmpctl.engine.cache import cache_dir
from dmpctl.engine.patched import Patched, load_result, outputs_of
from dmpctl.errors import UsageError
from dmpctl.files import make_folder, write_atomic, write_json
from dmpctl.methods.by_size import gates_of
from dmpctl.settings.model import Settings
from dmpctl.types import Progress, Report

SCHEMA_VERSION = 1
DEAD = 0.1  # a prompt is dead if its mean weight is below this share of 1 / N
UNIFORM = 0.02  # mean distance from uniform, in units of 1 / N, below which a gate has learned nothing
CAPTIONS = 32  # over which gates that see the caption are averaged
COLLAPSED = 2.0  # effective number of prompts below which a gate has collapsed


@dataclass(frozen=True)
class SiteGates:
    """Figures of one site over its timesteps. `effective` is exp(entropy), N for a uniform gate, 1 for one prompt.

    `distance` is the mean absolute distance from uniform in units of 1 / N; `over_time` how far a prompt's weight moves
    along the timesteps, standard deviation in the same units.
    """

    site: int
    prompts: int
    effective: float
    entropy: float
    top1: float
    dead: int
    cosine_to_uniform: float
    distance: float
    over_time: float
    prompt_norm: float


def site_gates(site: int, gates: Tensor, prompts: Tensor) -> SiteGates:
    """Figures of gates [S, N] over S timesteps and prompts [N, D]."""
    n = gates.shape[-1]
    entropy = torch.special.entr(gates).sum(-1)
    cosine = gates.sum(-1) / (gates.norm(dim=-1) * n**0.5)
    return SiteGates(
        site=site,
        prompts=n,
        effective=float(entropy.exp().mean()),
        entropy=float(entropy.mean()),
        top1=float(gates.max(-1).values.mean()),
        dead=int((gates.mean(0) < DEAD / n).sum()),
        cosine_to_uniform=float(cosine.mean()),
        distance=float((gates * n - 1).abs().mean()),
        over_time=float((gates * n).std(0).mean()),
        prompt_norm=float(prompts.norm(dim=-1).mean()),
    )


def judge(sites: Sequence[SiteGates]) -> list[str]:
    """What the figures say, in sentences."""
    lines: list[str] = []
    prompts = " or ".join(map(str, sorted({s.prompts for s in sites})))
    if all(s.distance < UNIFORM for s in sites):
        lines.append("uniform: the gate has not learned, every prompt has the same weight at every timestep")
    elif all(s.over_time < UNIFORM for s in sites):
        lines.append("the gate prefers some prompts, but the same ones at every timestep")
    else:
        lines.append(f"the gate follows the timestep: weights move by {max(s.over_time for s in sites):.2g} / {prompts} along it")
    if collapsed := [s.site for s in sites if s.effective < COLLAPSED]:
        lines.append(f"warning: collapsed at site {', '.join(map(str, collapsed))}: fewer than {COLLAPSED:g} prompts are in use")
    if dead := sum(s.dead for s in sites):
        lines.append(f"warning: {dead} dead prompts in all (mean weight under {DEAD:g} / {prompts})")
    return lines


@dataclass(frozen=True)
class Seen:
    """Gates [S, N] of one block over S timesteps, mean over classes or captions, and its prompts [N, D] (sets: [E, N·D])."""

    block: int
    gates: Tensor
    prompts: Tensor


def inspect(settings: Settings, run: Path, progress: Progress) -> Report:
    """Table, JSON and heat map of a run's gates, written into its gates/ (or --out)."""
    model = load_result(run, settings.result.result_weights)
    steps = timesteps_seen(model, settings.gates.timesteps)
    seen = gates_seen(model, torch.tensor(steps), settings, progress)
    if not seen:
        raise UsageError(f"{run} has no gates: it holds no patch of --method dmp", "name a run of dmpctl patch")
    sites = [site_gates(one.block, one.gates, one.prompts) for one in seen]
    lines = judge(sites)
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "run": str(outputs_of(run)),
        "step": model.step,
        "timesteps": steps,
        "sites": [vars(s) for s in sites],
        "judgement": list(lines),
        "gates": [one.gates.tolist() for one in seen],
    }
    if settings.console.dry_run:
        return Report(data, sites_table(sites), (*lines, "dry run: nothing was written"))
    folder = make_folder((settings.images.out or outputs_of(run) / "gates").absolute())
    target = folder / f"{model.step:07d}.json"
    write_json(target, data)
    lines.append(f"figures: {target}")
    if settings.gates.plot:
        picture = target.with_suffix(".png")
        write_atomic(picture, heat_map(seen, steps))
        lines.append(f"look at: {picture}")
    return Report(data, sites_table(sites), tuple(lines))


def timesteps_seen(model: Patched, count: int) -> list[int]:
    """`count` timesteps of its schedule, evenly spaced with both ends."""
    return [int(t) for t in torch.linspace(0, model.backbone.spec.schedule.steps - 1, count).round()]


def gates_seen(model: Patched, t: Tensor, settings: Settings, progress: Progress) -> list[Seen]:
    """What each block's gate says at timesteps t [S], by block; empty for a method without gates."""
    if model.patch is None:
        return []
    network, found = model.backbone.model, dict[int, Seen]()
    each = [
        gates_of(model.patch, network.embed_time(t) if model.patch.time_only else network.embed(t, cond))
        for cond in conditions_seen(model, t, settings, progress)
    ]
    for views in zip(*each, strict=True):  # one patch under every condition
        patch, mean = views[0][0], torch.stack([gates for _, gates in views]).mean(0)
        found |= {block: Seen(block, mean[i], patch.prompts_of(i)) for i, block in enumerate(patch.shape.blocks)}
    return [found[block] for block in sorted(found)]


def conditions_seen(model: Patched, t: Tensor, settings: Settings, progress: Progress) -> Iterator[Tensor | None]:
    """Conditions for timesteps t [S] that gates are averaged over: every class, or some captions; None where no gate sees any."""
    spec = model.backbone.spec
    if model.patch is None or model.patch.time_only or not (spec.num_classes or spec.text):
        yield None
    elif spec.text is None:
        yield from (torch.full_like(t, label) for label in range(spec.num_classes))
    else:
        prompts = model.with_text(settings).with_prompts(settings, CAPTIONS, progress).prompts
        captions = prompts.captions if prompts is not None else ()
        for number in range(len(captions)):
            yield prompts.captions.of(torch.full_like(t, number)) if prompts is not None else None


def sites_table(sites: Sequence[SiteGates]) -> tuple[dict[str, str], ...]:
    """The figures for people, one row for each site."""
    return tuple(
        {
            "site": str(s.site),
            "effective prompts": f"{s.effective:.2f}",
            "top-1 share": f"{s.top1:.3f}",
            "dead": str(s.dead),
            "distance from uniform": f"{s.distance:.3f}",
            "change over t": f"{s.over_time:.3f}",
            "prompt norm": f"{s.prompt_norm:.3f}",
        }
        for s in sites
    )


def heat_map(seen: Sequence[Seen], steps: Sequence[int]) -> bytes:
    """PNG: one panel per site, prompts down, timesteps across, weight in units of 1 / N (1 is uniform)."""
    import io
    import os

    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))  # its font list, else written elsewhere in the home
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sites = len(seen)
    columns = min(4, sites)
    rows = -(-sites // columns)
    figure = Figure(figsize=(3.2 * columns + 0.8, 2.6 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=len({len(one.gates[0]) for one in seen}) == 1)
    scaled = [one.gates * one.gates.shape[-1] for one in seen]
    spread = max(0.05, *(float((values - 1).abs().max()) for values in scaled))
    for site, axis in enumerate(axes.flat):
        if site >= sites:
            axis.set_visible(False)
            continue
        extent = (steps[0], steps[-1], scaled[site].shape[-1] - 0.5, -0.5)
        axis.imshow(
            scaled[site].T.numpy(),
            aspect="auto",
            extent=extent,
            cmap="RdBu_r",
            vmin=1 - spread,
            vmax=1 + spread,
            interpolation="nearest",
        )
        axis.set_title(f"site {seen[site].block}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("timestep", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("prompt", fontsize=8)
    figure.colorbar(axes.flat[0].images[0], ax=axes, label="gate weight (uniform = 1)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
