"""From the word after --data to images, in the size and channels that a backbone takes."""

from functools import partial
from pathlib import Path

from dmpctl.data.source import NAMES, open_source
from dmpctl.errors import UsageError
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Data
from dmpctl.store.assets import require
from dmpctl.types import BackboneSpec, Codec, Source


def own_data(data: Data, settings: Settings) -> Data:
    """The same, with a row of the user's own (kind "data") as what can be opened without it: a path, or an hf:// address.

    MissingError with the command that fetches it; UsageError for a row that is no data.
    """
    rows = {row.name: row for row in settings.assets.rows}
    name = data.data
    if name not in rows or name in NAMES or Path(name).expanduser().exists():
        return data  # a row of a published name changes what is fetched under it, not how it is found
    row = rows[name]
    if row.kind != "data":
        raise UsageError(f"--data {name} is a row of kind {row.kind}", 'give that row kind = "data"')
    place = f"hf://{row.repo}@{row.revision or 'main'}" if row.repo is not None else str(require(name, settings))
    return data.model_copy(update={"data": place})


def open_images(data: Data, size: int | None, channels: int | None, settings: Settings | None = None) -> Source:
    """The images that `data` names; what is published is looked for in the cache of downloads. Raises as `open_source` does.

    `size` and `channels` None: the data's own. `settings`: with the user's own rows of the registry, None: the shipped ones.
    """
    own = data if settings is None else own_data(data, settings)
    return open_source(own, size, channels, partial(require, settings=settings))


def open_data(data: Data, spec: BackboneSpec, codec: Codec, trained_on: str | None, settings: Settings | None = None) -> Source:
    """The images to train on, in the size and channels the backbone takes; `trained_on`: the default for --data.

    `settings` as for `open_images`.
    """
    name = data.data or trained_on
    if name is None:
        raise UsageError("nothing says which images to patch on", "add --data digits or --data DIR")
    channels, height, _ = codec.image_shape(spec.latent_shape)
    if data.size not in (None, height):
        raise UsageError(f"this backbone takes {height}x{height} images, --size says {data.size}", "leave --size out")
    if data.channels not in (None, channels):
        raise UsageError(
            f"this backbone takes images of {channels} channels, --channels says {data.channels}", "leave --channels out"
        )
    source = open_images(data.model_copy(update={"data": name}), height, channels, settings)
    if spec.num_classes and source.num_classes != spec.num_classes:
        raise UsageError(
            f"this backbone has {spec.num_classes} classes, {source.name} has {source.num_classes or 'none'}",
            "name data with the classes that it was trained on, in the same order",
        )
    return source
