"""Pixels as features: for images so small that Inception has nothing to say about them."""

from __future__ import annotations

import torch
from torch import Tensor

from dmpctl.errors import UsageError
from dmpctl.metrics.features.checks import require_uint8_images
from dmpctl.types import Outputs


class Pixels:
    """uint8 images [B, C, S, S] -> float32 [B, C*S*S] = v / 127.5 - 1, in [-1, 1], channels first then rows."""

    name = "pixels"

    def __init__(self, channels: int, size: int) -> None:
        self.channels, self.size = channels, size

    @property
    def width(self) -> int:
        """Features per image, C*S*S."""
        return self.channels * self.size**2

    @property
    def fingerprint(self) -> str:
        """Shape and scaling: there are no weights."""
        return f"pixels {self.channels}x{self.size}x{self.size} v/127.5-1"

    def __call__(self, images: Tensor) -> Tensor:
        """Features on the device of `images`. Raises UsageError for anything but uint8 [B, C, S, S]."""
        require_uint8_images(images)
        wanted = (self.channels, self.size, self.size)
        if images.shape[1:] != wanted:
            raise UsageError(f"pixel features are set up for images {list(wanted)}, found {list(images.shape[1:])}")
        return images.flatten(1).to(torch.float32) / 127.5 - 1

    def outputs(self, images: Tensor) -> Outputs:
        """The features; pixels have no classes, and no maps beside themselves."""
        return Outputs(self(images))
