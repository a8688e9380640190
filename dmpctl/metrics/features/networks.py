"""Base of the extractors: uint8 images only, true float32, and weights from files that may be hostile."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from dmpctl.errors import IntegrityError, UsageError
from dmpctl.files import read_tensors
from dmpctl.foreign.tensors import refuse_unsound, unpickled
from dmpctl.types import Outputs


class ImageExtractor(ABC):
    """uint8 images [B, C, H, W] -> float32 features [B, width]."""

    def __call__(self, images: Tensor) -> Tensor:
        """Returns the features of `outputs`."""
        return self.outputs(images).features

    def outputs(self, images: Tensor) -> Outputs:
        """Returns all that one pass gives. UsageError for anything but uint8 [B, C, H, W]: floats would hide their range."""
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise UsageError(f"an extractor takes uint8 images [B, C, H, W], found {images.dtype} {list(images.shape)}")
        return self._outputs(images)

    @abstractmethod
    def _outputs(self, images: Tensor) -> Outputs: ...


class NetworkExtractor(ImageExtractor):
    """An extractor with a network on `device`, in full float32: no TF32, no autocast; `title` is what people call it."""

    def __init__(self, title: str, device: torch.device | str) -> None:
        self._title, self._device = title, torch.device(device)

    def _outputs(self, images: Tensor) -> Outputs:
        if images.shape[1] not in (1, 3):
            raise UsageError(f"{self._title} takes grey or RGB images, found {images.shape[1]} channels")
        with torch.inference_mode(), tf32_off(), torch.autocast(self._device.type, enabled=False):
            return self._run(images.to(self._device))

    @abstractmethod
    def _run(self, images: Tensor) -> Outputs:
        """Outputs of uint8 [B, 1 or 3, H, W] on the device."""


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


def read_state_dict(path: Path, hint: str) -> dict[str, Tensor]:
    """Returns the state dict in a .safetensors file or in a pickle of plain tensors, on the CPU; no code of the file is run.

    Raises IntegrityError (with `hint`) for anything but a mapping of names to tensors.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    state = unpickled(path, "weights file", hint)
    if not isinstance(state, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise IntegrityError(f"{path} does not hold a state dict of tensors", hint)
    refuse_unsound(state, path, floats=False)
    return dict(state)


def one_line(error: Exception) -> str:
    """Returns the message of an exception, short; its kind where it has none."""
    return shorten(str(error), 160, placeholder=" ...") or type(error).__name__
