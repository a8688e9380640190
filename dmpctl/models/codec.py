"""From the word after --codec to a codec, and what a backbone's file says of the one it was trained with."""

from dmpctl.codecs.identity import Identity
from dmpctl.codecs.vae import Vae
from dmpctl.errors import IntegrityError, UsageError
from dmpctl.runs.records import CodecRecord
from dmpctl.settings.model import Settings
from dmpctl.store.locate import locate, named
from dmpctl.store.shapes import LATENTS
from dmpctl.types import Codec

PIXELS = (1, 3)  # channels of a backbone that works on images as they are
PUBLISHED = {4: LATENTS}  # by latent channels: what the published DiTs were trained with


def codec_record(codec: Codec) -> CodecRecord:
    """Returns the record of a codec that is stored with a backbone."""
    return CodecRecord(name=codec.name, fingerprint=codec.fingerprint, scale=codec.scale)


def latent_record(codec: Codec) -> CodecRecord | None:
    """Returns the record of a codec; None for pixels as they are, of which nothing is stored."""
    return None if isinstance(codec, Identity) else codec_record(codec)


def open_codec(settings: Settings, channels: int | None = None, recorded: CodecRecord | None = None) -> Codec:
    """The codec that --codec names; no weights are loaded before the first image.

    `channels`: of the backbone's latents, None: it is still to be trained. `recorded`: `codec_record` of the codec it was
    trained with, None: its file does not say. UsageError where nothing says which codec, or it has another scale; MissingError
    where it was not fetched; IntegrityError where auto finds another than recorded.
    """
    given = settings.codec.codec
    automatic = given == "auto"
    codec = _opened(_automatic(channels, recorded) if automatic else given, settings)
    if recorded is not None and automatic and recorded.fingerprint not in (None, codec.fingerprint):
        raise IntegrityError(
            f"the codec {codec.name} has sha256 {codec.fingerprint}, the backbone was trained with {recorded.fingerprint}",
            "name the right one: --codec FOLDER",
        )
    if recorded is not None and codec.scale != recorded.scale:
        raise UsageError(
            f"the codec {codec.name} scales latents by {codec.scale}, the backbone's by {recorded.scale}", "leave --codec out"
        )
    return codec


def _automatic(channels: int | None, recorded: CodecRecord | None) -> str:
    if recorded is not None:
        return recorded.name
    if channels is None or channels in PIXELS:
        return Identity.name
    if channels in PUBLISHED:
        return PUBLISHED[channels]
    raise UsageError(f"nothing says which codec has latents of {channels} channels", "add --codec FOLDER")


def _opened(name: str, settings: Settings) -> Codec:
    if name == Identity.name:
        return Identity()
    folder = locate(name, "codec", settings)
    return Vae(folder, name if name in named("codec") else str(folder.absolute()), settings.codec.codec_batch)
