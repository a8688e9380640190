"""One method on a backbone whose sites differ in size, such as a U-Net: a patch for each size, that act as one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmpctl.errors import UsageError
from dmpctl.methods.dmp import DmpPatch
from dmpctl.methods.prompt_tuning import PromptPatch
from dmpctl.methods.prompts import patched_blocks
from dmpctl.settings.methods import Prompts
from dmpctl.types import BackboneSpec, Edit, Plan, Routing, Routings, Site

OneSize = DmpPatch | PromptPatch


def blocks_by_size(spec: BackboneSpec, settings: Prompts) -> list[tuple[int, ...]]:
    """The patched blocks, those of one size together, in the order in which the sizes are first met.

    UsageError where there are several sizes and the settings are for one.
    """
    groups: dict[Site, list[int]] = {}
    for block in patched_blocks(settings, len(spec.sites)):
        groups.setdefault(spec.sites[block], []).append(block)
    if len(groups) > 1 and settings.position == "prepend":
        raise UsageError("--position prepend needs sites of one size, this backbone has several", "use --position add")
    return [tuple(blocks) for blocks in groups.values()]


class PatchBySize(nn.Module):
    """Patches of blocks that do not overlap, in `groups`; what one does for its blocks, this does for all."""

    def __init__(self, groups: Sequence[OneSize]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(groups)
        self._group_of = {block: number for number, group in enumerate(groups) for block in group.shape.blocks}

    @property
    def each(self) -> list[OneSize]:
        """The patches, one for each size."""
        return list(self.groups)  # type: ignore[arg-type]

    @property
    def time_only(self) -> bool:
        """As the patches have it, which are of one method."""
        return self.each[0].time_only

    @property
    def added(self) -> int:
        """What all of them add."""
        return sum(group.added for group in self.each)

    def merged(self) -> None:
        """None: no weight of the backbone changes."""

    def noise_shape(self) -> tuple[int, ...] | None:
        """One sample's gate noise for all of them, laid end to end; None where they draw none."""
        counts = self._noise_counts()
        return (sum(counts),) if counts else None

    def _noise_counts(self) -> list[int]:
        shapes = [group.noise_shape() for group in self.each]
        return [shape[0] * shape[1] for shape in shapes if shape is not None]

    def forward(self, c: Tensor, noise: Tensor | None = None) -> Plan:
        """`plan`, so that the module can be wrapped for many processes."""
        return self.plan(c, noise)

    def plan(self, c: Tensor, noise: Tensor | None = None) -> Plan:
        """Edit of all patched blocks, and the routing of each patch; noise [B, n] (`noise_shape`) in training only."""
        parts: Sequence[Tensor | None] = [None] * len(self.each)
        if noise is not None:
            shapes = [group.noise_shape() or () for group in self.each]
            pieces = torch.split(noise, self._noise_counts(), dim=1)
            parts = [piece.view(len(noise), *shape) for piece, shape in zip(pieces, shapes, strict=True)]
        plans = [group.plan(c, part) for group, part in zip(self.each, parts, strict=True)]
        routings = tuple(plan.routing for plan in plans if isinstance(plan.routing, Routing))
        return Plan(self._edit([plan.edit for plan in plans]), routings or None)

    def _edit(self, edits: Sequence[Edit | None]) -> Edit:
        def edit(site: int, tokens: Tensor) -> Tensor:
            number = self._group_of.get(site)
            own = None if number is None else edits[number]
            return tokens if own is None else own(site, tokens)

        return edit

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameters of one kind together."""
        found: dict[str, dict[str, Any]] = {}
        for group in self.each:
            for own in group.param_groups():
                if own["name"] in found:
                    found[own["name"]]["params"] += own["params"]
                else:
                    found[own["name"]] = {**own, "params": list(own["params"])}
        return list(found.values())

    def penalty(self, routing: Routings) -> dict[str, Tensor]:
        """Balance losses, mean over all patched blocks."""
        if not isinstance(routing, tuple):
            return {}
        blocks, total = len(self._group_of), dict[str, Tensor]()
        for group, own in zip(self.each, routing, strict=True):
            for name, loss in group.penalty(own).items():
                share = loss * (group.shape.sites / blocks)
                total[name] = total[name] + share if name in total else share
        return total


def by_size(spec: BackboneSpec, settings: Prompts, made: Callable[[Sequence[int] | None], OneSize]) -> "OneSize | PatchBySize":
    """`made(blocks)` for each size there is; `made(None)` itself where there is but one."""
    groups = blocks_by_size(spec, settings)
    return made(None) if len(groups) == 1 else PatchBySize([made(blocks) for blocks in groups])


def gates_of(patch: nn.Module, c: Tensor) -> list[tuple[DmpPatch, Tensor]]:
    """Each patch with a gate, and its gates [L, B, K] of conditioning c [B, D]; empty for a method without gates."""
    patches = patch.each if isinstance(patch, PatchBySize) else [patch]
    with torch.no_grad():
        return [(one, one.route(c.float()).gates) for one in patches if isinstance(one, DmpPatch)]
