"""`dmpctl download DATA --latents CODEC`: the latent cache that patch and pretrain read, built before they ask for it."""

from collections.abc import Sequence
from typing import Any

from dmpctl.batches.latents import latent_shards
from dmpctl.codecs.identity import Identity
from dmpctl.codecs.vae import CHANNELS
from dmpctl.data.source import open_source
from dmpctl.errors import UsageError
from dmpctl.files import amount
from dmpctl.images.inventory import told
from dmpctl.images.stored import left_out_words
from dmpctl.models.codec import open_codec
from dmpctl.models.encode import build_latents
from dmpctl.processes.command import again_command
from dmpctl.processes.ranks import resolve_device
from dmpctl.settings.model import Settings
from dmpctl.store.cache import cache_dir
from dmpctl.store.download import accept_licences, fetched, requested
from dmpctl.store.registry import registry_of
from dmpctl.types import Codec, Progress, Report, Source


def encode_ahead(settings: Settings, names: Sequence[str], progress: Progress) -> Report:
    """Fetch the images that are named (as after --data) and the codec, then encode what the latent cache lacks of them.

    UsageError without images, for a codec of pixels or one that does not fit; otherwise as `download` and `build_latents`.
    """
    word = settings.download.encode_with or ""
    if not names:
        raise UsageError("--latents needs the images to encode", f"dmpctl download ffhq --latents {word} --size 256")
    if word in (Identity.name, "auto"):
        raise UsageError(f"--latents {word} names no codec whose latents can be kept", "take vae-ema, vae-mse or a folder")
    rows = registry_of(settings)
    if others := [name for name in names if name in rows and rows[name].kind != "data"]:
        raise UsageError(f"{others[0]} holds no images to encode", f"fetch it by itself: dmpctl download {others[0]}")
    request = requested(settings, [name for name in (*names, word) if name in rows])
    accept_licences(request)
    report = fetched(request, progress)
    if report.data["would_fetch"]:  # a dry run can look no further
        return Report(report.data, report.table, ("dry run: nothing was written",))
    codec = open_codec(settings.model_copy(update={"codec": settings.codec.model_copy(update={"codec": word})}))
    data = [settings.data.model_copy(update={"data": name}) for name in names]
    sources = [open_source(each, settings.data.size, CHANNELS, settings) for each in data]  # all, before the first is encoded
    made = [_encoded(source, codec, settings, progress) for source in sources]
    table = tuple({key: str(row[key]) for key in ("data", "codec", "images", "size", "folder")} for row in made)
    lines = ("dry run: nothing was written",) if settings.console.dry_run else ()
    return Report({"files": report.data["files"], "latents": made, "dry_run": settings.console.dry_run}, table, lines)


def _encoded(source: Source, codec: Codec, settings: Settings, progress: Progress) -> dict[str, Any]:
    """Encode what is missing (in a dry run: nothing), and say what there is then."""
    flip = settings.data.hflip
    shards = latent_shards(cache_dir(), source, codec, source.mirror if flip is None else flip)
    total = len(source) * int(shards.about["item_bytes"])
    told(source, progress)
    for line in left_out_words(source):
        progress.say(line)
    if not settings.console.dry_run:
        options: dict[str, Any] = {"device": resolve_device(settings.launch), "batch": settings.codec.codec_batch}
        options |= {"num_workers": settings.data.num_workers, "again": again_command(), "flip": flip}
        build_latents(source, codec, cache_dir(), progress, **options)
    about = {"data": source.name, "codec": codec.name, "images": len(source), "mirrors": bool(shards.key["flip"])}
    return about | {"key": shards.digest, "size": amount(total), "bytes": total, "folder": str(shards.folder)}
