"""What every extractor asks of its input, and of the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dmpctl.errors import UsageError


def require_uint8_images(images: Tensor) -> None:
    """Raises UsageError unless `images` is uint8 [B, C, H, W]: floats would hide which range they are in."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise UsageError(f"an extractor takes uint8 images [B, C, H, W], found {images.dtype} {list(images.shape)}")


@contextmanager
def tf32_off() -> Iterator[None]:
    """True float32 convolutions and products inside the block: cuDNN's TF32 is on by default."""
    backends: Any = torch.backends  # its annotations do not know these yet
    places = (backends.cudnn.conv, backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
