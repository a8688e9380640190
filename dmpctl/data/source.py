"""From the word after --data to a source."""

import difflib
import os

from dmpctl.data.bundled import Digits
from dmpctl.data.folder import ImageFolder
from dmpctl.data.scan import printable
from dmpctl.errors import MissingError, UsageError
from dmpctl.settings.sections import Data
from dmpctl.types import Source

BUNDLED = ("digits",)
HINT = "say --data digits, or give a folder of PNG/JPEG images"


def open_source(section: Data, size: int | None, channels: int | None) -> Source:
    """The source that `section.data` names: a bundled one, or a folder of images.

    `size` and `channels` are what the backbone wants; None: the section's own, and failing that the data's.
    Raises UsageError for no name or an unknown one, MissingError for a path that is not there, and what the source raises.
    """
    name = section.data
    if name is None:
        raise UsageError("no data is named", HINT)
    size, channels = size or section.size, channels or section.channels
    if channels not in (None, 1, 3):
        raise UsageError(f"images have 1 or 3 channels, not {channels}", "this backbone does not work on pixels: name its codec")
    if name in BUNDLED:
        return Digits(size, channels)
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return ImageFolder(path, size, channels, section.on_bad)
    shown = printable(name)
    if any(separator in name for separator in (os.sep, os.altsep, "/") if separator):
        raise MissingError(f"there is no folder {shown}", "check --data")
    near = difflib.get_close_matches(name, BUNDLED, n=1)
    known = f"; the nearest is {near[0]!r}" if near else f"; there is {', '.join(BUNDLED)}"
    raise UsageError(f"no data is called {shown!r}{known}", HINT)
