"""Parquet that is read where it lies, on the Hub or on a disk, for what does not fit here as a whole.

A row group is the least that is fetched. So that each is fetched once in an epoch, the order is: row groups shuffled, then
rows shuffled within windows of WINDOW bytes. It is a function of (seed, epoch), as with any other source: every process can
tell what the others see, a run goes on at any step, and nothing is saved, seen twice or lost. What it costs: every process
(and loader process) fetches all row groups of the windows that it takes part in, and the shuffle is no finer than a window.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.images.scan import THREADS
from dmpctl.images.stored import OnBad, StoredImages
from dmpctl.tables.columns import NO_LABEL, Columns, choose, unused_columns
from dmpctl.tables.parquet import RowsReader, built, first_line, with_splits
from dmpctl.words import printable

if TYPE_CHECKING:
    import pyarrow as pa

WINDOW = 1 << 28  # bytes within which rows are shuffled; twice as much is held
LOCK = threading.Lock()  # around what is held
PROBED = 64  # rows whose headers are read at the start


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group: the file and its number there, its first row in the whole, how many rows and bytes it has."""

    file: str
    number: int
    first: int
    rows: int
    bytes: int


class StreamReader(RowsReader):
    """The rows of parquet files; `files` are whatever fsspec opens: paths, hf://... `origin` as for RowsReader.
    `window`: bytes within which rows are shuffled.

    An image or a label that is bad is found when it is used. Raises what opening the files raises, and UsageError for no rows
    and for a wanted label whose classes cannot be counted.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        name: str,
        shown: str,
        columns: Columns,
        origin: str | None = None,
        window: int = WINDOW,
    ) -> None:
        from datasets import Features

        urls, self._window = [str(file) for file in files], window
        with ThreadPoolExecutor(THREADS) as pool:
            footers = list(pool.map(_footer, urls))
        self._groups: list[RowGroup] = []
        self._uncounted: str | None = None  # a column of labels that have no names
        for url, (sizes, _) in zip(urls, footers, strict=True):
            for number, (rows, size) in enumerate(sizes):
                if rows:
                    self._groups.append(RowGroup(url, number, len(self), rows, size))
        if not self._groups:
            raise UsageError(f"{shown} has no rows", "check --data")
        self._firsts = torch.tensor([group.first for group in self._groups])
        chosen = choose(Features.from_arrow_schema(footers[0][1]), columns, shown)
        if chosen.label and chosen.names is None:
            if columns.label:
                raise UsageError(f"the labels of {shown} have no names, and streaming cannot count them", "leave --streaming out")
            self._uncounted, chosen = chosen.label, replace(chosen, label=None)
        super().__init__(name, shown, chosen, origin, [Path(url) for url in urls])
        self.label_names, self.unused["columns"] = chosen.names or (), unused_columns(footers[0][1].names, chosen)
        if self._uncounted:
            self.assumed.append(f"no classes: streaming cannot count those of column {self._uncounted}")
        self._held: OrderedDict[int, pa.Table] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_held": OrderedDict()}  # a process that it is sent to fetches what it uses

    def __len__(self) -> int:
        return self._groups[-1].first + self._groups[-1].rows if self._groups else 0

    def open(self, index: int) -> IO[bytes]:
        if self.label(index) <= NO_LABEL:
            raise ValueError("no label")
        return super().open(index)

    def looked_at(self, good: Sequence[int]) -> Sequence[int]:
        """The first few, which lie in one row group."""
        return good[: min(PROBED, self._groups[0].rows)]

    def labels(self, kept: Sequence[int]) -> tuple[None, int]:
        return None, len(self._chosen.names or ())

    def label(self, index: int) -> int:
        value = self.cell(self._chosen.label, index).as_py() if self._chosen.label else 0
        return NO_LABEL if value is None else int(value)

    def identity(self, kept: Sequence[int], digests: Sequence[bytes] | None) -> Iterator[bytes]:
        return super().identity(kept, None)  # nothing is read for it: the files stand for their content

    def order(self, generator: torch.Generator) -> Tensor:
        """All rows in the order of one epoch, int64 [n]: groups shuffled, then rows within windows of them."""
        shuffled = [self._groups[number] for number in torch.randperm(len(self._groups), generator=generator).tolist()]
        windows: list[list[RowGroup]] = []
        room = 0
        for group in shuffled:
            if not windows or group.bytes > room:
                windows, room = [*windows, []], self._window
            windows[-1].append(group)
            room -= group.bytes
        rows = [torch.cat([torch.arange(group.first, group.first + group.rows) for group in window]) for window in windows]
        return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in rows])

    def cell(self, column: str, index: int) -> "pa.Scalar[Any]":
        number = int(torch.searchsorted(self._firsts, index, right=True)) - 1
        return self._group(number).column(column)[index - self._groups[number].first]

    def _group(self, number: int) -> "pa.Table":
        """One row group; those used last are held, up to twice the window."""
        with LOCK:
            if number not in self._held:
                self._held[number] = self._fetched(self._groups[number])
            self._held.move_to_end(number)
            while len(self._held) > 1 and sum(self._groups[held].bytes for held in self._held) > 2 * self._window:
                self._held.popitem(last=False)
            return self._held[number]

    def _fetched(self, group: RowGroup) -> "pa.Table":
        import pyarrow.parquet as pq

        columns = [name for name in (self._chosen.image, self._chosen.label, self._chosen.caption) if name]
        with _asked(group.file) as file:
            return pq.ParquetFile(file, pre_buffer=True).read_row_group(group.number, columns)


class StreamedImages(StoredImages):
    """Rows of parquet files that are fetched as they are used, in an order of their own."""

    def __init__(
        self, reader: StreamReader, size: int | None = None, channels: int | None = None, on_bad: OnBad = "fail"
    ) -> None:
        super().__init__(reader, size, channels, on_bad)
        self._rows = reader
        self._place = torch.full((len(reader),), -1)
        self._place[torch.tensor(list(self._kept))] = torch.arange(len(self._kept))

    def order(self, generator: torch.Generator) -> Tensor:
        """The order of one epoch, int64 [n], in which each row group is fetched once."""
        places = self._place[self._rows.order(generator)]
        return places[places >= 0]


def stream_files(path: Path, columns: Columns, split: str | None = None, follow: bool = False) -> StreamReader:
    """Returns the rows that `parquet_rows` gives, read as they are used."""
    shown = printable(str(path))
    builder, taken, files = built(path, shown, split, follow=follow)
    return with_splits(StreamReader(files, printable(path.stem), shown, columns), builder, taken)


def _footer(url: str) -> tuple[list[tuple[int, int]], Any]:
    """Rows and bytes of each row group of a file, and its schema."""
    import pyarrow.parquet as pq

    with _asked(url) as file:
        found = pq.ParquetFile(file)
        about = (found.metadata.row_group(number) for number in range(found.metadata.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in about], found.schema_arrow


@contextmanager
def _asked(url: str) -> Iterator[IO[bytes]]:
    """Around the reading of a file: its failure is a MissingError (not reached) or an IntegrityError (no parquet)."""
    import fsspec
    import pyarrow as pa

    try:
        with fsspec.open(url, "rb") as file:
            yield file
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, pa.ArrowKeyError) as error:
        raise IntegrityError(f"{url} is no whole parquet file: {first_line(error)}", "fetch it again") from None
    except Exception as error:  # of any of the libraries between here and the Hub
        hint = "run the same command again: it goes on where it stopped"
        raise MissingError(f"{url} cannot be read: {first_line(error)}", hint) from None
