"""From the word after --codec to a codec, and what a backbone's file says of the one it was trained with."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dmpctl.codecs.identity import Identity
from dmpctl.codecs.vae import Vae
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.settings.sections import Codec as CodecSection
from dmpctl.types import Codec

PIXELS = (1, 3)  # channels of a backbone that works on images as they are
PUBLISHED = {4: "vae-ema"}  # by latent channels: what the published DiTs were trained with
ASSETS = ("vae-ema", "vae-mse")


def codec_record(codec: Codec) -> dict[str, Any]:
    """What is stored of its codec with a backbone: name, fingerprint, scale."""
    return {"name": codec.name, "fingerprint": codec.fingerprint, "scale": codec.scale}


def latent_record(codec: Codec) -> dict[str, Any] | None:
    """The same; None for pixels as they are, of which nothing is stored."""
    return None if isinstance(codec, Identity) else codec_record(codec)


def open_codec(
    section: CodecSection, locate: Callable[[str], Path], channels: int | None = None, recorded: Mapping[str, Any] | None = None
) -> Codec:
    """The codec that `section.codec` names; no weights are loaded before the first image.

    `locate` gives the folder of vae-ema or vae-mse, and raises MissingError. `channels`: of the backbone's latents, None: it is
    still to be trained. `recorded`: `codec_record` of the codec it was trained with, None: its file does not say.
    UsageError where nothing says which codec, or it has another scale; IntegrityError where auto finds another than recorded.
    """
    automatic = section.codec == "auto"
    codec = _named(_automatic(channels, recorded) if automatic else section.codec, section.codec_batch, locate)
    if recorded is not None and automatic and codec.fingerprint != recorded["fingerprint"]:
        raise IntegrityError(
            f"the codec {codec.name} has sha256 {codec.fingerprint}, the backbone was trained with {recorded['fingerprint']}",
            "name the right one: --codec FOLDER",
        )
    if recorded is not None and codec.scale != recorded["scale"]:
        raise UsageError(
            f"the codec {codec.name} scales latents by {codec.scale}, the backbone's by {recorded['scale']}", "leave --codec out"
        )
    return codec


def _automatic(channels: int | None, recorded: Mapping[str, Any] | None) -> str:
    if recorded is not None:
        return str(recorded["name"])
    if channels is None or channels in PIXELS:
        return Identity.name
    if channels in PUBLISHED:
        return PUBLISHED[channels]
    raise UsageError(f"nothing says which codec has latents of {channels} channels", "add --codec FOLDER")


def _named(name: str, batch: int, locate: Callable[[str], Path]) -> Codec:
    if name == Identity.name:
        return Identity()
    if name in ASSETS:
        return Vae(locate(name), name, batch)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Vae(folder, str(folder.absolute()), batch)
    if folder.name != name:
        raise MissingError(f"there is no folder {name} with a codec", "name it with --codec FOLDER")
    near = get_close_matches(name, (Identity.name, *ASSETS), 1)
    known = f"one of auto, {Identity.name}, {', '.join(ASSETS)}, or a folder"
    raise UsageError(f"--codec {name} is no known codec and no folder", f"did you mean {near[0]}?" if near else f"name {known}")
