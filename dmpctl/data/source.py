"""From the word after --data to a source."""

import os
from pathlib import Path
from typing import assert_never

from dmpctl.data.bundled import Digits
from dmpctl.data.coco import CocoReader, captions_file
from dmpctl.data.columns import Columns
from dmpctl.data.folder import FolderReader
from dmpctl.data.hub_rows import hub_rows, stream_hub
from dmpctl.data.parquet import parquet_rows
from dmpctl.data.stream import StreamedImages, StreamReader, stream_files
from dmpctl.data.tar import TarReader
from dmpctl.errors import UsageError
from dmpctl.images.reader import Reader
from dmpctl.images.scan import EXTENSIONS
from dmpctl.images.stored import StoredImages
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Data
from dmpctl.store.locate import NAME_DATA, CocoFiles, HubRows, locate_data
from dmpctl.types import Source
from dmpctl.words import printable

KINDS = {".parquet": "parquet", ".tar": "tar", **dict.fromkeys(EXTENSIONS, "images")}
LOOKED_INTO = 100  # sub-folders that are looked into to tell what a folder holds


def open_source(section: Data, size: int | None, channels: int | None, settings: Settings | None = None) -> Source:
    """Returns the source that `section.data` names: bundled, published (ffhq, coco, hf://...), or local images, parquet or tar.

    `size` and `channels` are what the backbone wants; None: the section's own, and failing that the data's. `settings`: with
    the user's own rows of the registry, None: the shipped ones.
    Raises UsageError for no name or an unknown one, MissingError for what is not there, and what the source raises.
    """
    if section.data is None:
        raise UsageError("no data is named", NAME_DATA)
    size, channels = size or section.size, channels or section.channels
    if channels not in (None, 1, 3):
        raise UsageError(f"images have 1 or 3 channels, not {channels}", "this backbone does not work on pixels: name its codec")
    found = locate_data(section.data, settings, section.streaming)
    if found == "digits":
        return Digits(size, channels)
    reader = _reader(found, section)
    if isinstance(reader, StreamReader):
        return StreamedImages(reader, size, channels, section.on_bad)
    return StoredImages(reader, size, channels, section.on_bad)


def _reader(found: CocoFiles | HubRows | Path, section: Data) -> Reader:
    columns = Columns(section.image_column, section.label_column, section.caption_column)
    match found:
        case CocoFiles(images, captions, split):
            return CocoReader(images, captions, split)
        case HubRows():
            return (stream_hub if section.streaming else hub_rows)(found, columns)
        case Path():
            return _local(found, columns, section.streaming)
        case _:
            assert_never(found)


def kind_of(folder: Path) -> str:
    """Returns "images", "parquet" or "tar": the kind of the first file in a folder that is one of these, in the order of names.

    Files of the folder itself go before those of its first sub-folders; what cannot be listed has none.
    """
    for place, inside, names in os.walk(folder, followlinks=True):
        for name in sorted(names):
            if not name.startswith(".") and (kind := KINDS.get(os.path.splitext(name)[1].lower())):
                return kind
        shown = sorted(name for name in inside if not name.startswith("."))
        inside[:] = shown[:LOOKED_INTO] if Path(place) == folder else []
    return "images"


def _local(path: Path, columns: Columns, streaming: bool) -> Reader:
    captions = captions_file(path)
    if captions is not None:
        split = captions.stem.removeprefix("captions_")
        return CocoReader(path / split, captions, split)
    kind = KINDS.get(path.suffix.lower()) if path.is_file() else kind_of(path)
    if kind == "parquet":
        return (stream_files if streaming else parquet_rows)(path, columns)
    if streaming:
        raise UsageError(f"{printable(str(path))} is read where it lies already", "leave --streaming out")
    return TarReader(path, columns) if kind == "tar" else FolderReader(path)
