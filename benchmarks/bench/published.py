"""The step that the published code takes, for comparison: written from its description, not from it.

Nothing is frozen, so gradients of all weights are computed; each block has a gate call of its own, whose top-k is scattered into
zeros and gathers the prompts; and with a VAE, images are encoded in every step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmpctl.backbones.dit import DiT


class PublishedPatch(nn.Module):
    """Prompts [L, N, D] and one gate (D + 1 -> N), called block by block."""

    def __init__(self, backbone: DiT) -> None:
        super().__init__()
        site, count = backbone.spec.sites[0], len(backbone.spec.sites)
        self.prompts = nn.Parameter(torch.zeros(count, site.tokens, site.width))
        self.gate = nn.Linear(site.width + 1, site.tokens)
        self.w_noise = nn.Parameter(torch.zeros(site.width, site.tokens))

    def edit(self, block: int, tokens: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens with gated prompts, and the gate [B, N]."""
        depth = torch.full((len(c), 1), float(block), device=c.device)
        clean = self.gate(torch.cat([c, depth], dim=1))
        std = F.softplus(c @ self.w_noise) + 0.01
        noisy = clean + torch.randn_like(clean) * std
        best, kept = noisy.topk(noisy.shape[1], dim=1)
        gates = torch.zeros_like(noisy).scatter(1, kept, best.softmax(dim=1))
        mixed = gates.gather(1, kept.argsort(dim=1).argsort(dim=1).gather(1, kept)).unsqueeze(-1) * self.prompts[block]
        return tokens + mixed.to(tokens.dtype), gates


def published_forward(backbone: DiT, patch: PublishedPatch, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction and importance loss (its per-sample variant)."""
    c = backbone.embed(t, None)
    importance = torch.zeros((), device=x.device)

    def edit(block: int, tokens: Tensor) -> Tensor:
        nonlocal importance
        tokens, gates = patch.edit(block, tokens, c.float())
        importance = importance + gates.var() / (gates.mean() ** 2 + 1e-10)
        return tokens

    return backbone.denoise(x, t, None, edit), importance
