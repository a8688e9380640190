"""Which columns of a table hold images, labels and captions, and what a cell of them says."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmpctl.errors import IntegrityError, UsageError
from dmpctl.words import printable

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

LABELS, CAPTIONS = ("label", "labels"), ("text", "caption", "captions")
NO_LABEL = -1  # as the Hub's test splits have it
NONE = "none"  # as --label-column
COUNTS = ("bool", "halffloat", "float", "double")  # whole numbers, where they are
UNFIT = f"labels are whole numbers or words: name another --label-column, or go on without labels: --label-column {NONE}"


@dataclass(frozen=True)
class Columns:
    """Names of columns; None: found by their type and usual names, and where nothing fits, there is none."""

    image: str | None = None
    label: str | None = None
    caption: str | None = None


UNNAMED = Columns()


@dataclass(frozen=True)
class Chosen:
    """The columns of one table. `names` of the classes, in the order of their labels; None: the labels count them.

    Its repr is part of a table's fingerprint.
    """

    image: str
    label: str | None
    caption: str | None
    names: tuple[str, ...] | None = None


def choose(features: "Features", wanted: Columns, shown: str, image: str | None = None) -> Chosen:
    """Returns the columns of a table with these features. `image`: the column that stands for images where none holds them.

    Image: the only one of type Image, or else the only one of bytes. Label: the only ClassLabel, or the one called label,
    whatever it holds: numbers count the classes, words are sorted; NONE as the wanted one leaves labels out. Caption: text
    called text or caption. UsageError where that is nothing or not one, or a wanted column is not there.
    """
    from datasets import ClassLabel, Image

    types, there = {field.name: field.type for field in features.arrow_schema}, ", ".join(map(printable, features))

    def only(found: list[str], what: str, flag: str) -> str | None:
        if len(found) > 1:
            raise UsageError(
                f"more than one column of {shown} {what}: {', '.join(map(printable, found))}", f"name one with {flag}"
            )
        return found[0] if found else None

    for flag, name in (("--image-column", wanted.image), ("--label-column", wanted.label), ("--caption-column", wanted.caption)):
        if name is not None and name not in features and not (flag == "--label-column" and name == NONE):
            raise UsageError(f"{shown} has no column {printable(name)!r}", f"name one with {flag}: {there}")
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    images = images or [name for name in features if is_bytes(types[name])]
    holds = wanted.image or image or only(images, "holds images", "--image-column")
    if holds is None:
        raise UsageError(f"no column of {shown} holds images", f"name one with --image-column: {there}")
    if holds not in images and holds != image and not is_bytes(types[holds]):
        raise UsageError(f"the column {printable(holds)!r} of {shown} holds no images", f"there is {there}")
    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    label = wanted.label or only([name for name in LABELS if name in classes] or classes, "is a label", "--label-column")
    label = label or next((name for name in LABELS if name in features), None)
    label = None if label == NONE and NONE not in features else label
    if label is not None and not (_is_whole(types[label]) or _is_words(types[label]) or str(types[label]) in COUNTS):
        raise UsageError(f"the column {printable(label)!r} of {shown} is no label but {types[label]}", UNFIT)
    caption = wanted.caption or next((name for name in CAPTIONS if name in features and _is_text(types[name])), None)
    if caption is not None and not _is_text(types[caption]):
        raise UsageError(f"the column {printable(caption)!r} of {shown} is no text", f"there is {there}")
    return Chosen(holds, label, caption, tuple(features[label].names) if label in classes else None)


def unused_columns(names: Sequence[str], chosen: Chosen) -> list[str]:
    """Returns the columns that are neither images nor labels nor captions, for the inventory."""
    return [name for name in names if name not in (chosen.image, chosen.label, chosen.caption)]


def captions_in(value: object) -> tuple[str, ...]:
    """Returns the captions in a cell: one text, or a list of them."""
    texts = value if isinstance(value, list) else [value]
    return tuple(text for text in texts if isinstance(text, str))


def labels_in(column: "pa.ChunkedArray[Any]", names: Sequence[str] | None, shown: str) -> tuple[Tensor, int, tuple[str, ...]]:
    """Returns labels int64 [rows], the number of classes and their names (() where numbers count them).

    NO_LABEL for a row without one. Words are numbered in their order. `names` of the classes; None: the labels count them.
    IntegrityError for a number above those that have names, UsageError for floats that are no whole numbers.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    named = tuple(names or ())
    if _is_words(column.type):
        named = tuple(sorted(word for word in pc.unique(column).to_pylist() if word is not None))
        column = pc.index_in(column, pa.array(named, column.type))
    try:
        numbers = torch.from_numpy(pc.fill_null(column.cast(pa.int64()), NO_LABEL).to_numpy().copy())
    except pa.ArrowInvalid:
        raise UsageError(f"the labels of {shown} are no whole numbers but {column.type}", UNFIT) from None
    highest = int(numbers.max()) if len(numbers) else NO_LABEL
    if named and highest >= len(named):
        raise IntegrityError(f"{shown} has a label {highest}, and names for {len(named)} classes only")
    return numbers, len(named) or highest + 1, named


def stamps(files: Sequence[Path]) -> Iterator[bytes]:
    """Name, size and time of change of each file, for the fingerprint of what was not read."""
    for path in files:
        status = path.stat()
        yield os.fsencode(path.name) + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode()


def is_bytes(kind: "pa.DataType") -> bool:
    """Whether a column holds bytes, or structs with bytes in a field of that name."""
    inner = kind.field("bytes").type if str(kind).startswith("struct") and kind.get_field_index("bytes") >= 0 else kind
    return str(inner) in ("binary", "large_binary")


def _is_whole(kind: "pa.DataType") -> bool:
    return str(kind).startswith(("int", "uint"))


def _is_words(kind: "pa.DataType") -> bool:
    return str(kind) in ("string", "large_string")


def _is_text(kind: "pa.DataType") -> bool:
    """Whether a column holds words, or lists of them."""
    return _is_words(kind.value_type if str(kind).startswith(("list", "large_list")) else kind)
