"""Building what is cached in shards: latents of images, states of captions. Several processes share the work, through the disk.

Each takes shards that nobody else has, waits for the others at the end, and goes on with what a process left that died.
What is finished stays: an interrupted build goes on at the shards that are missing.
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from dmpctl.batches.caption_states import NULL, ConditionCache, condition_shards
from dmpctl.batches.latents import LatentCache, latent_shards, pack
from dmpctl.batches.loader import in_order
from dmpctl.batches.shards import Claims, Shards
from dmpctl.codecs.identity import Identity
from dmpctl.codecs.text import TextEncoder
from dmpctl.errors import NumericalError
from dmpctl.files import make_folder
from dmpctl.processes.stop import Stop
from dmpctl.settings.model import Settings
from dmpctl.store.cache import cache_dir, need_room
from dmpctl.types import Codec, Progress, ProgressTask, Source, TextSpec

POLL = 0.2  # sec between two looks at what other processes have finished
Batch = dict[str, Tensor]  # named tensors [B, ...] of consecutive items
Make = Callable[[range], Generator[Batch, None, None]]  # the batches of some items, in order


def training_source(
    settings: Settings, source: Source, codec: Codec, device: torch.device | str, progress: Progress, again: str
) -> Source:
    """Returns the source that training reads: the latent cache of these images, built on first use.

    The images themselves for a codec that costs nothing, or under --no-latents. Raises as `build_latents` does.
    """
    if isinstance(codec, Identity) or not settings.codec.latents:
        return source
    flip, batch, workers = settings.data.hflip, settings.codec.codec_batch, settings.data.num_workers
    return build_latents(
        source, codec, cache_dir(), progress, flip=flip, device=device, batch=batch, num_workers=workers, again=again
    )


def build_latents(
    source: Source,
    codec: Codec,
    cache_root: Path,
    progress: Progress,
    *,
    flip: bool | None = None,
    device: torch.device | str = "cpu",
    batch: int = 32,
    num_workers: int = 0,
    again: str = "the same command",
    dtype: torch.dtype = torch.float16,
    per_shard: int | None = None,
) -> LatentCache:
    """The latent cache of these images under `cache_root`, after encoding what it lacks, `batch` images at once on `device`.

    `flip`: mirrored images too, None: if the source may be mirrored. `num_workers`: processes that decode images.
    `again`: the command that goes on after an interruption. `per_shard` None: what suits their size.
    Raises UsageError for a disk too small or a codec that does not fit, NumericalError for latents that are not finite,
    Interrupted after a signal, and what the source raises.
    """
    shards = latent_shards(cache_root, source, codec, source.mirror if flip is None else flip, dtype, per_shard)

    @torch.no_grad()
    def make(items: range) -> Generator[Batch, None, None]:
        first = items.start
        with closing(in_order(source, items, batch, num_workers)) as loaded:
            for images, labels in loaded:
                on_device = images.to(device)
                views = (on_device, on_device.flip(-1)) if shards.key["flip"] else (on_device,)
                moments = torch.stack([pack(codec.encode(view), dtype) for view in views], 1).cpu()
                finite = moments.isfinite().flatten(1).all(1)
                if not finite.all():
                    number = first + int(finite.int().argmin())
                    raise NumericalError(f"{codec.name} gives latents of image {number} of {source.name} that are not finite")
                yield {"moments": moments, "labels": labels}
                first += len(labels)

    fill(shards, make, progress, f"encoding {source.name}", again)
    return LatentCache(shards, source)


def build_conditions(
    captions: Sequence[str],
    encoder: TextEncoder,
    cache_root: Path,
    progress: Progress,
    *,
    batch: int = 32,
    again: str = "the same command",
    per_shard: int | None = None,
) -> ConditionCache:
    """The states of these captions and of the null caption under `cache_root`, after encoding what it lacks."""
    states, every = TextSpec(encoder.max_length, encoder.width), [*captions, NULL]
    shards = condition_shards(cache_root, encoder.name, encoder.revision, states, captions, per_shard)

    @torch.no_grad()
    def make(items: range) -> Generator[Batch, None, None]:
        for first in range(items.start, items.stop, batch):
            found, mask = encoder(every[first : min(first + batch, items.stop)])
            found = found.to(torch.float16).cpu()
            if not found.isfinite().all():
                raise NumericalError(f"{encoder.name} gives states of captions {first} and on that are not finite")
            yield {"states": found, "mask": mask.cpu()}

    fill(shards, make, progress, "encoding captions", again)
    return ConditionCache(shards)


def fill(shards: Shards, make: Make, progress: Progress, what: str, again: str) -> None:
    """Make the shards that are missing, with other processes that do the same; returns when all are there."""
    there = shards.finished()
    if shards.damaged:
        progress.say(f"warning: damaged in {shards.folder}: {', '.join(sorted(shards.damaged)[:3])}; {what} anew")
    if len(there) == len(shards):
        return
    make_folder(shards.folder)
    before = sum(len(shards.items(shard)) for shard in there)
    need_room(shards.folder, (shards.count - before) * int(shards.about["item_bytes"]), f"{what} once and for all")
    shown = progress.track(what, shards.count, before)

    def done() -> str:
        return f"{sum(len(shards.items(shard)) for shard in shards.finished())} of {shards.count} are kept"

    with Stop(done, f"go on with: {again}") as stop, Claims(shards) as claims, shown as task:
        while missing := sorted(set(range(len(shards))) - there):
            mine = next((shard for shard in missing if claims.take(shard)), None)
            if mine is None:
                time.sleep(POLL)
            elif mine not in shards.finished():  # another may have finished it before we took it
                parts = _made(make(shards.items(mine)), stop, task)
                if sum(map(_length, parts)) == len(shards.items(mine)):  # else a signal came
                    shards.write(mine, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
                    there = there | {mine}
            if mine is not None:
                claims.give_back(mine)
            stop.check()
            if elsewhere := shards.finished() - there:
                task.advance(sum(len(shards.items(shard)) for shard in elsewhere))
                there = there | elsewhere


def _length(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _made(batches: Generator[Batch, None, None], stop: Stop, task: ProgressTask) -> list[Batch]:
    """All batches, or those before a signal."""
    parts, count, since = list[Batch](), 0, time.perf_counter()
    with closing(batches):
        while not (parts and stop.got):
            with stop.soon():
                part = next(batches, None)
            if part is None:
                break
            parts.append(part)
            count += _length(part)
            task.advance(_length(part), **{"images/s": count / (time.perf_counter() - since)})
    return parts
