"""Diffusion Model Patching (Ham et al., AAAI 2025): gated prompts at the input of every block.

The gate sees only the conditioning vector c and the block index l, so the gates of all blocks are known before the
first block runs. Gates are returned, never kept on the module.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmpctl.errors import UsageError
from dmpctl.methods.gate import (
    PerSiteGate,
    SharedGate,
    expected_load,
    one_hot_of_best,
    per_sample_importance,
    softmax_of_best,
    squared_cv,
)
from dmpctl.methods.prompt_tuning import PromptPatch
from dmpctl.methods.prompts import PromptShape, gated_edit, prompt_edit, prompt_shape
from dmpctl.settings.methods import Dmp
from dmpctl.types import BackboneSpec, Edit, ParamGroup, Plan, Routing, Routings

NOISE_FLOOR = 0.01  # smallest standard deviation of the gate noise (Shazeer et al. 2017, eq. 4)


@dataclass(frozen=True)
class DmpShape(PromptShape):
    """Sizes of a patch: its prompts; `kept` is k of the top-k gate (all there are: soft).

    `seen`: numbers of c, which the gate looks at; None: as many as a prompt's.
    """

    kept: int
    seen: int | None = field(default=None, kw_only=True)

    @property
    def cond_width(self) -> int:
        """Numbers of c."""
        return self.seen or self.width

    @property
    def choices(self) -> int:
        """K, the number of things that the gate chooses among: N prompts, or E whole sets."""
        return self.sets or self.prompts


def dmp_shape(spec: BackboneSpec, settings: Dmp, blocks: Sequence[int] | None = None) -> DmpShape:
    """Sizes that `settings` ask for on a backbone, or on these of its blocks; raises UsageError where the two do not fit."""
    shape = prompt_shape(spec, settings, blocks)
    choices, what = (settings.prompt_sets, "sets of prompts") if settings.prompt_sets else (shape.prompts, "prompts")
    kept = 1 if settings.gate == "hard" else settings.topk or choices
    if kept > choices:
        raise UsageError(f"--topk {kept} is more than the {choices} {what}")
    sizes = vars(shape) | {"sets": settings.prompt_sets, "rank": settings.prompt_rank}
    return DmpShape(**sizes, kept=kept, seen=None if spec.cond_width in (None, shape.width) else spec.cond_width)


class DmpPatch(PromptPatch):
    """Prompts [L, N, D], one gate shared by all blocks, and the gate's noise; all zero at the start.

    A zero patch is its backbone, bit for bit. A uniform gate has no numbers; `w_noise` (gate noise) is there only for a gate
    that is trained.
    """

    shape: DmpShape
    settings: Dmp
    w_noise: nn.Parameter

    def __init__(self, shape: DmpShape, settings: Dmp, seed: int = 0) -> None:
        super().__init__(shape, settings, seed)
        self.scale = settings.gate_scale or 1.0
        self._trained = settings.gate not in ("uniform", "random")  # whether the gate is
        self._noisy = self._trained and settings.gate_noise
        self.gate: SharedGate | PerSiteGate | None = None
        if settings.gate_per_site:
            self.gate = PerSiteGate(shape.sites, shape.cond_width, shape.choices)
        elif settings.gate != "uniform":
            self.gate = SharedGate(shape.blocks, shape.cond_width, shape.choices)
            if settings.gate == "random":
                self.gate.freeze_at_random(seed)
        if self._trained:
            self.w_noise = nn.Parameter(torch.zeros(shape.cond_width, shape.choices), requires_grad=self._noisy)

    @property
    def time_only(self) -> bool:
        """Whether the gate sees t_emb alone, else t_emb + y_emb; unless --gate-input says: in `prepend`."""
        return (self.settings.gate_input or ("t" if self.settings.position == "prepend" else "t+y")) == "t"

    @property
    def added(self) -> int:
        """L·N·D + (D+1)·N + N: prompts and gate, as the paper counts them (w_noise is not needed after training)."""
        return sum(tensor.numel() for name, tensor in self.named_parameters() if name != "w_noise")

    def noise_shape(self) -> tuple[int, ...] | None:
        """One sample's gate noise [L, K]; None with --no-gate-noise and for a gate that is not trained."""
        return (self.shape.sites, self.shape.choices) if self._noisy else None

    def plan(self, c: Tensor, noise: Tensor | None = None) -> Plan:
        """Gates and edit of all blocks for conditioning c [B, D]; noise [B, L, K] in training only."""
        with torch.autocast(c.device.type, enabled=False):
            routing = self.route(c.float(), noise)
            return Plan(self._edit(routing.gates), routing)

    def route(self, c: Tensor, noise: Tensor | None = None) -> Routing:
        """Gates [L, B, K] of c [B, D] (eq. 2-3; noisy top-k after Shazeer et al. 2017, eq. 3-5)."""
        shape = self.shape
        if self.gate is None:
            return Routing(c.new_full((1, 1, 1), 1 / shape.choices).expand(shape.sites, len(c), shape.choices))
        clean: Tensor = self.gate(c)
        if noise is None or not self._noisy:
            return Routing(self._kept(clean))
        std = F.softplus(c @ self.w_noise) + NOISE_FLOOR  # [B, K], the same for every block
        noisy = clean + noise.transpose(0, 1) * std
        load = expected_load(clean, noisy, std, shape.kept) if shape.kept < shape.choices else None
        return Routing(self._kept(noisy), load)

    def _kept(self, logits: Tensor) -> Tensor:
        """Gates [L, B, K] of logits."""
        return one_hot_of_best(logits) if self.settings.gate == "hard" else softmax_of_best(logits, self.shape.kept)

    def _edit(self, gates: Tensor) -> Edit:
        """The edit by gates [L, B, K]: a block's prompts are mixed when it is reached."""
        shape, position = self.shape, self.settings.position
        prompts = self.all_prompts().unbind()  # the backward of one unbind, not of L selections of all prompts
        if self.gate is None:
            share = self.scale / shape.choices  # in Python's floats: exactly 1 where the scale is K
            return prompt_edit(shape, position, lambda n: (prompts[n] if shape.sets is None else prompts[n].sum(0)) * share)
        weights = (gates * self.scale).unbind()
        if shape.sets is None and position == "add":
            return gated_edit(shape, weights, prompts)
        if shape.sets is None:
            return prompt_edit(shape, position, lambda n: weights[n].unsqueeze(-1) * prompts[n])

        def mixed(number: int) -> Tensor:
            with torch.autocast(gates.device.type, enabled=False):  # blocks run under autocast, a mixture does not
                return (weights[number] @ prompts[number].flatten(1)).view(-1, shape.prompts, shape.width)

        return prompt_edit(shape, position, mixed)

    def param_groups(self) -> list[ParamGroup]:
        """Prompts at their rate, a trained gate and its noise at theirs (published: 1e-4 and 1e-3)."""
        groups = super().param_groups()
        if self.gate is None or not self._trained:
            return groups
        gate = [p for p in (self.gate.weight, self.gate.bias, self.w_noise) if p.requires_grad]
        return [*groups, {"name": "gate", "params": gate, "lr": self.settings.gate_lr}]

    def penalty(self, routing: Routings) -> dict[str, Tensor]:
        """Weighted balance losses, each a scalar, mean over blocks; load only where k < K (it is 0 at k = K)."""
        if not isinstance(routing, Routing) or not self._trained:
            return {}
        balance: Literal["shazeer", "per-sample", "none"] = self.settings.balance
        match balance:
            case "shazeer":
                importance = squared_cv(routing.gates.sum(dim=1)).mean()
            case "per-sample":
                importance = per_sample_importance(routing.gates)
            case "none":
                return {}
            case _:
                assert_never(balance)
        losses = {"importance": self.settings.importance_weight * importance}
        if routing.load is not None:
            losses["load"] = self.settings.load_weight * squared_cv(routing.load).mean()
        return losses
