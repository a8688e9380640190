"""From the word after --data to a source."""

import difflib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from dmpctl.data.bundled import Digits
from dmpctl.data.coco import CocoReader, captions_file
from dmpctl.data.columns import Columns
from dmpctl.data.folder import FolderReader
from dmpctl.data.hub_rows import KNOWN, SCHEME, HubSet, hub_rows, parse, stream_hub
from dmpctl.data.parquet import parquet_rows
from dmpctl.data.stream import StreamedImages, StreamReader, stream_files
from dmpctl.data.tar import TarReader
from dmpctl.errors import MissingError, UsageError
from dmpctl.images.reader import Reader
from dmpctl.images.scan import EXTENSIONS, printable
from dmpctl.images.stored import StoredImages
from dmpctl.settings.sections import Data
from dmpctl.types import Source

BUNDLED = ("digits",)
COCO = {"coco": "train2014", "coco-val": "val2014"}
NAMES = (*BUNDLED, *COCO, *KNOWN)
HINT = "say --data digits, give a folder of PNG/JPEG images, or a data set of the Hub: --data hf://owner/name"
KINDS = {".parquet": "parquet", ".tar": "tar", **dict.fromkeys(EXTENSIONS, "images")}
LOOKED_INTO = 100  # sub-folders that are looked into to tell what a folder holds

Find = Callable[[str], Path]  # where what was downloaded under a name lies; raises MissingError


def open_source(section: Data, size: int | None, channels: int | None, find: Find | None = None) -> Source:
    """The source that `section.data` names: bundled, published (ffhq, coco, hf://...), or local images, parquet or tar.

    `size` and `channels` are what the backbone wants; None: the section's own, and failing that the data's. `find`: the cache
    of downloads; None: published data sets of the Hub are looked for in the Hub's own cache, and fetched.
    Raises UsageError for no name or an unknown one, MissingError for what is not there, and what the source raises.
    """
    name = section.data
    if name is None:
        raise UsageError("no data is named", HINT)
    size, channels = size or section.size, channels or section.channels
    if channels not in (None, 1, 3):
        raise UsageError(f"images have 1 or 3 channels, not {channels}", "this backbone does not work on pixels: name its codec")
    if name in BUNDLED:
        return Digits(size, channels)
    reader = _reader(name, section, find)
    if isinstance(reader, StreamReader):
        return StreamedImages(reader, size, channels, section.on_bad)
    return StoredImages(reader, size, channels, section.on_bad)


def _reader(name: str, section: Data, find: Find | None) -> Reader:
    if name in COCO:
        return _coco(name, find)
    if name in KNOWN or name.startswith(SCHEME):
        return _from_hub(KNOWN.get(name) or parse(name), section, find)
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return _local(Path(path), section)
    raise unknown(name)


def unknown(name: str) -> UsageError | MissingError:
    """The failure for a word that is no name and no path, with the nearest name."""
    shown = printable(name)
    if any(separator in name for separator in (os.sep, os.altsep, "/") if separator):
        return MissingError(f"there is no folder {shown}", "check --data")
    near = difflib.get_close_matches(name, NAMES, n=1)
    known = f"; the nearest is {near[0]!r}" if near else f"; there is {', '.join(NAMES)}"
    return UsageError(f"no data is called {shown!r}{known}", HINT)


def kind_of(folder: Path) -> str:
    """What a folder holds, "images", "parquet" or "tar": what its first file in the order of names is, or its sub-folders'."""
    for name in _some_files(folder):
        if kind := KINDS.get(os.path.splitext(name)[1].lower()):
            return kind
    return "images"


def _some_files(folder: Path) -> Iterator[str]:
    """Names of the files in a folder, then in its first sub-folders, in order; what cannot be listed has none."""
    places = [folder]
    for depth in range(2):
        inside: list[Path] = []
        for place in places:
            try:
                with os.scandir(place) as listing:
                    items = sorted((item.name, item.is_dir()) for item in listing if not item.name.startswith("."))
            except OSError:
                continue
            yield from (name for name, is_dir in items if not is_dir)
            inside += [place / name for name, is_dir in items if is_dir]
        places = inside[:LOOKED_INTO] if depth == 0 else []


def columns_of(section: Data) -> Columns:
    """The columns that were asked for."""
    return Columns(section.image_column, section.label_column, section.caption_column)


def _local(path: Path, section: Data) -> Reader:
    captions = captions_file(path)
    if captions is not None:
        split = captions.stem.removeprefix("captions_")
        return CocoReader(path / split, captions, split)
    kind = KINDS.get(path.suffix.lower()) if path.is_file() else kind_of(path)
    if kind == "parquet":
        return (stream_files if section.streaming else parquet_rows)(path, columns_of(section))
    if section.streaming:
        raise UsageError(f"{printable(str(path))} is read where it lies already", "leave --streaming out")
    return TarReader(path, columns_of(section)) if kind == "tar" else FolderReader(path)


def _from_hub(wanted: HubSet, section: Data, find: Find | None) -> Reader:
    if section.streaming:
        return stream_hub(wanted, columns_of(section))
    folder = find(wanted.word) if find is not None and wanted.word in KNOWN else None
    return hub_rows(wanted, columns_of(section), folder)


def _coco(name: str, find: Find | None) -> Reader:
    split = COCO[name]
    if find is None:
        hint = f"run dmpctl download coco, or name a folder with {split}/ and annotations/captions_{split}.json"
        raise MissingError(f"{name} (MS-COCO 2014, {split}) is not at hand", hint)
    return CocoReader(find(f"coco-{split}"), find("coco-annotations"), split)
