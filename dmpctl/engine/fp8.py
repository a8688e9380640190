"""`--backbone-dtype fp8`: weights of frozen linear layers in a quarter of float32's bytes.

Float8 (e4m3) with a scale per output channel: the numbers of torchao's weight-only quantisation, without torchao. Its layers keep
every weight that they have taken back from the forward pass on, which costs what was saved, compute in float32 under autocast,
and have no number for a row of zeros (0.18). Here products are computed in the format of the tokens, from weights that are taken
back anew in the backward pass.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FP8 = torch.float8_e4m3fn


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [out, in] in float8 and its scales float32 [out, 1]: the largest number of a row is the format's largest."""
    largest = torch.finfo(FP8).max
    weight = weight.detach().float()
    scale = (weight.abs().amax(dim=1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale).clamp(-largest, largest).to(FP8), scale


def from_fp8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `to_fp8` was given, as far as it is still known."""
    return (weight.float() * scale).to(dtype)


class FrozenProduct(torch.autograd.Function):
    """x W^T + b with W in float8 [out, in]; gradients for x alone, and no W in another format is kept for them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.x_dtype = x.dtype
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return F.linear(x.to(dtype), from_fp8(weight, scale, dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        return (grad @ from_fp8(weight, scale, grad.dtype)).to(ctx.x_dtype), None, None, None


def keep_in_fp8(linear: nn.Linear) -> None:
    """Change this frozen layer in place: its weight is a float8 parameter, its scales the buffer `weight_scale`."""
    weight, scale = to_fp8(linear.weight)
    linear.weight.data = weight
    linear.register_buffer("weight_scale", scale)
    linear.forward = partial(_product, linear)  # type: ignore[method-assign]


def _product(linear: nn.Linear, x: Tensor) -> Tensor:
    out: Tensor = FrozenProduct.apply(x, linear.weight, linear.weight_scale, linear.bias)
    return out
