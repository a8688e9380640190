"""One method on a backbone whose sites differ in size, such as a U-Net: a patch for each size, that act as one."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from dmpctl.errors import UsageError
from dmpctl.methods.base import PatchBase
from dmpctl.methods.dmp import DmpPatch
from dmpctl.methods.prompt_tuning import PromptPatch
from dmpctl.methods.prompts import patched_blocks
from dmpctl.settings.methods import PromptMethod
from dmpctl.types import BackboneSpec, ParamGroup, Plan, Routing, Routings, Site


class PatchBySize(PatchBase):
    """Patches of one method for blocks that do not overlap, in `groups`; together they patch all of these blocks."""

    def __init__(self, groups: Sequence[PromptPatch]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(groups)

    @property
    def each(self) -> list[PromptPatch]:
        """The patches, one for each size."""
        return list(self.groups)  # type: ignore[arg-type]

    @property
    def time_only(self) -> bool:
        """Whether the gates see the timestep alone: all or none of them, as they are of one method."""
        return self.each[0].time_only

    @property
    def added(self) -> int:
        """Sum of what the patches add."""
        return sum(group.added for group in self.each)

    def noise_shape(self) -> tuple[int, ...] | None:
        """One sample's gate noise for all of them, laid end to end; None where they draw none."""
        counts = self._noise_counts()
        return (sum(counts),) if counts else None

    def _noise_counts(self) -> list[int]:
        shapes = [group.noise_shape() for group in self.each]
        return [shape[0] * shape[1] for shape in shapes if shape is not None]

    def plan(self, c: Tensor, noise: Tensor | None = None) -> Plan:
        """Edit of all patched blocks, and the routing of each patch; noise [B, n] (`noise_shape`) in training only."""
        parts: Sequence[Tensor | None] = [None] * len(self.each)
        if noise is not None:
            shapes = [group.noise_shape() or () for group in self.each]
            pieces = torch.split(noise, self._noise_counts(), dim=1)
            parts = [piece.view(len(noise), *shape) for piece, shape in zip(pieces, shapes, strict=True)]
        plans = [group.plan(c, part) for group, part in zip(self.each, parts, strict=True)]
        edits = [plan.edit for plan in plans if plan.edit is not None]

        def edit(site: int, tokens: Tensor) -> Tensor:
            for own in edits:  # each leaves the blocks of the others alone
                tokens = own(site, tokens)
            return tokens

        return Plan(edit, tuple(plan.routing for plan in plans if isinstance(plan.routing, Routing)) or None)

    def param_groups(self) -> list[ParamGroup]:
        """The groups of the patches, those of one name joined."""
        found: dict[str, ParamGroup] = {}
        for own in (own for group in self.each for own in group.param_groups()):
            if own["name"] in found:
                found[own["name"]]["params"] += own["params"]
            else:
                found[own["name"]] = own
        return list(found.values())

    def penalty(self, routing: Routings) -> dict[str, Tensor]:
        """Balance losses, mean over all patched blocks."""
        if not isinstance(routing, tuple):
            return {}
        blocks, total = sum(group.shape.sites for group in self.each), dict[str, Tensor]()
        for group, own in zip(self.each, routing, strict=True):
            for name, loss in group.penalty(own).items():
                share = loss * (group.shape.sites / blocks)
                total[name] = total[name] + share if name in total else share
        return total


P = TypeVar("P", bound=PromptPatch)


def by_size(spec: BackboneSpec, settings: PromptMethod, made: Callable[[Sequence[int]], P]) -> P | PatchBySize:
    """The patch `made(blocks)` of the blocks that the settings choose; where these differ in size, one for each size.

    The sizes stand in the order in which they are first met. UsageError where there are several and the settings are for one.
    """
    groups: dict[Site, list[int]] = {}
    for block in patched_blocks(settings, len(spec.sites)):
        groups.setdefault(spec.sites[block], []).append(block)
    if len(groups) > 1 and settings.position == "prepend":
        raise UsageError("--position prepend needs sites of one size, this backbone has several", "use --position add")
    patches = [made(blocks) for blocks in groups.values()]
    return patches[0] if len(patches) == 1 else PatchBySize(patches)


def gates_of(patch: nn.Module, c: Tensor) -> list[tuple[DmpPatch, Tensor]]:
    """Each patch with a gate, and its gates [L, B, K] of conditioning c [B, D]; empty for a method without gates."""
    patches = patch.each if isinstance(patch, PatchBySize) else [patch]
    with torch.no_grad():
        return [(one, one.route(c.float()).gates) for one in patches if isinstance(one, DmpPatch)]
