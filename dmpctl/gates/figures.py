"""Figures of gates: for each block over timesteps, averaged over classes or captions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dmpctl.methods.by_size import gates_of
from dmpctl.models.patched import Patched, conditioning_of
from dmpctl.settings.model import Settings
from dmpctl.types import Progress

DEAD = 0.1  # a prompt is dead if its mean weight is below this share of 1 / N
UNIFORM = 0.02  # mean distance from uniform, in units of 1 / N, below which a gate has learned nothing
CAPTIONS = 32  # over which gates that see the caption are averaged
COLLAPSED = 2.0  # effective number of prompts below which a gate has collapsed


@dataclass(frozen=True)
class SeenGate:
    """Gates [S, N] of one block over S timesteps, mean over classes or captions, and its prompts [N, D] (sets: [E, N·D])."""

    block: int
    gates: Tensor
    prompts: Tensor


@dataclass(frozen=True)
class GateFigures:
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

    @classmethod
    def of(cls, seen: SeenGate) -> Self:
        """Returns the figures of the gate of one block."""
        gates, n = seen.gates, seen.gates.shape[-1]
        entropy = torch.special.entr(gates).sum(-1)
        cosine = gates.sum(-1) / (gates.norm(dim=-1) * n**0.5)
        return cls(
            site=seen.block,
            prompts=n,
            effective=float(entropy.exp().mean()),
            entropy=float(entropy.mean()),
            top1=float(gates.max(-1).values.mean()),
            dead=int((gates.mean(0) < DEAD / n).sum()),
            cosine_to_uniform=float(cosine.mean()),
            distance=float((gates * n - 1).abs().mean()),
            over_time=float((gates * n).std(0).mean()),
            prompt_norm=float(seen.prompts.norm(dim=-1).mean()),
            prompt_similarity=mean_cosine(seen.prompts),
        )


@dataclass(frozen=True)
class GatesSeen:
    """The gates of a model at `timesteps`, by block; no blocks: its method has no gates."""

    timesteps: list[int]
    blocks: list[SeenGate]

    @property
    def figures(self) -> list[GateFigures]:
        """Figures of each block."""
        return [GateFigures.of(one) for one in self.blocks]


def mean_cosine(prompts: Tensor) -> float:
    """Returns the mean cosine of two different rows of prompts [N, D]; 0 for a single one."""
    unit = torch.nn.functional.normalize(prompts.float(), dim=-1)
    n = len(unit)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1))) if n > 1 else 0.0


def timestep_similarity(gates: Tensor) -> Tensor:
    """Returns the correlation [S, S] of the gates [S, N] of two timesteps over the prompts: the paper's picture of stages.

    0 where a gate is uniform, which correlates with nothing.
    """
    off = torch.nn.functional.normalize(gates - gates.mean(-1, keepdim=True), dim=-1)
    return off @ off.T


def judge(sites: Sequence[GateFigures]) -> list[str]:
    """Returns the conclusions from the figures, in sentences."""
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
    """Returns `count` timesteps of its schedule, evenly spaced with both ends."""
    return [int(t) for t in torch.linspace(0, model.backbone.spec.schedule.steps - 1, count).round()]


def gates_seen(model: Patched, settings: Settings, progress: Progress) -> GatesSeen:
    """Returns the gates of each block at --timesteps evenly spaced timesteps, averaged over `conditions_seen`."""
    steps = timesteps_seen(model, settings.gates.timesteps)
    if model.patch is None:
        return GatesSeen(steps, [])
    network, t, found = model.backbone.model, torch.tensor(steps), dict[int, SeenGate]()
    each = [
        gates_of(model.patch, conditioning_of(network, model.patch.time_only, t, cond))
        for cond in conditions_seen(model, t, settings, progress)
    ]
    for views in zip(*each, strict=True):  # one patch under every condition
        patch, mean = views[0][0], torch.stack([gates for _, gates in views]).mean(0)
        found |= {block: SeenGate(block, mean[i], patch.prompts_of(i)) for i, block in enumerate(patch.shape.blocks)}
    return GatesSeen(steps, [found[block] for block in sorted(found)])


def conditions_seen(model: Patched, t: Tensor, settings: Settings, progress: Progress) -> Iterator[Tensor | None]:
    """Yields the conditions for timesteps t [S] that gates are averaged over: every class (or --label), or some captions.

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


def sites_table(sites: Sequence[GateFigures]) -> list[dict[str, str]]:
    """Returns the figures for people, one row for each site."""
    return [
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
    ]
