"""From the word after --data to images, in the size and channels that a backbone takes."""

from dmpctl.data.source import open_source
from dmpctl.errors import UsageError
from dmpctl.images.inventory import inventory_of, told
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Data
from dmpctl.store.locate import BUNDLED
from dmpctl.types import BackboneSpec, Codec, Progress, Silent, Source

SILENT, MOST_SHRUNK = Silent(), 4


def open_data(
    data: Data,
    spec: BackboneSpec,
    codec: Codec,
    trained_on: str | None,
    settings: Settings | None = None,
    progress: Progress = SILENT,
) -> Source:
    """The images to train on, in the size and channels the backbone takes; `trained_on`: the default for --data.

    `settings` as for `open_source`. What was found is said.
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
    takes = ["labels"] * bool(spec.num_classes) + ["captions"] * (spec.text is not None)
    told(source, progress, takes, ": the backbone takes none")
    return source


def refuse_loss(source: Source, data: Data, base: str) -> None:
    """UsageError for images of colour, or more than MOST_SHRUNK times as large, on the bundled backbone, which is the default.

    Whoever names another backbone, or --size and --channels, means them.
    """
    found, (channels, side, _) = inventory_of(source), source.item(0)[0].shape
    if found is None or base not in BUNDLED or None not in (data.size, data.channels):
        return
    if (channels == 1 and not found.grey) or min(found.smallest) > MOST_SHRUNK * side:
        kind = "grey" if found.grey else "colour"
        raise UsageError(
            f"{found.name} has {kind} images of {found.smallest[0]}x{found.smallest[1]} pixels, the backbone {base} is for grey "
            f"ones of {side}x{side}",
            f"name a backbone for such images with --base, or say that you mean it: --size {side} --channels {channels}",
        )
