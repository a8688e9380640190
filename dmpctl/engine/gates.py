"""`dmpctl inspect-gates`: which prompts speak at which timestep, for every site. Needs no block and no image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmpctl.engine.cache import cache_dir
from dmpctl.engine.patched import load_result, outputs_of
from dmpctl.errors import UsageError
from dmpctl.files import make_folder, write_atomic, write_json
from dmpctl.methods.dmp import DmpPatch
from dmpctl.settings.model import Settings
from dmpctl.types import Progress, Report

SCHEMA_VERSION = 1
DEAD = 0.1  # a prompt is dead if its mean weight is below this share of 1 / N
UNIFORM = 0.02  # mean distance from uniform, in units of 1 / N, below which a gate has learned nothing
COLLAPSED = 2.0  # effective number of prompts below which a gate has collapsed


@dataclass(frozen=True)
class SiteGates:
    """Figures of one site over its timesteps. `effective` is exp(entropy), N for a uniform gate, 1 for one prompt.

    `distance` is the mean absolute distance from uniform in units of 1 / N; `over_time` how far a prompt's weight moves
    along the timesteps, standard deviation in the same units.
    """

    site: int
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
        effective=float(entropy.exp().mean()),
        entropy=float(entropy.mean()),
        top1=float(gates.max(-1).values.mean()),
        dead=int((gates.mean(0) < DEAD / n).sum()),
        cosine_to_uniform=float(cosine.mean()),
        distance=float((gates * n - 1).abs().mean()),
        over_time=float((gates * n).std(0).mean()),
        prompt_norm=float(prompts.norm(dim=-1).mean()),
    )


def judge(sites: Sequence[SiteGates], prompts: int) -> list[str]:
    """What the figures say, in sentences."""
    lines = []
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


@torch.inference_mode()
def inspect(settings: Settings, run: Path, progress: Progress) -> Report:
    """Table, JSON and heat map of a run's gates, written into its gates/ (or --out)."""
    run = run.expanduser().absolute()
    model = load_result(run, settings.result.result_weights)
    patch, spec = model.patch, model.backbone.spec
    if not isinstance(patch, DmpPatch):
        raise UsageError(f"{run} has no gates: it holds no patch of --method dmp", "name a run of dmpctl patch")
    steps = [int(t) for t in torch.linspace(0, spec.schedule.steps - 1, settings.gates.timesteps).round()]
    t = torch.tensor(steps)
    gates = torch.stack([_gates(model.backbone.model, patch, t, label) for label in _labels(spec.num_classes)]).mean(0)
    sites = [site_gates(site, gates[i], patch.prompts_of(i)) for i, site in enumerate(patch.shape.blocks)]
    lines = judge(sites, gates.shape[-1])
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "run": str(run),
        "step": model.step,
        "prompts": gates.shape[-1],
        "timesteps": steps,
        "sites": [vars(s) for s in sites],
        "judgement": list(lines),
        "gates": gates.tolist(),
    }
    if settings.console.dry_run:
        return Report(data, _table(sites), (*lines, "dry run: nothing was written"))
    folder = make_folder((settings.images.out or outputs_of(run) / "gates").absolute())
    target = folder / f"{model.step:07d}.json"
    write_json(target, data)
    lines.append(f"figures: {target}")
    if settings.gates.plot:
        picture = target.with_suffix(".png")
        write_atomic(picture, heat_map(gates, steps, patch.shape.blocks))
        lines.append(f"look at: {picture}")
    return Report(data, _table(sites), tuple(lines))


def _labels(num_classes: int) -> list[int | None]:
    """Every class, over which gates are averaged; [None] for an unconditional backbone."""
    return list(range(num_classes)) if num_classes else [None]


def _gates(backbone: Any, patch: Any, t: Tensor, label: int | None) -> Tensor:
    """Gates [L, S, N] at timesteps t [S] for one class."""
    cond = None if label is None else torch.full_like(t, label)
    c = backbone.embed_time(t) if patch.time_only else backbone.embed(t, cond)
    gates: Tensor = patch.route(c).gates
    return gates


def _table(sites: Sequence[SiteGates]) -> tuple[dict[str, str], ...]:
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


def heat_map(gates: Tensor, steps: Sequence[int], blocks: Sequence[int]) -> bytes:
    """PNG: one panel per site, prompts down, timesteps across, weight in units of 1 / N (1 is uniform)."""
    import io
    import os

    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))  # its font list, else written elsewhere in the home
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sites, _, prompts = gates.shape
    columns = min(4, sites)
    rows = -(-sites // columns)
    figure = Figure(figsize=(3.2 * columns + 0.8, 2.6 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    scaled = gates * prompts
    spread = max(0.05, float((scaled - 1).abs().max()))
    for site, axis in enumerate(axes.flat):
        if site >= sites:
            axis.set_visible(False)
            continue
        extent = (steps[0], steps[-1], prompts - 0.5, -0.5)
        axis.imshow(
            scaled[site].T.numpy(),
            aspect="auto",
            extent=extent,
            cmap="RdBu_r",
            vmin=1 - spread,
            vmax=1 + spread,
            interpolation="nearest",
        )
        axis.set_title(f"site {blocks[site]}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("timestep", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("prompt", fontsize=8)
    figure.colorbar(axes.flat[0].images[0], ax=axes, label="gate weight (uniform = 1)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
