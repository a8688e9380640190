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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from dmpctl.data.columns import NO_LABEL, Chosen, Columns, captions_in, choose, image_bytes
from dmpctl.data.parquet import first_line, stamps, table_identity
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.images.scan import THREADS
from dmpctl.images.stored import Labels, OnBad, StoredImages

if TYPE_CHECKING:
    import pyarrow as pa

WINDOW = 1 << 28  # bytes within which rows are shuffled; twice as much is held
PROBED = 64  # rows whose headers are read at the start


@dataclass(frozen=True, slots=True)
class Group:
    """A row group: the file and its number there, its first row in the whole, how many rows and bytes it has."""

    file: int
    number: int
    first: int
    rows: int
    bytes: int


class RowGroups:
    """The rows of parquet files as a store; `files` are whatever fsspec opens: paths, hf://... `origin` as for Table.

    Raises what opening them raises, and UsageError for a wanted label whose classes cannot be counted.
    """

    def __init__(self, files: Sequence[str | Path], wanted: Columns, shown: str, origin: str | None = None) -> None:
        from datasets import Features

        self.shown, self._files, self._origin = shown, [str(file) for file in files], origin
        with ThreadPoolExecutor(THREADS) as pool:
            footers = list(pool.map(self._footer, self._files))
        self._groups = _groups([footer for footer, _ in footers])
        if not self._groups:
            raise UsageError(f"{shown} has no rows", "check --data")
        self._firsts = torch.tensor([group.first for group in self._groups])
        chosen = choose(Features.from_arrow_schema(footers[0][1]), wanted, shown)
        if chosen.label and chosen.names is None:
            if wanted.label:
                raise UsageError(f"the labels of {shown} have no names, and streaming cannot count them", "leave --streaming out")
            chosen = Chosen(chosen.image, None, chosen.caption)
        self._chosen = chosen
        self._reset()

    def _reset(self) -> None:
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_held", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return self._groups[-1].first + self._groups[-1].rows

    def name(self, index: int) -> str:
        return f"row {index}"

    def wrong(self, index: int) -> None:
        """Nothing is known before a row is fetched."""

    def open(self, index: int) -> IO[bytes]:
        import pyarrow as pa

        if self.label(index) <= NO_LABEL:
            raise ValueError("no label")
        return cast(IO[bytes], pa.BufferReader(image_bytes(self._cell(self._chosen.image, index))))

    def looked_at(self, good: Sequence[int]) -> Sequence[int]:
        """The first few, which lie in one row group."""
        return good[: min(PROBED, self._groups[0].rows)]

    def labels(self, kept: Sequence[int]) -> Labels:
        return Labels(None, len(self._chosen.names or ()))

    def label(self, index: int) -> int:
        name = self._chosen.label
        value = self._cell(name, index).as_py() if name else 0
        return NO_LABEL if value is None else int(value)

    def captions(self, index: int) -> tuple[str, ...]:
        name = self._chosen.caption
        return captions_in(self._cell(name, index).as_py()) if name else ()

    def identity(self, kept: Sequence[int], digests: Sequence[bytes] | None) -> Iterator[bytes]:
        yield from table_identity(self._chosen, len(self), kept, self._origin)
        if self._origin is None:
            yield from stamps([Path(file) for file in self._files])

    def order(self, generator: torch.Generator) -> Tensor:
        """All rows in the order of one epoch, int64 [n]: groups shuffled, then rows within windows of them."""
        shuffled = [self._groups[number] for number in torch.randperm(len(self._groups), generator=generator).tolist()]
        windows: list[list[Group]] = []
        room = 0
        for group in shuffled:
            if not windows or group.bytes > room:
                windows, room = [*windows, []], WINDOW
            windows[-1].append(group)
            room -= group.bytes
        rows = [torch.cat([torch.arange(group.first, group.first + group.rows) for group in window]) for window in windows]
        return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in rows])

    def _cell(self, name: str, index: int) -> "pa.Scalar[Any]":
        number = int(torch.searchsorted(self._firsts, index, right=True)) - 1
        return self._group(number).column(name)[index - self._groups[number].first]

    def _group(self, number: int) -> "pa.Table":
        """One row group; those used last are held, up to twice WINDOW."""
        with self._lock:
            if number not in self._held:
                self._held[number] = self._fetched(self._groups[number])
            self._held.move_to_end(number)
            while len(self._held) > 1 and sum(self._groups[held].bytes for held in self._held) > 2 * WINDOW:
                self._held.popitem(last=False)
            return self._held[number]

    def _fetched(self, group: Group) -> "pa.Table":
        import pyarrow.parquet as pq

        columns = [name for name in (self._chosen.image, self._chosen.label, self._chosen.caption) if name]
        with _asked(self._files[group.file]), _opened(self._files[group.file]) as file:
            return pq.ParquetFile(file, pre_buffer=True).read_row_group(group.number, columns)

    def _footer(self, url: str) -> tuple[list[tuple[int, int]], Any]:
        """Rows and bytes of each row group of a file, and its schema."""
        import pyarrow.parquet as pq

        with _asked(url), _opened(url) as file:
            found = pq.ParquetFile(file)
            about = (found.metadata.row_group(number) for number in range(found.metadata.num_row_groups))
            return [(group.num_rows, group.total_byte_size) for group in about], found.schema_arrow


class StreamedImages(StoredImages):
    """Rows of parquet files that are fetched as they are used. An image that is bad is found when it is used."""

    def __init__(
        self,
        groups: RowGroups,
        name: str,
        size: int | None = None,
        channels: int | None = None,
        on_bad: OnBad = "fail",
    ) -> None:
        super().__init__(groups, name, size, channels, on_bad)
        self._groups = groups
        self._place = torch.full((len(groups),), -1)
        self._place[torch.tensor(list(self._kept))] = torch.arange(len(self._kept))

    def order(self, generator: torch.Generator) -> Tensor:
        """The order of one epoch, int64 [n], in which each row group is fetched once."""
        places = self._place[self._groups.order(generator)]
        return places[places >= 0]


def _groups(footers: Sequence[Sequence[tuple[int, int]]]) -> list[Group]:
    groups: list[Group] = []
    first = 0
    for file, footer in enumerate(footers):
        for number, (rows, size) in enumerate(footer):
            if rows:
                groups.append(Group(file, number, first, rows, size))
                first += rows
    return groups


def _opened(url: str) -> Any:
    import fsspec

    return fsspec.open(url, "rb")


@contextmanager
def _asked(url: str) -> Iterator[None]:
    """Around the reading of a file: what breaks is a MissingError (not reached) or an IntegrityError (no parquet)."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, pa.ArrowKeyError) as error:
        raise IntegrityError(f"{url} is no whole parquet file: {first_line(error)}", "fetch it again") from None
    except Exception as error:  # of any of the libraries between here and the Hub
        hint = "run the same command again: it goes on where it stopped"
        raise MissingError(f"{url} cannot be read: {first_line(error)}", hint) from None
