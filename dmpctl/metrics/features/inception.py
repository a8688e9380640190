"""Inception-v3 (TF 2015-12-05), layer pool_3: the network and preprocessing of ADM's evaluator, by torch-fidelity."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import sha256_of
from dmpctl.metrics.features.checks import require_uint8_images

if TYPE_CHECKING:
    from torch import nn

PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PREPROCESSING = "tf1-bilinear-299 (v-128)/128 pool_3"
FETCH = "`dmpctl download inception` fetches it"


class Inception:
    """uint8 images [B, 1 or 3, H, W] of any size -> float32 pool_3 features [B, 2048], on `device`.

    Resized to 299x299 as TensorFlow 1 does (bilinear, corner origin, no antialias), then (v - 128) / 128.
    `pinned` refuses any weights file but the published one; otherwise `known` says whether it is that one.
    """

    name = "inception"
    width = 2048

    def __init__(self, weights: Path, pinned: bool = True, device: torch.device | str = "cpu") -> None:
        """Load `weights`, checked before it is opened.

        Raises MissingError if it is not there, IntegrityError for another hash (when pinned) or not these weights.
        """
        if not weights.is_file():
            raise MissingError(f"the Inception weights {weights} are not there", FETCH)
        self.sha256 = sha256_of(weights)
        self.known = self.sha256 == PUBLISHED_SHA256
        if pinned and not self.known:
            raise IntegrityError(f"{weights} has sha256 {self.sha256}, expected {PUBLISHED_SHA256}", FETCH)
        self._device = torch.device(device)
        self._trunk = _build(_read_state(weights), weights).to(self._device)

    @property
    def fingerprint(self) -> str:
        """Weights and preprocessing; says "unpinned" unless the weights are the published ones."""
        pin = "" if self.known else " unpinned"
        return f"inception-2015-12-05{pin} sha256:{self.sha256} {PREPROCESSING}"

    def __call__(self, images: Tensor) -> Tensor:
        """Features in full float32: no TF32, no autocast. Raises UsageError for anything but uint8 [B, 1 or 3, H, W]."""
        require_uint8_images(images)
        if images.shape[1] not in (1, 3):
            raise UsageError(f"Inception takes grey or RGB images, found {images.shape[1]} channels")
        rgb = images.to(self._device).expand(-1, 3, -1, -1)
        with torch.inference_mode(), tf32_off(), torch.autocast(self._device.type, enabled=False):
            features: Tensor = self._trunk(rgb)[0]
        return features


def _read_state(path: Path) -> dict[str, Tensor]:
    """State dict of a file that may be hostile: only tensors are unpickled, no code is run.

    Raises IntegrityError for anything but a mapping of names to tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile pickle can raise anything
        raise IntegrityError(f"{path} is not a readable weights file ({_one_line(error)})", FETCH) from None
    if not isinstance(state, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise IntegrityError(f"{path} does not hold a state dict of tensors", FETCH)
    return dict(state)


def _build(state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """torch-fidelity's network with `state`. Raises IntegrityError for missing, unexpected or misshapen tensors.

    Its constructor always unpickles a file without restriction, so it is handed one that we have just written ourselves.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    checked = io.BytesIO()
    torch.save(state, checked)
    checked.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):  # its initialisation must not shift anyone's random numbers
            trunk: nn.Module = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=checked)
    except RuntimeError as error:
        raise IntegrityError(f"{path} does not fit Inception-v3 ({_one_line(error)})", FETCH) from None
    return trunk


@contextmanager
def tf32_off() -> Iterator[None]:
    """True float32 convolutions inside the block (pool_3 has no other product): cuDNN's TF32 is on by default."""
    cudnn: Any = torch.backends.cudnn  # its annotations do not know `conv` yet
    before = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        cudnn.conv.fp32_precision = before


def _one_line(error: Exception) -> str:
    return shorten(str(error), 160, placeholder=" ...") or type(error).__name__
