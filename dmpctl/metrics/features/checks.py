"""What every extractor asks of its input."""

from __future__ import annotations

import torch
from torch import Tensor

from dmpctl.errors import UsageError


def require_uint8_images(images: Tensor) -> None:
    """Raises UsageError unless `images` is uint8 [B, C, H, W]: floats would hide which range they are in."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise UsageError(f"an extractor takes uint8 images [B, C, H, W], found {images.dtype} {list(images.shape)}")
