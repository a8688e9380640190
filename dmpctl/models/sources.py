"""From the word after --data to images, in the size and channels that a backbone takes."""

from dmpctl.data.source import open_source
from dmpctl.errors import UsageError
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Data
from dmpctl.types import BackboneSpec, Codec, Source


def open_data(data: Data, spec: BackboneSpec, codec: Codec, trained_on: str | None, settings: Settings | None = None) -> Source:
    """The images to train on, in the size and channels the backbone takes; `trained_on`: the default for --data.

    `settings` as for `open_source`.
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
    source = open_source(data.model_copy(update={"data": name}), height, channels, settings)
    if spec.num_classes and source.num_classes != spec.num_classes:
        raise UsageError(
            f"this backbone has {spec.num_classes} classes, {source.name} has {source.num_classes or 'none'}",
            "name data with the classes that it was trained on, in the same order",
        )
    return source
