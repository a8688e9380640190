"""Which columns of a table hold images, labels and captions, and what a cell of them says."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmpctl.errors import IntegrityError, UsageError
from dmpctl.images.scan import printable
from dmpctl.images.stored import Labels

if TYPE_CHECKING:
    import pyarrow as pa

LABELS, CAPTIONS = ("label", "labels"), ("text", "caption", "captions")
NO_LABEL = -1  # as the Hub's test splits have it


@dataclass(frozen=True)
class Columns:
    """Names of columns; None: found by their type and usual names, and where nothing fits, there is none."""

    image: str | None = None
    label: str | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Chosen:
    """The columns of one table. `names` of the classes, in the order of their labels; None: the labels count them."""

    image: str
    label: str | None
    caption: str | None
    names: tuple[str, ...] | None = None


def choose(features: Mapping[str, Any], wanted: Columns, shown: str) -> Chosen:
    """The columns of a table with these `datasets` features.

    Image: the only one of type Image, or else the only one of bytes. Label: the only ClassLabel, or whole numbers called
    label. Caption: text called text or caption. UsageError where that is nothing or not one, or a wanted column is not there.
    """
    from datasets import ClassLabel, Image

    for flag, name in (("--image-column", wanted.image), ("--label-column", wanted.label), ("--caption-column", wanted.caption)):
        if name is not None and name not in features:
            raise UsageError(f"{shown} has no column {printable(name)!r}", f"name one with {flag}: {_listed(features)}")
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    images = images or [name for name, feature in features.items() if _is_bytes(feature)]
    image = wanted.image or _only(images, "holds images", "--image-column", features, shown)
    if image is None:
        raise UsageError(f"no column of {shown} holds images", f"name one with --image-column: {_listed(features)}")
    if image not in images and not _is_bytes(features[image]):
        raise UsageError(f"the column {printable(image)!r} of {shown} holds no images", f"there is {_listed(features)}")
    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    usual = [name for name in LABELS if name in features and _type_of(features[name]).startswith(("int", "uint"))]
    label = wanted.label or _only([n for n in LABELS if n in classes] or classes, "is a label", "--label-column", features, shown)
    label = label or next(iter(usual), None)
    if label is not None and not _is_label(features[label]):
        raise UsageError(f"the column {printable(label)!r} of {shown} is no label", "labels are whole numbers or words")
    names = tuple(features[label].names) if label is not None and label in classes else None
    caption = wanted.caption or next((name for name in CAPTIONS if name in features and _is_text(features[name])), None)
    if caption is not None and not _is_text(features[caption]):
        raise UsageError(f"the column {printable(caption)!r} of {shown} is no text", f"there is {_listed(features)}")
    return Chosen(image, label, caption, names)


def image_bytes(cell: "pa.Scalar[Any]") -> "pa.Buffer":
    """The encoded image in a cell, not copied: bytes, or a struct {bytes, path}, whose path is never followed."""
    value: Any = cell["bytes"] if hasattr(cell, "keys") and cell.is_valid else cell
    if not value.is_valid:
        raise ValueError("no image in this row")
    return value.as_buffer()


def captions_in(value: object) -> tuple[str, ...]:
    """The captions in a cell: one text, or a list of them."""
    texts = value if isinstance(value, list) else [value]
    return tuple(text for text in texts if isinstance(text, str))


def labels_in(column: "pa.ChunkedArray[Any] | None", chosen: Chosen, rows: int, shown: str) -> tuple[Tensor, int]:
    """Labels int64 [rows] and how many classes there are; NO_LABEL for a row without one. Words are numbered in their order.

    IntegrityError for a number above the column's own class names.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if column is None:
        return torch.zeros(rows, dtype=torch.int64), 0
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        words = sorted(word for word in pc.unique(column).to_pylist() if word is not None)
        column, count = pc.index_in(column, pa.array(words, column.type)), len(words)
    else:
        count = len(chosen.names or ())
    numbers = torch.from_numpy(pc.fill_null(column, NO_LABEL).cast(pa.int64()).to_numpy().copy())
    highest = int(numbers.max()) if rows else NO_LABEL
    if count and highest >= count:
        raise IntegrityError(f"{shown} has a label {highest}, and names for {count} classes only")
    return numbers, count or highest + 1


def labels_of(numbers: Tensor, num_classes: int, kept: Iterable[int]) -> Labels:
    """The labels of the rows that are used."""
    return Labels(numbers[torch.tensor(list(kept), dtype=torch.int64)], num_classes)


def _only(found: list[str], what: str, flag: str, features: Mapping[str, Any], shown: str) -> str | None:
    if len(found) > 1:
        raise UsageError(f"more than one column of {shown} {what}: {', '.join(map(printable, found))}", f"name one with {flag}")
    return found[0] if found else None


def _listed(features: Mapping[str, Any]) -> str:
    return ", ".join(map(printable, features))


def _type_of(feature: Any) -> str:
    return str(getattr(feature, "dtype", ""))


def _is_bytes(feature: Any) -> bool:
    inner = feature.get("bytes") if isinstance(feature, dict) else feature
    return _type_of(inner) in ("binary", "large_binary")


def _is_label(feature: Any) -> bool:
    return _type_of(feature).startswith(("int", "uint", "string", "large_string"))


def _is_text(feature: Any) -> bool:
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    return _type_of(inner) in ("string", "large_string")
