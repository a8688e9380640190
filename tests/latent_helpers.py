"""Codecs small enough for tests: a random autoencoder in diffusers' own files, and one whose every number is known."""

from pathlib import Path

import torch
from torch import Tensor

from dmpctl.types import Moments

TINY_SIDE = 16  # of images that the tiny autoencoder is tried on; its latents are half as wide


def tiny_vae(folder: Path, seed: int = 0, **config: object) -> Path:
    """A random AutoencoderKL of two blocks, as diffusers saves it; weights large enough that nothing is near zero."""
    from diffusers import AutoencoderKL

    shape = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoencoderKL(**shape).save_pretrained(folder)
    return folder


class Ramp:
    """2x2 means as latents, rising with the column (so that a mirror's latents are no mirrored latents). Exact in any batch."""

    name, scale = "ramp", 1.0

    def __init__(self, fingerprint: str = "0" * 64) -> None:
        self.fingerprint = fingerprint
        self.encoded = 0

    def latent_shape(self, channels: int, size: int) -> tuple[int, int, int]:
        return channels, size // 2, size // 2

    def encode(self, images: Tensor) -> Moments:
        self.encoded += len(images)
        quarters = images.double().unfold(2, 2, 2).unfold(3, 2, 2).sum((-1, -2)) / 1020
        mean = (quarters + torch.arange(quarters.shape[-1]) / 10).float()
        return Moments(mean, (-1 - mean).float())

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError
