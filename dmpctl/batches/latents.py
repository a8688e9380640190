"""Images that are encoded already: the latent cache, as a source whose items are moments.

Stored as float16 by default. Against float32 that changes a mean by at most 2^-11 of itself (or 2^-25), and a standard
deviation exp(v / 2) by at most |v| / 2 * 2^-11 of itself: below 2e-4 for every v < 0. x0 changes by less than 1e-3 of its norm.
"""

from pathlib import Path

import torch
from torch import Tensor

from dmpctl.batches.shards import Rows, Scalar, Shards, per_shard_of
from dmpctl.errors import UsageError
from dmpctl.types import Codec, Moments, Ordered, Source

CROP = "adm-center"  # how images.transforms makes images square
KIND = "latents"


def pack(moments: Moments, dtype: torch.dtype) -> Tensor:
    """Mean and log variance as one tensor [B, 2C, h, w]; UsageError for a codec without variance, whose cache is of no use."""
    if moments.logvar is None:
        raise UsageError("this codec's latents are certain: there is nothing to cache", "add --no-latents")
    return torch.cat([moments.mean, moments.logvar], 1).to(dtype)


def unpack(packed: Tensor) -> Moments:
    """Moments, float32 [B, C, h, w] each, that `pack` put together."""
    mean, logvar = packed.to(torch.float32).chunk(2, 1)
    return Moments(mean, logvar)


def latent_shards(
    root: Path, source: Source, codec: Codec, flip: bool, dtype: torch.dtype = torch.float16, per_shard: int | None = None
) -> Shards:
    """The shards of these images' moments; `flip`: and of their mirrors'. `per_shard` None: as suits their size.

    The key is all that decides them. UsageError where the codec does not take such images.
    """
    channels, size, _ = source.item(0)[0].shape
    shape = codec.latent_shape(channels, size)
    item_bytes = (1 + flip) * 2 * shape[0] * shape[1] * shape[2] * dtype.itemsize
    key: dict[str, Scalar] = {
        "codec": codec.fingerprint,
        "scale": codec.scale,
        "data": source.fingerprint,
        "channels": channels,
        "size": size,
        "crop": CROP,
        "flip": flip,
        "dtype": str(dtype).removeprefix("torch."),
    }
    about: dict[str, Scalar] = {"codec": codec.name, "data": source.name, "num_classes": source.num_classes}
    about["item_bytes"] = item_bytes
    return Shards(root, KIND, key, len(source), per_shard or per_shard_of(item_bytes), about)


class LatentCache:
    """The moments of a source's images, memory-mapped: items are [2C, h, w] (mean, then log variance) and a label.

    `source`: whose images they are, read in its order, so that training sees the same with and without the cache; None: in any.
    Raises IntegrityError where a shard is missing; whole shards are trusted (see `batches.shards`).
    """

    def __init__(self, shards: Shards, source: Source | None = None) -> None:
        self._shards, self._order_of = shards, source if isinstance(source, Ordered) else None
        self.name, self.num_classes = str(shards.about["data"]), int(shards.about["num_classes"])
        self.mirror, self.fingerprint = bool(shards.key["flip"]), shards.digest
        self._views = 1 + self.mirror
        parts = shards.tensors()
        self._rows = Rows([part["moments"].flatten(0, 1) for part in parts], shards.per_shard * self._views)
        self._labels = torch.cat([part["labels"] for part in parts])

    def __reduce__(self) -> tuple[type["LatentCache"], tuple[Shards, Ordered | None]]:
        return LatentCache, (self._shards, self._order_of)  # a process that it is sent to maps the files itself

    def __len__(self) -> int:
        return self._shards.count

    def item(self, index: int) -> tuple[Tensor, int]:
        """Moments [2C, h, w] of an image that is not mirrored, and its label."""
        index = range(len(self))[index]
        return self._rows.gather(torch.tensor([index * self._views]))[0], int(self._labels[index])

    def labels(self) -> Tensor:
        """All labels, int64 [N], not copied."""
        return self._labels

    def order(self, generator: torch.Generator) -> Tensor:
        """The order of one epoch, int64 [n]."""
        if self._order_of is None:
            return torch.randperm(len(self), generator=generator)
        return self._order_of.order(generator)

    def gather(self, indices: Tensor, mirrored: Tensor) -> Tensor:
        """Moments [B, 2C, h, w] of images int64 [B], mirrored where bool [B] says so; UsageError if mirrors are not kept."""
        if not self.mirror:
            if mirrored.any():
                raise UsageError("these latents were cached without mirrored images", "add --no-hflip, or --no-latents")
            return self._rows.gather(indices)
        return self._rows.gather(2 * indices + mirrored)
