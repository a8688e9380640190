"""Diffusion Model Patching (Ham et al., AAAI 2025): gated prompts at the input of every block.

The gate sees only the conditioning vector c and the block index l, so the gates of all blocks are one matmul
and a rank-one tilt: logits[l] = W c + b + l * w_depth. Gates are returned, never kept on the module.
"""

from dataclasses import dataclass
from typing import Any, Literal, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmpctl.errors import UsageError
from dmpctl.settings.sections import Dmp
from dmpctl.types import BackboneSpec, Edit, Plan, Routing

NOISE_FLOOR = 0.01  # smallest standard deviation of the gate noise (Shazeer et al. 2017, eq. 4)
EPS = 1e-10


@dataclass(frozen=True)
class DmpShape:
    """Sizes of a patch: L patched blocks, N prompts each, width D; `kept` is k of the top-k gate (N: soft)."""

    sites: int
    prompts: int
    width: int
    kept: int

    def parameters(self) -> int:
        """L·N·D + (D+1)·N + N: prompts and gate, as the paper counts them (W_noise is not needed after training)."""
        return self.sites * self.prompts * self.width + (self.width + 1) * self.prompts + self.prompts


def dmp_shape(spec: BackboneSpec, settings: Dmp) -> DmpShape:
    """Sizes that `settings` ask for on a backbone; raises UsageError where the two do not fit."""
    widths = {site.width for site in spec.sites}
    tokens = {site.tokens for site in spec.sites}
    if len(widths) > 1 or len(tokens) > 1:
        raise UsageError("this backbone has sites of several sizes, which one shared gate cannot serve")
    (count,) = tokens
    prompts = settings.prompts or count
    if settings.position == "add" and prompts != count:
        raise UsageError(
            f"--position add needs one prompt per token: {count} here, --prompts says {prompts}",
            "leave --prompts out, or use --position prepend",
        )
    depth = settings.prompt_depth or len(spec.sites)
    if depth > len(spec.sites):
        raise UsageError(f"--prompt-depth {depth} is more than the backbone's {len(spec.sites)} blocks")
    kept = prompts if settings.topk is None else settings.topk
    if kept > prompts:
        raise UsageError(f"--topk {kept} is more than the {prompts} prompts")
    return DmpShape(depth, prompts, widths.pop(), kept)


