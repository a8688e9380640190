"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) as published with DiT.

Shapes: B batch, C/H/W channels, height, width of what is noised.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dmpctl.errors import UsageError
from dmpctl.types import Denoiser

Predict = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x [B, C, H, W], t [B], cond [B] or None -> [B, C or 2C, H, W]


def guide(
    predict: Predict, cond: Tensor | None, null: Tensor | None, scale: float, channels: Literal["3", "all"] = "3"
) -> Denoiser:
    """The denoiser null + scale * (cond - null) for conditions `cond` [B, ...] (None: unconditional), `null` [1, ...].

    One forward of 2B per call, of B where `scale` is 1. Guided are the first 3 channels of epsilon
    (published DiT) or all of them; the rest, variance half included, is the conditional prediction's.
    UsageError for a scale other than 1 without conditions or without a null one.
    """
    if scale == 1:
        return lambda x, t: predict(x, t, cond)
    if cond is None or null is None:
        lacks = "has none" if cond is None else "was trained without dropping them, so it has no null class"
        raise UsageError(f"guidance {scale:g} needs a backbone with classes or captions, this one {lacks}", "use --cfg 1")
    both = torch.cat([cond, null.expand_as(cond)])

    def guided(x: Tensor, t: Tensor) -> Tensor:
        prediction, null = predict(x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        count = min(3, x.shape[1]) if channels == "3" else x.shape[1]
        eps, null_eps = prediction[:, :count], null[:, :count]
        return torch.cat([null_eps + scale * (eps - null_eps), prediction[:, count:]], dim=1)

    return guided
