"""Prompts at the input of blocks: where they are, and how they reach the tokens.

DMP and prompt tuning share all of this; they differ in what the prompts are multiplied with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, assert_never

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmpctl.errors import UsageError
from dmpctl.rng import seed_of
from dmpctl.settings.methods import PromptMethod
from dmpctl.types import BackboneSpec, Edit

CACHED = 2**17  # numbers (512 KiB) that a processor has at hand


@dataclass(frozen=True)
class PromptShape:
    """Sizes of prompts: L patched blocks, N prompts each, width D.

    `chosen`: raw indices of the patched blocks, ascending; None: the first L. `sets`: E whole sets per block, None: one.
    `rank`: rank of the N x D matrix of prompts; None: full.
    """

    sites: int
    prompts: int
    width: int
    chosen: tuple[int, ...] | None = field(default=None, kw_only=True)
    sets: int | None = field(default=None, kw_only=True)
    rank: int | None = field(default=None, kw_only=True)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Raw index of each patched block, ascending."""
        return tuple(range(self.sites)) if self.chosen is None else self.chosen

    @property
    def stack(self) -> tuple[int, ...]:
        """Axes that the matrices of prompts are stacked: (L,), with sets (L, E)."""
        return (self.sites,) if self.sets is None else (self.sites, self.sets)


def prompt_shape(spec: BackboneSpec, settings: PromptMethod, blocks: Sequence[int] | None = None) -> PromptShape:
    """Sizes that `settings` ask for on a backbone, without sets and rank; UsageError where the two do not fit.

    `blocks`: these of its blocks alone; None: those that the settings choose. ValueError where they are of several sizes.
    """
    blocks = patched_blocks(settings, len(spec.sites)) if blocks is None else tuple(blocks)
    if len({spec.sites[block] for block in blocks}) > 1:
        raise ValueError(f"blocks {blocks} are of several sizes")
    size = spec.sites[blocks[0]]
    count = size.tokens
    prompts = settings.prompts or count
    if settings.position == "add" and prompts != count:
        raise UsageError(
            f"--position add needs one prompt per token: {count} here, --prompts says {prompts}",
            "leave --prompts out, or use --position prepend",
        )
    first = tuple(range(len(blocks)))
    return PromptShape(len(blocks), prompts, size.width, chosen=None if blocks == first else blocks)


def patched_blocks(settings: PromptMethod, count: int) -> tuple[int, ...]:
    """Which of `count` blocks are patched, ascending, each once; UsageError for a block that is not there."""
    if settings.prompt_sites is None:
        depth = settings.prompt_depth or count
        if depth > count:
            raise UsageError(f"--prompt-depth {depth} is more than the backbone's {count} blocks")
        return tuple(range(depth))
    chosen = set[int]()
    for part in settings.prompt_sites.split(","):
        low, _, high = part.partition("-")
        first, last = int(low), int(high or low)
        if first > last:
            raise UsageError(f"--prompt-sites {part} runs backwards", f"write {last}-{first}")
        if last >= count:
            raise UsageError(f"--prompt-sites {part}: there is no block {last}, this backbone's are 0-{count - 1}")
        chosen.update(range(first, last + 1))
    return tuple(sorted(chosen))


def start_normal(seed: int, purpose: str, std: float, *shape: int) -> Tensor:
    """Normal numbers float32 on the CPU that depend on seed, `purpose` and shape alone; the global generator is left alone."""
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed_of(seed, "start", purpose)), device="cpu")


class GatedAdd(torch.autograd.Function):
    """tokens + gates * prompts (eq. 2), in one pass over the tokens [B, N, D]; gates [B, N], prompts [N, D].

    Autograd's own backward pass would write and read several tensors as large as the tokens. On a GPU it is two batched matrix
    products over the tokens; a CPU would copy their operands first, so there parts of the batch are summed that stay in its
    cache. Sums are float32.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, gates: Tensor, prompts: Tensor) -> Tensor:
        ctx.save_for_backward(gates, prompts)
        return torch.addcmul(tokens.float(), gates.unsqueeze(-1), prompts).to(tokens.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        gates, prompts = ctx.saved_tensors
        gradients = cached_gradients if grad.is_cpu else bmm_gradients
        for_gates, for_prompts = gradients(grad.float(), gates, prompts)
        return grad, for_gates if ctx.needs_input_grad[1] else None, for_prompts if ctx.needs_input_grad[2] else None


def bmm_gradients(grad: Tensor, gates: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gates [B, N] and prompts [N, D] in gates * prompts, whose own is `grad` [B, N, D]."""
    by_token = grad.transpose(0, 1)  # [N, B, D]
    return torch.bmm(by_token, prompts.unsqueeze(2)).squeeze(2).t(), torch.bmm(gates.t().unsqueeze(1), by_token).squeeze(1)


def cached_gradients(grad: Tensor, gates: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients as `bmm_gradients` gives them, summed over parts of the batch of at most CACHED numbers."""
    many = max(1, CACHED // prompts.numel())
    for_gates = []
    for_prompts = torch.zeros_like(prompts)
    for part, weights in zip(torch.split(grad, many), torch.split(gates.unsqueeze(-1), many), strict=True):
        for_gates.append((part * prompts).sum(-1))
        if many > 1:
            for_prompts += (part * weights).sum(0)
        else:
            for_prompts.addcmul_(part[0], weights[0])
    return torch.cat(for_gates), for_prompts


def edit_at(shape: PromptShape, change: Callable[[int, Tensor], Tensor]) -> Edit:
    """The edit that makes `change(number, tokens)` of the tokens of the `number`-th patched block.

    At any other block it returns the very tokens that it was given.
    """
    number_of = {block: number for number, block in enumerate(shape.blocks)}

    def edit(site: int, tokens: Tensor) -> Tensor:
        number = number_of.get(site)
        return tokens if number is None else change(number, tokens)

    return edit


def gated_edit(shape: PromptShape, gates: Sequence[Tensor], prompts: Sequence[Tensor]) -> Edit:
    """The edit that adds the gated prompts [N, D] of each patched block, with gates [B or 1, N], to its tokens."""

    def add(number: int, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            if len(gates[number]) == 1:  # one row for all samples: mixed once
                return (tokens.float() + gates[number][0].unsqueeze(-1) * prompts[number]).to(tokens.dtype)
            added: Tensor = GatedAdd.apply(tokens, gates[number], prompts[number])
        return added

    return edit_at(shape, add)


def prompt_edit(shape: PromptShape, position: Literal["add", "prepend"], prompts_at: Callable[[int], Tensor]) -> Edit:
    """The edit that gives `prompts_at(number)` [B, N, D] or [N, D] to the tokens of the `number`-th patched block.

    `prepend`: before the tokens at the first patched block; at a later one they replace those of before, and between two
    they travel on.
    """

    def add(number: int, tokens: Tensor) -> Tensor:
        return tokens + prompts_at(number).to(tokens.dtype)

    def prepend(number: int, tokens: Tensor) -> Tensor:
        own = tokens if number == 0 else tokens[:, shape.prompts :]
        return torch.cat([prompts_at(number).to(tokens.dtype).expand(len(tokens), -1, -1), own], dim=1)

    match position:
        case "add":
            return edit_at(shape, add)
        case "prepend":
            return edit_at(shape, prepend)
        case _:
            assert_never(position)
