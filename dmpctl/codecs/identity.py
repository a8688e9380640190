"""The codec of pixel space: latents are the pixels themselves, in [-1, 1]."""

import hashlib

import torch
from torch import Tensor

from dmpctl.types import Moments


class Identity:
    """Pixels as latents: same shape, no posterior variance, exact round trip."""

    name = "identity"
    fingerprint = hashlib.sha256(b"identity").hexdigest()
    scale = 1.0

    def latent_shape(self, channels: int, size: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of images with this many channels and this side in pixels."""
        return channels, size, size

    def image_shape(self, latents: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the images behind latents of this shape."""
        return latents

    def encode(self, images: Tensor) -> Moments:
        """uint8 [B, C, H, W] -> float32 in [-1, 1], same shape: v / 127.5 - 1."""
        return Moments(images.to(torch.float32) / 127.5 - 1)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, H, W] -> uint8, same shape: 127.5 x + 128, clamped to 0..255, truncated (the rule of DiT's sampler)."""
        return (127.5 * latents.to(torch.float32) + 128).clamp(0, 255).to(torch.uint8)
