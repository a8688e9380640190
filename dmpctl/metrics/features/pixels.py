"""Pixels as features: for images so small that Inception has nothing to say about them."""

import torch
from torch import Tensor

from dmpctl.errors import UsageError
from dmpctl.metrics.features.networks import ImageExtractor
from dmpctl.types import Outputs


class Pixels(ImageExtractor):
    """uint8 images [B, C, S, S] -> float32 [B, C*S*S] = v / 127.5 - 1, in [-1, 1], channels first then rows."""

    name = "pixels"

    def __init__(self, channels: int, size: int) -> None:
        self._shape = (channels, size, size)
        self.width = channels * size**2
        self.fingerprint = f"pixels {channels}x{size}x{size} v/127.5-1"  # there are no weights

    def _outputs(self, images: Tensor) -> Outputs:
        if images.shape[1:] != self._shape:
            raise UsageError(f"pixel features are set up for images {list(self._shape)}, found {list(images.shape[1:])}")
        return Outputs(images.flatten(1).to(torch.float32) / 127.5 - 1)
