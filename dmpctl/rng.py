"""Everything random is a function of (seed, purpose, step or index): nothing to save, nothing to skip."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """Returns a 63-bit seed from its parts: stable across machines, processes and Python versions."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class StepDraws:
    """The noise of one training step, drawn for the whole global batch; a rank keeps its stride.

    So one process and N processes see the same noise. `size` is the global batch size.
    """

    def __init__(self, seed: int, size: int, rank: int = 0, world: int = 1) -> None:
        self.seed, self.size, self.mine = seed, size, slice(rank, None, world)
        self._generator = torch.Generator()

    def at(self, step: int, purpose: str) -> "StepDraws":
        """Rewinds to the stream of one purpose at one step, so that one draw never shifts another; returns itself."""
        self._generator.manual_seed(seed_of(self.seed, purpose, step))
        return self

    def normal(self, *shape: int) -> Tensor:
        """Returns standard normal noise [B, *shape] float32."""
        return torch.randn(self.size, *shape, generator=self._generator)[self.mine]

    def uniform(self) -> Tensor:
        """Returns uniform numbers in [0, 1), [B] float32."""
        return torch.rand(self.size, generator=self._generator)[self.mine]

    def integers(self, high: int) -> Tensor:
        """Returns uniform integers in [0, high), [B] int64."""
        return torch.randint(high, (self.size,), generator=self._generator)[self.mine]


class ImageDraws:
    """Noise of generated images: image i draws from its own generator (seed, i), whatever the batch."""

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self._generators = [torch.Generator().manual_seed(seed_of(seed, "image", i)) for i in indices]
        self._shape, self._device = shape, device

    def __call__(self) -> Tensor:
        """Returns the next standard normal noise [B, *shape] float32."""
        return torch.stack([torch.randn(self._shape, generator=g) for g in self._generators]).to(self._device)
