"""Tables of encoded images: parquet files in the Hub's layout, through `datasets` (memory-mapped Arrow)."""

import hashlib
import os
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

import torch
import yaml
from torch import Tensor

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import FULL
from dmpctl.images.reader import Reader
from dmpctl.images.scan import OUTWARD
from dmpctl.tables.columns import (
    NO_LABEL,
    UNNAMED,
    Chosen,
    Columns,
    captions_in,
    choose,
    is_bytes,
    labels_in,
    stamps,
    unused_columns,
)
from dmpctl.texts import read_user_text
from dmpctl.words import printable

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

R = TypeVar("R", bound=Reader)
LOOKED = 200_000  # rows up to which every header is read at the start
SAMPLE = 1_000  # of a longer table
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.parquet")


class RowsReader(Reader):
    """One image in each row of a table. `origin`: repository, commit and split, the identity of rows of the Hub.

    `origin` None: the content, or the `files` it was read from, are the identity.
    """

    _numbers: Tensor | None = None  # labels of all rows; None: they are read row by row

    def __init__(self, name: str, shown: str, chosen: Chosen, origin: str | None, files: Sequence[Path]) -> None:
        super().__init__(name, shown)
        self._chosen, self._origin, self._files = chosen, origin, files
        self.captions_from = chosen.caption and f"column {chosen.caption}"
        self.labels_from = chosen.label and f"column {chosen.label}"

    @abstractmethod
    def cell(self, column: str, index: int) -> "pa.Scalar[Any]":
        """One cell of a column."""

    def open(self, index: int) -> IO[bytes]:
        import pyarrow as pa

        cell: Any = self.cell(self._chosen.image, index)  # bytes, or a struct {bytes, path}, whose path is never followed
        value = cell["bytes"] if hasattr(cell, "keys") and cell.is_valid else cell
        if not value.is_valid:
            raise ValueError("no image in this row")
        return cast(IO[bytes], pa.BufferReader(value.as_buffer()))  # not copied

    def captions(self, index: int) -> tuple[str, ...]:
        return captions_in(self.cell(self._chosen.caption, index).as_py()) if self._chosen.caption else ()

    def identity(self, kept: Sequence[int], digests: Sequence[bytes] | None) -> Iterator[bytes]:
        """The columns, the rows in use, and where they come from; without `origin` their content (None: files) too."""
        yield repr((self._chosen, len(self), self._origin)).encode()
        if len(kept) < len(self):
            yield hashlib.sha256(repr(list(kept)).encode()).digest()
        if self._origin is None:
            yield b"" if self._numbers is None else self._numbers.numpy().tobytes()
            yield from stamps(self._files) if digests is None else digests


