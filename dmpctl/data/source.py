"""From the word after --data to a source."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

from dmpctl.data.beside import METADATA
from dmpctl.data.bundled import Digits
from dmpctl.data.coco import CocoReader, captions_file
from dmpctl.data.folder import FolderReader
from dmpctl.data.tar import TarReader
from dmpctl.errors import UsageError
from dmpctl.images.reader import Reader
from dmpctl.images.scan import OUTWARD, ImageFile, Listing, scan
from dmpctl.images.stored import OwnSize, StoredImages
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Data
from dmpctl.store.locate import NAME_DATA, CocoFiles, HubRows, locate_data
from dmpctl.tables.columns import Columns
from dmpctl.tables.hub_rows import hub_rows, stream_hub
from dmpctl.tables.parquet import holds_images, parquet_rows
from dmpctl.tables.stream import StreamedImages, StreamReader, stream_files
from dmpctl.types import Source
from dmpctl.words import printable

SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval"),
}


def open_source(
    section: Data, size: int | None, channels: int | None, settings: Settings | None = None, own: OwnSize = "never"
) -> Source:
    """Returns the source that `section.data` names: bundled, published (ffhq, coco, hf://...), or local images, parquet or tar.

    `size` and `channels` are what the backbone wants; None: the section's own, and failing that the data's. `settings`: with
    the user's own rows of the registry, None: the shipped ones. `own` as for `StoredImages`.
    Raises UsageError for no name or an unknown one, MissingError for what is not there, and what the source raises.
    """
    if section.data is None:
        raise UsageError("no data is named", NAME_DATA)
    size, channels = size or section.size, channels or section.channels
    if channels not in (None, 1, 3):
        raise UsageError(f"images have 1 or 3 channels, not {channels}", "this backbone does not work on pixels: name its codec")
    found = locate_data(section.data, settings, section.streaming)
    if found == "digits":
        return Digits(size if own == "never" else None, channels)
    reader = _reader(found, section)
    if isinstance(reader, StreamReader):
        return StreamedImages(reader, size, channels, section.on_bad)
    return StoredImages(reader, size, channels, section.on_bad, own=own)


def _columns(section: Data) -> Columns:
    return Columns(section.image_column, section.label_column, section.caption_column)


def _reader(found: CocoFiles | HubRows | Path, section: Data) -> Reader:
    match found:
        case CocoFiles(images, captions, split):
            return CocoReader(images, captions, split)
        case HubRows():
            return (stream_hub if section.streaming else hub_rows)(found, _columns(section))
        case Path():
            return folder_reader(found, section)
        case _:
            assert_never(found)


def folder_reader(path: Path, section: Data) -> Reader:
    """The reader of what lies at a path: the one kind of data there is."""
    columns, follow, shown = _columns(section), section.follow_links, printable(str(path))
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return (stream_files if section.streaming else parquet_rows)(path, columns, follow=follow)
        _refuse_streaming(section, shown)
        return TarReader(path, columns) if path.suffix.lower() == ".tar" else FolderReader(path)
    if (captions := captions_file(path)) is not None:
        _refuse_streaming(section, shown)
        name = captions.stem.removeprefix("captions_")
        return CocoReader(path / name, captions, name)
    found = scan(path, follow)
    kind, files = kind_in(path, found, shown)
    if kind == "parquet":
        return (stream_files if section.streaming else parquet_rows)(path, columns, follow=follow)
    _refuse_streaming(section, shown)
    said = any(file.name in METADATA for others in found.others.values() for file in others)
    split, inside = None if said else split_in([file.name for file in files], shown), found
    if split is not None:
        path, inside = path / split, scan(path / split, follow)
    reader: Reader
    if kind == "tar":
        if wrong := [file for file in files if file.wrong == OUTWARD]:
            raise UsageError(f"{printable(wrong[0].name)} in {shown} is {OUTWARD}", "if you trust the links, add --follow-links")
        reader = TarReader(path, columns, [path / file.name for file in inside.others[".tar"]])
        reader.unused |= {name: [file.name for file in others] for name, others in inside.others.items() if name != ".tar"}
    else:
        reader = FolderReader(path, columns, inside)
    if split is not None:
        reader.assumed.append(f"those of {printable(split)}/")
        for name, others in found.others.items():
            beside = [file.name for file in others if not file.name.startswith(split + "/")]
            reader.unused[name] = [*beside, *reader.unused.get(name, ())]
    return reader


def kind_in(path: Path, found: Listing, shown: str) -> tuple[str, Sequence[ImageFile]]:
    """Returns the kind of data in a folder ("images", "tar", "parquet") and its files; UsageError where there are two kinds.

    Parquet without a column of images, beside images or tar files, is no data of its own: metadata, as img2dataset writes it.
    """
    tars = found.others.get(".tar", ())
    tables = [file for file in found.others.get(".parquet", ()) if os.path.basename(file.name) not in METADATA]
    if found.images or tars:
        first = {os.path.dirname(file.name): file for file in reversed(tables)}  # of each folder
        tables = [file for file in first.values() if file.wrong or holds_images(path / file.name)]
    kinds = [(kind, files) for kind, files in (("images", found.images), ("tar", tars), ("parquet", tables)) if files]
    if len(kinds) > 1:
        words = " and ".join(f"{kind} ({len(files)}, such as {printable(files[0].name)})" for kind, files in kinds)
        other = kinds[1][1][0].name
        hint = f"name one: --data {printable(str(path / other))}, or move it away to use the {kinds[0][0]}"
        raise UsageError(f"{shown} holds data of {len(kinds)} kinds, {words}", hint)
    return kinds[0] if kinds else ("images", ())


def split_in(names: Sequence[str], shown: str) -> str | None:
    """Returns the sub-folder that all of these files lie in, if it is called like a split; UsageError where there are more.

    A folder called so among others of other names is one of them: a class.
    """
    tops = list(dict.fromkeys(name.split("/")[0] for name in names))
    splits = {word: top for top in reversed(tops) if (word := split_word(top)) is not None}
    if len(splits) > 1:
        there, one = " and ".join(map(printable, reversed(splits.values()))), next(reversed(splits.values()))
        hint = "put each into a folder of its own" if one.endswith(".tar") else f"name one: --data {shown}/{printable(one)}"
        raise UsageError(f"{shown} holds several splits: {there}", hint)
    inner = sorted({split for name in names if name.count("/") > 1 and (split := split_word(name.split("/")[1]))})
    if len(inner) > 1:
        raise UsageError(
            f"{shown} holds several splits in each folder: {' and '.join(inner)}", "put each into a folder of its own"
        )
    return tops[0] if len(tops) == 1 and splits and names[0] != tops[0] else None


def split_word(name: str) -> str | None:
    """Returns which split a folder or shard is called after (train, validation, test), None: after none."""
    words = re.split(r"[-_. ]|(?<=[a-z])(?=\d)", name.lower())
    words = words if name.lower().endswith(".tar") else words[:1] if all(word.isdigit() for word in words[1:]) else []
    return next((split for word in words for split, called in SPLITS.items() if word in called), None)


def _refuse_streaming(section: Data, shown: str) -> None:
    if section.streaming:
        raise UsageError(f"{shown} is read where it lies already", "leave --streaming out")
