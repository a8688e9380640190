"""Gates, which mix the prompts: logits of all blocks at once, the largest of them kept, and how evenly prompts are used.

Shapes: B batch, L patched blocks, D width, K what is chosen among: the prompts, or whole sets of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmpctl.methods.prompts import start_normal

EPS = 1e-10


class SharedGate(nn.Module):
    """One linear layer on [c; l] for all blocks (Ham et al. 2025), l the raw index of the block; zero at the start.

    W [c; l] + b = W_c c + b + l * w_depth: one matmul and a rank-one tilt.
    """

    blocks: Tensor

    def __init__(self, blocks: tuple[int, ...], width: int, choices: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(choices, width + 1))
        self.bias = nn.Parameter(torch.zeros(choices))
        # a buffer, as numbers copied to a GPU in every step would stall it; not saved: the settings give them
        self.register_buffer("blocks", torch.tensor(blocks, dtype=torch.float32)[:, None, None], persistent=False)

    def forward(self, c: Tensor) -> Tensor:
        """Logits [L, B, K] of c [B, D]."""
        return F.linear(c, self.weight[:, :-1], self.bias) + self.blocks * self.weight[:, -1]

    @torch.no_grad()
    def freeze_at_random(self, seed: int) -> None:
        """Fixed random weights that are not trained: logits of c with entries of unit variance have a variance near 1."""
        width = self.weight.shape[1] - 1
        self.weight.copy_(start_normal(seed, "gate", width**-0.5, *self.weight.shape))
        self.requires_grad_(False)


class PerSiteGate(nn.Module):
    """A linear layer on c for each block: weights [L, K, D], biases [L, K]; zero at the start."""

    def __init__(self, sites: int, width: int, choices: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(sites, choices, width))
        self.bias = nn.Parameter(torch.zeros(sites, choices))

    def forward(self, c: Tensor) -> Tensor:
        """Logits [L, B, K] of c [B, D], one matmul for all blocks."""
        logits = F.linear(c, self.weight.flatten(0, 1), self.bias.flatten())
        return logits.view(-1, *self.bias.shape).transpose(0, 1)


def softmax_of_best(logits: Tensor, kept: int) -> Tensor:
    """Softmax over the `kept` largest of logits [..., K], exactly zero elsewhere (Shazeer et al. 2017, eq. 3-5)."""
    if kept == logits.shape[-1]:
        return logits.softmax(-1)
    best, where = logits.topk(kept, dim=-1)
    return torch.zeros_like(logits).scatter(-1, where, best.softmax(-1))


def one_hot_of_best(logits: Tensor) -> Tensor:
    """Exactly 1 at the largest of logits [..., K], 0 elsewhere; the gradient is that of the softmax (straight through)."""
    soft = logits.softmax(-1)
    hard = torch.zeros_like(soft).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())  # the brackets keep it exact: the difference is 0


def squared_cv(values: Tensor) -> Tensor:
    """Squared coefficient of variation over the last axis: variance / mean² (Shazeer et al. 2017, eq. 7); 0 for one value."""
    if values.shape[-1] < 2:
        return values.sum(dim=-1) * 0
    return values.var(dim=-1) / (values.mean(dim=-1).square() + EPS)


def per_sample_importance(gates: Tensor) -> Tensor:
    """The published code's importance of gates [L, B, K]: CV² over samples x prompts of the gates summed over blocks.

    It pulls every sample to a uniform gate; `shazeer` sums over the samples first.
    """
    return squared_cv(gates.sum(dim=0).flatten())


def expected_load(clean: Tensor, noisy: Tensor, std: Tensor, kept: int) -> Tensor:
    """load [L, K]: expected number of samples whose top k holds each prompt under fresh noise of that prompt alone.

    clean, noisy [L, B, K], std [B, K]; kept < K. Shazeer et al. 2017, eq. 8-10: P = Φ((clean - bar) / std), where
    the bar is the k-th largest of the *other* prompts' noisy logits.
    """
    best = noisy.topk(kept + 1, dim=-1).values
    inside, outside = best[..., kept - 1 : kept], best[..., kept : kept + 1]
    bar = torch.where(noisy >= inside, outside, inside)  # a kept prompt competes with the (k+1)-th
    stays: Tensor = torch.special.ndtr((clean - bar) / std)
    return stays.sum(dim=1)
