"""Captions that are encoded already: the text encoder runs once, and training reads its states as it reads latents."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dmpctl.batches.shards import Rows, Scalar, Shards, per_shard_of
from dmpctl.images.captions import drawn
from dmpctl.types import TextSpec

KIND = "conditions"
NULL = ""  # the null caption, for guidance; cached behind all others


class CaptionNumbers:
    """Numbers of the captions that images have in each epoch, counted image by image, `counts[i]` of image i.

    A function of (seed, epoch, image), as `captions.drawn` is; the null caption's number where there is none.
    """

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        self._counts, self._seed = torch.tensor(counts, dtype=torch.int64), seed
        self._starts = self._counts.cumsum(0) - self._counts

    def at(self, epochs: Tensor, indices: Tensor) -> Tensor:
        """int64 [B] of images int64 [B] in epochs int64 [B]."""
        counts, starts, null = self._counts[indices].tolist(), self._starts[indices].tolist(), int(self._counts.sum())
        numbers = (
            start + drawn(count, self._seed, epoch, index) if count else null
            for epoch, index, start, count in zip(epochs.tolist(), indices.tolist(), starts, counts, strict=True)
        )
        return torch.tensor(list(numbers))


def captions_fingerprint(captions: Sequence[str]) -> str:
    """sha256 over the captions in their order."""
    digest = hashlib.sha256()
    for caption in captions:
        data = caption.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def condition_shards(
    root: Path, encoder: str, revision: str, states: TextSpec, captions: Sequence[str], per_shard: int | None = None
) -> Shards:
    """The shards of the states of these captions, and of the null caption after them. `per_shard` None: as suits their size.

    `encoder`: the name of what makes the states, `revision` the sha256 of its files.
    """
    key: dict[str, Scalar] = {
        "encoder": encoder,
        "revision": revision,
        "max_length": states.tokens,
        "width": states.width,
        "captions": captions_fingerprint(captions),
        "dtype": "float16",
    }
    item_bytes = states.tokens * (2 * states.width + 1)
    return Shards(root, KIND, key, len(captions) + 1, per_shard or per_shard_of(item_bytes), {"item_bytes": item_bytes})


class ConditionCache:
    """States of captions, memory-mapped. Raises IntegrityError where a shard is missing."""

    def __init__(self, shards: Shards) -> None:
        self._shards, self.fingerprint, parts = shards, shards.digest, shards.tensors()
        self._states, self._masks = (Rows([part[name] for part in parts], shards.per_shard) for name in ("states", "mask"))

    def __reduce__(self) -> tuple[type["ConditionCache"], tuple[Shards]]:
        return ConditionCache, (self._shards,)  # a process that it is sent to maps the files itself

    def __len__(self) -> int:
        return self._shards.count - 1

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """States float16 [B, T, D] and mask bool [B, T] of captions int64 [B]."""
        return self._states.gather(indices), self._masks.gather(indices)
