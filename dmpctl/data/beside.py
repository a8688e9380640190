"""Labels and captions in files beside images: metadata.* as `datasets` reads it, EDM's dataset.json, a .txt of each image."""

import hashlib
import io
import json
import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmpctl.errors import UsageError
from dmpctl.images.scan import ImageFile, Listing
from dmpctl.tables.columns import Columns, captions_in, choose, labels_in
from dmpctl.texts import decoded, read_user_text
from dmpctl.words import printable

if TYPE_CHECKING:
    import pyarrow as pa

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
EDM = "dataset.json"
UNNAMED_IMAGES = "images that the metadata does not name"
READ_TEXTS = 20_000  # texts beside images whose content is part of the fingerprint; of more, sizes and times of change


@dataclass(frozen=True)
class Said:
    """Labels and captions of the images under a folder; by default none.

    `is_said`: sub-folders are no classes then. `rows`: which of the images are used, and in which order; None: all, as they
    are. `labels` int64 (-1: none) and `written` captions are in the order of the rows; `texts`: the .txt of a name without
    its extension. `identity` goes into the fingerprint, `unused` into the inventory.
    """

    unused: dict[str, list[str]]
    top: str = ""
    is_said: bool = False
    rows: Sequence[int] | None = None
    labels: Tensor | None = None
    num_classes: int = 0
    names: Sequence[str] = ()
    labels_from: str | None = None
    captions_from: str | None = None
    written: Sequence[tuple[str, ...]] | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    identity: bytes = b""

    def captions(self, name: str, index: int) -> tuple[str, ...]:
        """The captions of the image of this name, the `index`th one in use."""
        if self.written is not None:
            return self.written[index]
        found = self.texts.get(os.path.splitext(name)[0])
        return () if found is None else tuple(filter(None, (read_user_text(Path(self.top, found)).strip(),)))


def said_beside(top: str, found: Listing, columns: Columns, shown: str) -> Said:
    """Returns what the files beside the images say.

    UsageError for two kinds of them, for one that names images which are not there, that lacks some, or cannot be read.
    """
    unused = {kind: [file.name for file in files] for kind, files in found.others.items()}
    files = [file for kind in (".csv", ".jsonl", ".parquet") for file in found.others.get(kind, ()) if _base(file) in METADATA]
    labelled = [file for file in found.others.get(".json", ()) if file.name == EDM]
    if not found.images:
        return Said(unused)
    content = read_labels(Path(top, EDM), shown) if labelled else None
    kinds = list(dict.fromkeys(map(_base, files))) + [EDM] * (content is not None)
    if len(kinds) > 1:
        hint = f"keep one: move {kinds[1]} away"
        raise UsageError(f"{shown} has {kinds[0]} and {kinds[1]}, which both say what its images are", hint)
    used = files or (labelled if content is not None else [])
    for file in used:
        if file.wrong:
            raise UsageError(f"{file.name} of {shown} cannot be used: {file.wrong}", "if you trust the link, add --follow-links")
        kind = os.path.splitext(file.name)[1]
        unused[kind].remove(file.name)
    if files:
        return _from_metadata(Said(unused, top, True), found, files, columns, shown)
    if content is not None:
        return _from_edm(Said(unused, top, True), found, content, shown)
    return _with_texts(Said(unused, top), found)


def _with_texts(said: Said, found: Listing) -> Said:
    """With each image's own .txt, where there are such."""
    stems = {os.path.splitext(file.name)[0] for file in found.images}
    files = {stem: file for file in found.others.get(".txt", ()) if (stem := os.path.splitext(file.name)[0]) in stems}
    if not files:
        return said
    if wrong := [file for file in files.values() if file.wrong not in (None, "empty")]:
        raise UsageError(f"{printable(wrong[0].name)} cannot be used: {wrong[0].wrong}", "take it away, or add --follow-links")
    digest = hashlib.sha256()
    for file in files.values():
        own = f"{file.bytes} {file.mtime_ns}".encode() if len(files) > READ_TEXTS else Path(said.top, file.name).read_bytes()
        digest.update(b"\0" + os.fsencode(file.name) + b"\0" + own)
    unused = said.unused | {".txt": [name for name in said.unused[".txt"] if os.path.splitext(name)[0] not in files]}
    origin = f"the .txt of {len(files)} images" if len(files) < len(stems) else "the .txt of each image"
    texts = {stem: file.name for stem, file in files.items()}
    return replace(said, unused=unused, captions_from=origin, texts=texts, identity=digest.digest())


