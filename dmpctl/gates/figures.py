"""What gates say, as figures: for each block over timesteps, averaged over classes or captions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmpctl.methods.by_size import gates_of
from dmpctl.models.patched import Patched
from dmpctl.settings.model import Settings
from dmpctl.types import Progress

DEAD = 0.1  # a prompt is dead if its mean weight is below this share of 1 / N
UNIFORM = 0.02  # mean distance from uniform, in units of 1 / N, below which a gate has learned nothing
CAPTIONS = 32  # over which gates that see the caption are averaged
COLLAPSED = 2.0  # effective number of prompts below which a gate has collapsed


@dataclass(frozen=True)
class Seen:
    """Gates [S, N] of one block over S timesteps, mean over classes or captions, and its prompts [N, D] (sets: [E, N·D])."""

    block: int
    gates: Tensor
    prompts: Tensor


@dataclass(frozen=True)
class SiteGates:
    """Figures of one site over its timesteps. `effective` is exp(entropy), N for a uniform gate, 1 for one prompt.

    `distance` is the mean absolute distance from uniform in units of 1 / N; `over_time` how far a prompt's weight moves
    along the timesteps, standard deviation in the same units. `prompt_similarity` is the mean cosine of two prompts (0 where
    they are zero).
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
    prompt_similarity: float


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
        prompt_similarity=mean_cosine(prompts),
    )


def mean_cosine(prompts: Tensor) -> float:
    """Mean cosine of two different rows of prompts [N, D]; 0 for a single one."""
    unit = torch.nn.functional.normalize(prompts.float(), dim=-1)
    n = len(unit)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1))) if n > 1 else 0.0


def timestep_similarity(gates: Tensor) -> Tensor:
    """Correlation [S, S] of the gates [S, N] of two timesteps over the prompts: the paper's picture of stages.

    0 where a gate is uniform, which correlates with nothing.
    """
    off = torch.nn.functional.normalize(gates - gates.mean(-1, keepdim=True), dim=-1)
    return off @ off.T


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
    """Conditions for timesteps t [S] that gates are averaged over: every class (or --label), or some captions.

    None where no gate sees any.
    """
    spec = model.backbone.spec
    if model.patch is None or model.patch.time_only or not (spec.num_classes or spec.text):
        yield None
    elif spec.text is None:
        wanted = settings.images.image_label
        yield from (torch.full_like(t, label) for label in (range(spec.num_classes) if wanted is None else [wanted]))
    else:
        prompts = model.with_text(settings).with_prompts(settings, CAPTIONS, progress).prompts
        if prompts is not None:  # it has an encoder
            yield from (prompts.captions.of(torch.full_like(t, number)) for number in range(len(prompts.captions)))


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