class DmpPatch(nn.Module):
    """Prompts [L, N, D], one gate shared by all blocks, and the gate's noise; all zero at the start.

    A zero patch is its backbone, bit for bit. Everything here is float32 whatever the backbone's dtype.
    """

    def __init__(self, shape: DmpShape, settings: Dmp) -> None:
        super().__init__()
        self.shape, self.settings = shape, settings
        self.scale = settings.gate_scale or 1.0
        self.prompt_embeddings = nn.Parameter(torch.zeros(shape.sites, shape.prompts, shape.width))
        self.gate = nn.Linear(shape.width + 1, shape.prompts)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.w_noise = nn.Parameter(torch.zeros(shape.width, shape.prompts))
        if not self._noisy:
            self.w_noise.requires_grad_(False)

    @property
    def _noisy(self) -> bool:
        return self.settings.gate_noise

    @property
    def time_only(self) -> bool:
        """Whether the gate sees t_emb alone: in `prepend`; else t_emb + y_emb."""
        return self.settings.position == "prepend"

    def noise_shape(self) -> tuple[int, ...] | None:
        """One sample's gate noise [L, N]; None with --no-gate-noise."""
        return (self.shape.sites, self.shape.prompts) if self._noisy else None

    def forward(self, c: Tensor, noise: Tensor | None = None) -> Plan:
        """`plan`, so that the module can be wrapped for many processes."""
        return self.plan(c, noise)

    def plan(self, c: Tensor, noise: Tensor | None = None) -> Plan:
        """Gates and edit of all blocks for conditioning c [B, D]; noise [B, L, N] in training only."""
        with torch.autocast(c.device.type, enabled=False):
            routing = self.route(c.float(), noise)
            return Plan(self._edit(routing.gates), routing)

    def route(self, c: Tensor, noise: Tensor | None = None) -> Routing:
        """Gates [L, B, N] of c [B, D] (eq. 2-3; noisy top-k after Shazeer et al. 2017, eq. 3-5)."""
        shape = self.shape
        depth = torch.arange(shape.sites, dtype=c.dtype, device=c.device)[:, None, None]
        weight, w_depth = self.gate.weight[:, :-1], self.gate.weight[:, -1]
        clean = F.linear(c, weight, self.gate.bias) + depth * w_depth  # [L, B, N]
        if noise is None:
            return Routing(self._keep(clean))
        std = F.softplus(c @ self.w_noise) + NOISE_FLOOR  # [B, N], the same for every block
        noisy = clean + noise.transpose(0, 1) * std
        load = expected_load(clean, noisy, std, shape.kept) if shape.kept < shape.prompts else None
        return Routing(self._keep(noisy), load)

    def _keep(self, logits: Tensor) -> Tensor:
        """softmax over the k largest logits [L, B, N], exactly zero elsewhere."""
        if self.shape.kept < self.shape.prompts:
            best, where = logits.topk(self.shape.kept, dim=-1)
            return torch.zeros_like(logits).scatter(-1, where, best.softmax(-1))
        return logits.softmax(-1)

    def _edit(self, gates: Tensor) -> Edit:
        position: Literal["add", "prepend"] = self.settings.position
        prompts, count, scale = self.prompt_embeddings, self.shape.prompts, self.scale

        def mixed(site: int) -> Tensor:
            return (gates[site] * scale).unsqueeze(-1) * prompts[site]  # [B, N, D]

        def add(site: int, tokens: Tensor) -> Tensor:
            return tokens + mixed(site).to(tokens.dtype) if site < len(prompts) else tokens

        def prepend(site: int, tokens: Tensor) -> Tensor:
            if site >= len(prompts):
                return tokens
            own = tokens if site == 0 else tokens[:, count:]  # later prompts replace the earlier ones
            return torch.cat([mixed(site).to(tokens.dtype), own], dim=1)

        match position:
            case "add":
                return add
            case "prepend":
                return prepend
            case _:
                assert_never(position)

    def param_groups(self) -> list[dict[str, Any]]:
        """Prompts at their rate, gate and its noise at theirs (published: 1e-4 and 1e-3)."""
        gate = [p for p in (self.gate.weight, self.gate.bias, self.w_noise) if p.requires_grad]
        return [
            {"name": "prompts", "params": [self.prompt_embeddings], "lr": self.settings.prompt_lr},
            {"name": "gate", "params": gate, "lr": self.settings.gate_lr},
        ]

    def penalty(self, routing: Routing | None) -> dict[str, Tensor]:
        """Weighted balance losses, each a scalar, mean over blocks; load only where k < N (it is 0 at k = N)."""
        if routing is None:
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


def squared_cv(values: Tensor) -> Tensor:
    """Squared coefficient of variation over the last axis: variance / mean² (Shazeer et al. 2017, eq. 7); 0 for one value."""
    if values.shape[-1] < 2:
        return values.sum(dim=-1) * 0
    return values.var(dim=-1) / (values.mean(dim=-1).square() + EPS)


def per_sample_importance(gates: Tensor) -> Tensor:
    """The published code's importance of gates [L, B, N]: CV² over samples x prompts of the gates summed over blocks.

    It pulls every sample to a uniform gate; `shazeer` sums over the samples first.
    """
    return squared_cv(gates.sum(dim=0).flatten())


def expected_load(clean: Tensor, noisy: Tensor, std: Tensor, kept: int) -> Tensor:
    """load [L, N]: expected number of samples whose top k holds each prompt under fresh noise of that prompt alone.

    clean, noisy [L, B, N], std [B, N]; kept < N. Shazeer et al. 2017, eq. 8-10: P = Φ((clean - bar) / std), where
    the bar is the k-th largest of the *other* prompts' noisy logits.
    """
    best = noisy.topk(kept + 1, dim=-1).values
    inside, outside = best[..., kept - 1 : kept], best[..., kept : kept + 1]
    bar = torch.where(noisy >= inside, outside, inside)  # a kept prompt competes with the (k+1)-th
    stays: Tensor = torch.special.ndtr((clean - bar) / std)
    return stays.sum(dim=1)