def read_labels(path: Path, shown: str) -> dict[str, Any] | None:
    """Returns the label of each name in EDM's dataset.json, {} where it says that there are none; None for another JSON."""
    try:
        labels = json.loads(read_user_text(path))["labels"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    try:
        return {str(name): label for name, label in labels or ()}
    except (ValueError, TypeError):
        raise UsageError(f"the labels in {EDM} of {shown} are no pairs of name and label", "see EDM's dataset_tool.py") from None


def _from_edm(said: Said, found: Listing, content: Mapping[str, Any], shown: str) -> Said:
    identity = hashlib.sha256(json.dumps(content).encode()).digest()
    if not content:
        return replace(said, identity=identity, labels_from=f"{EDM}, which has none")
    _refuse_missing(EDM, list(content), found.images, shown)
    if lacking := [file.name for file in found.images if file.name not in content]:
        raise UsageError(f"{EDM} of {shown} has no label for {len(lacking)} images: {printable(lacking[0])}", "make it anew")
    labels = [content[file.name] for file in found.images]
    if any(type(label) is not int or label < 0 for label in labels):
        raise UsageError(f"{EDM} of {shown} has labels that are no classes but {labels[0]!r}", "classes are whole numbers from 0")
    count = max(labels) + 1
    return replace(said, labels=torch.tensor(labels), num_classes=count, labels_from=EDM, identity=identity)


def _from_metadata(said: Said, found: Listing, files: Sequence[ImageFile], columns: Columns, shown: str) -> Said:
    """Images in the order of the rows, as `datasets` has them."""
    import pyarrow as pa
    from datasets import Features

    name, digest = files[0].name, hashlib.sha256()
    tables = [_table(Path(said.top, file.name), digest) for file in files]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowInvalid:
        raise UsageError(f"the columns of {name} and {files[-1].name} in {shown} differ", "give both the same ones") from None
    named = [each for each in table.column_names if each == "file_name" or each.endswith("_file_name")]
    column = columns.image or ("file_name" if "file_name" in named or len(named) != 1 else named[0])
    if column not in table.column_names:
        there = ", ".join(map(printable, table.column_names))
        raise UsageError(f"{name} of {shown} has no column {column}, which names the images", f"there is {there}")
    chosen = choose(Features.from_arrow_schema(table.schema), replace(columns, image=None), f"{name} of {shown}", column)
    places = [os.path.dirname(file.name) for file, each in zip(files, tables, strict=True) for _ in range(len(each))]
    cells = table.column(column).to_pylist()
    paths = [posixpath.normpath(posixpath.join(place, str(cell))) for place, cell in zip(places, cells, strict=True)]
    _refuse_missing(name, paths, found.images, shown)
    number = {file.name: index for index, file in enumerate(found.images)}
    said = replace(said, rows=[number[path] for path in paths], identity=digest.digest())
    rest = set(number) - set(paths)
    unused = said.unused | {UNNAMED_IMAGES: [file.name for file in found.images if file.name in rest]}
    used = (column, chosen.label, chosen.caption)
    unused[f"columns of {name}"] = [each for each in table.column_names if each not in used]
    if chosen.label:
        labels, count, names = labels_in(table.column(chosen.label), chosen.names, f"{name} of {shown}")
        said = replace(said, labels=labels, num_classes=count, names=names, labels_from=f"{chosen.label} of {name}")
    if chosen.caption:
        written = [captions_in(cell) for cell in table.column(chosen.caption).to_pylist()]
        said = replace(said, written=written, captions_from=f"{chosen.caption} of {name}")
    return replace(said, unused=unused)


def _table(path: Path, digest: Any) -> "pa.Table":
    """The rows of one metadata file, read as `datasets` reads it (pandas for csv, Arrow for the others)."""
    import pandas
    import pyarrow as pa
    from pyarrow import json as arrow_json
    from pyarrow import parquet

    content, shown = path.read_bytes(), printable(str(path))
    digest.update(content)
    try:
        if path.suffix == ".parquet":
            return parquet.read_table(pa.BufferReader(content))
        text = decoded(content, shown)
        if path.suffix == ".csv":
            return pa.Table.from_pandas(pandas.read_csv(io.StringIO(text)), preserve_index=False)
        options = arrow_json.ReadOptions(block_size=len(content) + 1)
        return arrow_json.read_json(io.BytesIO(text.encode()), read_options=options)
    except (pa.ArrowException, pandas.errors.ParserError, pandas.errors.EmptyDataError) as error:
        raise UsageError(f"{shown} cannot be read: {str(error).splitlines()[0]}", "repair it, or take it away") from None


def _refuse_missing(file: str, names: Sequence[str], images: Sequence[ImageFile], shown: str) -> None:
    """UsageError where a file names images that are not there."""
    there = {image.name for image in images}
    if missing := [name for name in names if name not in there]:
        first = ", ".join(map(printable, missing[:3]))
        raise UsageError(
            f"{file} of {shown} names {len(missing)} images that are not there: {first}",
            f"fetch them, or take their lines out of {file}",
        )


def _base(file: ImageFile) -> str:
    return posixpath.basename(file.name)