class TableReader(RowsReader):
    """The rows of a memory-mapped Arrow table."""

    _numbers: Tensor

    def __init__(
        self, rows: "Dataset", name: str, shown: str, columns: Columns, origin: str | None = None, files: Sequence[Path] = ()
    ) -> None:
        super().__init__(name, shown, choose(rows.features, columns, shown), origin, files)
        self._rows, self._num_classes = rows, 0
        self.unused["columns"] = unused_columns(rows.column_names, self._chosen)
        self._numbers = torch.zeros(len(rows), dtype=torch.int64)
        if self._chosen.label:
            self._numbers, self._num_classes, self.label_names = labels_in(
                self._column(self._chosen.label), self._chosen.names, shown
            )

    def __len__(self) -> int:
        return len(self._rows)

    def cell(self, column: str, index: int) -> "pa.Scalar[Any]":
        return self._column(column)[index]

    def wrong(self, index: int) -> str | None:
        return "no label" if self._chosen.label and self._numbers[index] <= NO_LABEL else None

    def looked_at(self, good: Sequence[int]) -> Sequence[int]:
        """All of them up to LOOKED, of more a SAMPLE, evenly spread: the files may be larger than the memory."""
        return good if len(good) <= LOOKED else [good[len(good) * number // SAMPLE] for number in range(SAMPLE)]

    def labels(self, kept: Sequence[int]) -> tuple[Tensor, int]:
        return self._numbers[torch.tensor(list(kept), dtype=torch.int64)], self._num_classes

    def _column(self, name: str) -> "pa.ChunkedArray[Any]":
        return self._rows.data.column(name)  # not kept: pickled, it would be all of its bytes; the table is a file name


def parquet_rows(path: Path, columns: Columns = UNNAMED, split: str | None = None, follow: bool = False) -> TableReader:
    """Returns the rows of a parquet file, or of one split of a folder of them: None for train, or the only one.

    `follow`: links may lead out of the folder. Raises MissingError for a set that lacks shards, IntegrityError for a file that
    is no parquet, UsageError for no fitting column or split, and for a card that names files elsewhere.
    """
    shown = printable(str(path))
    builder, taken, files = built(path, shown, split, follow=follow)
    name = printable(path.stem if path.is_file() else path.name)
    return with_splits(TableReader(prepared(builder, taken, shown), name, shown, columns, files=files), builder, taken)


def with_splits(reader: R, builder: Any, taken: str) -> R:
    """The reader, with the split that is taken in its inventory, and the files of those that are not."""
    others = {str(split): list(map(str, files)) for split, files in (builder.config.data_files or {}).items() if split != taken}
    if others:
        reader.assumed.append(f"split {taken}")
        reader.unused |= {f"of split {split}": [os.path.basename(file) for file in files] for split, files in others.items()}
    return reader


def prepared(builder: Any, split: str, shown: str) -> "Dataset":
    """Returns the rows of a split of what was `built`. The first time, `datasets` writes them into its cache as Arrow."""
    with explained(shown):
        builder.download_and_prepare()
        return cast("Dataset", builder.as_dataset(split=split))


def built(
    path: Path,
    shown: str,
    split: str | None = None,
    config: str | None = None,
    data_files: Mapping[str, str] | None = None,
    follow: bool = False,
) -> tuple[Any, str, list[Path]]:
    """Returns the builder that `datasets` has for the rows, their split, and its files; MissingError where one is missing.

    UsageError where its card, or without `follow` a link, leads to files outside of the folder.
    """
    import datasets

    with explained(shown):
        if path.is_file():
            builder = datasets.load_dataset_builder("parquet", data_files=[str(path)])
        else:
            refuse_far(path, shown)
            builder = datasets.load_dataset_builder(str(path), name=config, data_files=dict(data_files) if data_files else None)
    by_split = {str(name): [str(file) for file in files] for name, files in (builder.config.data_files or {}).items()}
    taken = split_of(by_split, split, shown)
    if not follow and path.is_dir():
        top = os.path.realpath(path)
        if far := [file for file in by_split[taken] if os.path.commonpath([top, os.path.realpath(file)]) != top]:
            raise UsageError(f"{printable(far[0])} is {OUTWARD}", "if you trust the links, add --follow-links")
    missing = missing_shards(by_split[taken])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MissingError(f"{shown} is not complete: {printable(missing[0])}{more} is not there", "fetch it again")
    return builder, taken, [Path(file) for file in by_split[taken]]


def refuse_far(folder: Path, shown: str) -> None:
    """UsageError where a data set's card names files on the web or outside of its folder: `datasets` would read them."""
    from huggingface_hub.repocard import metadata_load

    card = folder / "README.md"
    about: list[Any] = [metadata_load(card)] if card.is_file() else []
    if (own := folder / ".huggingface.yaml").is_file():
        about.append(yaml.safe_load(read_user_text(own)))
    for place in far_places([each.get("configs") for each in about if isinstance(each, dict)]):
        hint = "take that line out of its card, or name those files themselves"
        raise UsageError(f"the card of {shown} names data outside of its folder: {printable(place)}", hint)


def far_places(value: Any, named: bool = False) -> Iterator[str]:
    """The paths of a card's configurations (all text below data_files and data_dir) that lead elsewhere."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from far_places(inner, named or key in ("data_files", "data_dir"))
    elif isinstance(value, list):
        for inner in value:
            yield from far_places(inner, named)
    elif (
        named and isinstance(value, str) and ("://" in value or "::" in value or os.path.isabs(value) or ".." in value.split("/"))
    ):
        yield value


def split_of(by_split: Mapping[str, Sequence[str]], split: str | None, shown: str) -> str:
    """The split that is taken of those there are; UsageError where `split` is none of them, or None does not say enough."""
    taken = split or ("train" if "train" in by_split or len(by_split) != 1 else next(iter(by_split)))
    if not by_split.get(taken):
        there = ", ".join(map(printable, by_split)) or "none"
        raise UsageError(f"{shown} has no split {printable(taken)!r}", f"there is {there}")
    return taken


def holds_images(path: Path) -> bool:
    """Whether a parquet file has a column of images; True for one that cannot be read: reading it says so."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image

    try:
        schema = pq.read_schema(path)
        pictures = any(isinstance(feature, Image) for feature in Features.from_arrow_schema(schema).values())
        return pictures or any(is_bytes(field.type) for field in schema)
    except (pa.ArrowException, OSError, ValueError):
        return True


def missing_shards(files: Sequence[str]) -> list[str]:
    """Names that belong to the numbered shards ("-00003-of-00008") among `files` and are not there."""
    names = {os.path.basename(file) for file in files}
    series = {(found[1], int(found[3])) for name in names if (found := SHARD.fullmatch(name))}
    whole = (f"{stem}-{number:05}-of-{count:05}.parquet" for stem, count in sorted(series) for number in range(count))
    return [name for name in whole if name not in names]


@contextmanager
def quiet() -> Iterator[None]:
    """Around the use of `datasets` and of the Hub's library: no progress bars of their own."""
    import datasets
    import huggingface_hub.utils

    with ExitStack() as after:
        for library in (datasets, huggingface_hub.utils):
            if not library.are_progress_bars_disabled():
                library.disable_progress_bars()
                after.callback(library.enable_progress_bars)
        yield


@contextmanager
def explained(shown: str) -> Iterator[None]:
    """Around the use of `datasets`: quiet, and an error about files, columns or splits becomes one sentence."""
    from datasets.exceptions import DatasetGenerationError, DatasetsError, NonMatchingSplitsSizesError

    try:
        with quiet():
            yield
    except ConnectionError:
        raise
    except NonMatchingSplitsSizesError:
        raise IntegrityError(f"{shown} has not the rows that its own card counts", "fetch it again") from None
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in FULL:
            hint = "free some space, it needs its size once more"
            raise UsageError(f"{shown} cannot be prepared: {cause.strerror}", hint) from None
        raise IntegrityError(f"{shown} cannot be read as a table: {first_line(cause)}", "fetch it again") from None
    except (DatasetsError, OSError, ValueError, RuntimeError, yaml.YAMLError) as error:
        raise UsageError(f"{shown} cannot be opened: {first_line(error)}", "check --data") from None


def first_line(error: BaseException) -> str:
    """The first line of an error, cut to fit into a sentence."""
    return printable((str(error).splitlines() or [""])[0][:300] or type(error).__name__)
