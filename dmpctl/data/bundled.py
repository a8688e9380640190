"""Data that needs no download: the handwritten digits that come with scikit-learn."""

import hashlib

import torch
from torch import Tensor

from dmpctl.errors import UsageError
from dmpctl.images.inventory import Inventory

SIDE = 8


class Digits:
    """1 797 real handwritten digits, 8x8, ten classes (scikit-learn's `load_digits`: the UCI optdigits test set).

    Grey levels 0..16 become round(v * 255 / 16). `size` None or 8, else UsageError; `channels` None means 1,
    3 repeats the grey channel.
    """

    name = "digits"
    num_classes = 10
    mirror = False
    classes = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def __init__(self, size: int | None = None, channels: int | None = None) -> None:
        if size not in (None, SIDE):
            hint = f"leave --size out, or say --size {SIDE}"
            raise UsageError(f"the digits come at {SIDE}x{SIDE} pixels only, not at {size}x{size}", hint)
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        grey = (torch.from_numpy(pixels) * 255 / 16).round().to(torch.uint8).view(-1, 1, SIDE, SIDE)
        self._images = grey.repeat(1, channels or 1, 1, 1)
        self._labels = torch.from_numpy(labels).to(torch.int64)
        counts = dict(zip(self.classes, torch.bincount(self._labels).tolist(), strict=True))
        side = (SIDE, SIDE)
        self.inventory = Inventory(
            self.name, len(self), {}, True, side, side, counts, "scikit-learn", None, ["repeated to colour"] * (channels == 3), {}
        )
        self.fingerprint = hashlib.sha256(self._images.numpy().tobytes() + self._labels.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def item(self, index: int) -> tuple[Tensor, int]:
        """Image uint8 [C, 8, 8] and label 0..9."""
        return self._images[index], int(self._labels[index])

    def images(self) -> Tensor:
        """All images, uint8 [1797, C, 8, 8], not copied."""
        return self._images

    def labels(self) -> Tensor:
        """All labels, int64 [1797], not copied."""
        return self._labels
