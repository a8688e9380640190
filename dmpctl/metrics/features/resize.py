"""Resizing to what a network takes, as the tools do whose numbers are to be compared: they differ by more than methods do.

All: uint8 [B, C, H, W] -> float32 [B, C, side, side], in the range that the network was used with.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIDE = 299  # of Inception's input


def tf1(images: Tensor) -> Tensor:
    """ADM's evaluator and torch-fidelity: TensorFlow 1's bilinear (corner origin, no antialias), then (v - 128) / 128."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    resized: Tensor = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(SIDE, SIDE), align_corners=False)
    return (resized - 128) / 128


def half_pixel(images: Tensor) -> Tensor:
    """pytorch-fid: bilinear with pixel centres, no antialias, then 2 v / 255 - 1."""
    resized = F.interpolate(images.float() / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return 2 * resized - 1


def clean(images: Tensor) -> Tensor:
    """clean-fid: Pillow's bicubic on floats, antialiased, clipped, not rounded (Parmar et al. 2022); then (v - 128) / 128."""
    planes = images.cpu().float().flatten(0, 1).numpy()
    resized = [np.asarray(Image.fromarray(plane).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for plane in planes]
    stacked = torch.from_numpy(np.stack(resized)).view(*images.shape[:2], SIDE, SIDE)
    return (stacked.to(images.device).clamp(0, 255) - 128) / 128


def antialiased(images: Tensor, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Bicubic, antialiased, in [0, 1], then (v - mean) / std by channel: for networks trained on ImageNet's statistics."""
    resized = F.interpolate(images.float() / 255, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
    shape = (1, -1, 1, 1)
    return (resized.clamp(0, 1) - resized.new_tensor(mean).view(shape)) / resized.new_tensor(std).view(shape)
