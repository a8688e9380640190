"""Tables of encoded images as sources: parquet files in the Hub's layout, through `datasets` (memory-mapped Arrow)."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from dmpctl.data.columns import NO_LABEL, Chosen, Columns, captions_in, choose, image_bytes, labels_in, labels_of
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import FULL
from dmpctl.images.scan import printable
from dmpctl.images.stored import Labels, OnBad, StoredImages

if TYPE_CHECKING:
    from datasets import Dataset

LOOKED = 200_000  # rows up to which every header is read at the start
SAMPLE = 1_000  # of a longer table
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.parquet")


class Table:
    """The rows of a memory-mapped Arrow table as a store. `origin`: what the rows are, wherever they were read before.

    `files`: what they were read from now, for the fingerprint where `origin` is None.
    """

    def __init__(self, rows: "Dataset", chosen: Chosen, shown: str, origin: str | None, files: Sequence[Path] = ()) -> None:
        self.shown = shown
        self._rows, self._chosen, self._origin, self._files = rows, chosen, origin, files
        column = self._column(chosen.label) if chosen.label else None
        self._numbers, self._num_classes = labels_in(column, chosen, len(rows), shown)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return f"row {index}"

    def wrong(self, index: int) -> str | None:
        return "no label" if self._chosen.label and self._numbers[index] <= NO_LABEL else None

    def open(self, index: int) -> IO[bytes]:
        import pyarrow as pa

        return cast(IO[bytes], pa.BufferReader(image_bytes(self._column(self._chosen.image)[index])))

    def looked_at(self, good: Sequence[int]) -> Sequence[int]:
        """All of them up to LOOKED, of more a SAMPLE, evenly spread: the files may be larger than the memory."""
        return good if len(good) <= LOOKED else [good[len(good) * number // SAMPLE] for number in range(SAMPLE)]

    def labels(self, kept: Sequence[int]) -> Labels:
        return labels_of(self._numbers, self._num_classes, kept)

    def label(self, index: int) -> int:
        return int(self._numbers[index])

    def captions(self, index: int) -> tuple[str, ...]:
        name = self._chosen.caption
        return captions_in(self._column(name)[index].as_py()) if name else ()

    def identity(self, kept: Sequence[int], digests: Sequence[bytes] | None) -> Iterator[bytes]:
        """As `table_identity`; of a table without origin its content too, or its files where that was not read."""
        yield from table_identity(self._chosen, len(self), kept, self._origin)
        if self._origin is None:
            yield self._numbers.numpy().tobytes()
            yield from stamps(self._files) if digests is None else digests

    def _column(self, name: str) -> Any:
        return self._rows.data.column(name)  # not kept: pickled, it would be all of its bytes; the table is a file name


def table_identity(chosen: Chosen, rows: int, kept: Sequence[int], origin: str | None) -> Iterator[bytes]:
    """The columns, the rows that are used, and where they come from."""
    yield repr((chosen, rows, origin)).encode()
    if len(kept) < rows:
        yield hashlib.sha256(repr(list(kept)).encode()).digest()


def stamps(files: Sequence[Path]) -> Iterator[bytes]:
    """Name, size and time of change of each file."""
    for path in files:
        status = path.stat()
        yield os.fsencode(path.name) + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode()


class ParquetImages(StoredImages):
    """A parquet file, or a folder of them, with one row for each image.

    Of a folder with several splits `split` is taken: None for train, or the only one. Raises MissingError for a set that lacks
    shards, IntegrityError for a file that is no parquet, UsageError for no fitting column or split.
    """

    def __init__(
        self,
        path: Path,
        size: int | None = None,
        channels: int | None = None,
        on_bad: OnBad = "fail",
        columns: Columns | None = None,
        split: str | None = None,
    ) -> None:
        shown = printable(str(path))
        rows, files, _ = prepared(path, shown, split)
        chosen = choose(rows.features, columns or Columns(), shown)
        name = printable(path.stem if path.is_file() else path.name)
        super().__init__(Table(rows, chosen, shown, None, files), name, size, channels, on_bad)


def prepared(
    path: Path, shown: str, split: str | None, config: str | None = None, data_files: Mapping[str, str] | None = None
) -> tuple["Dataset", list[Path], str]:
    """Rows of a parquet file, or of one split of a folder in the Hub's layout; their files; and the split's full name.

    The first time, `datasets` writes the rows into its cache as Arrow.
    """
    with quiet(), explained(shown):
        builder, taken, files = _opened(path, shown, split, config, data_files)
        builder.download_and_prepare()
        return cast("Dataset", builder.as_dataset(split=taken)), files, f"{builder.config.name}/{taken}"


def local_files(path: Path, shown: str) -> list[Path]:
    """The files that `prepared` would read."""
    with quiet(), explained(shown):
        return _opened(path, shown, None, None, None)[2]


def _opened(
    path: Path, shown: str, split: str | None, config: str | None, data_files: Mapping[str, str] | None
) -> tuple[Any, str, list[Path]]:
    """What `datasets` builds the rows with, the split, and its files, of which none is missing."""
    import datasets

    if path.is_file():
        builder = datasets.load_dataset_builder("parquet", data_files=[str(path)])
    else:
        builder = datasets.load_dataset_builder(str(path), name=config, data_files=dict(data_files) if data_files else None)
    by_split = {str(name): [str(file) for file in files] for name, files in (builder.config.data_files or {}).items()}
    taken = split_of(by_split, split, shown)
    missing = missing_shards(by_split[taken])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MissingError(f"{shown} is not complete: {printable(missing[0])}{more} is not there", "fetch it again")
    return builder, taken, [Path(file) for file in by_split[taken]]


def split_of(by_split: Mapping[str, Sequence[str]], split: str | None, shown: str) -> str:
    """The split that is taken of those there are; UsageError where `split` is none of them, or None does not say enough."""
    taken = split or ("train" if "train" in by_split or len(by_split) != 1 else next(iter(by_split)))
    if not by_split.get(taken):
        raise UsageError(
            f"{shown} has no split {printable(taken)!r}", f"there is {', '.join(map(printable, by_split)) or 'none'}"
        )
    return taken


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
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars = [(datasets.are_progress_bars_disabled, datasets.disable_progress_bars, datasets.enable_progress_bars)]
    bars += [(are_progress_bars_disabled, disable_progress_bars, enable_progress_bars)]
    with ExitStack() as after:
        for disabled, disable, enable in bars:
            if not disabled():
                disable()
                after.callback(enable)
        yield


@contextmanager
def explained(shown: str) -> Iterator[None]:
    """Around the use of `datasets`: what it raises about files, columns and splits becomes one sentence."""
    from datasets.exceptions import DatasetGenerationError, DatasetsError, NonMatchingSplitsSizesError

    try:
        yield
    except ConnectionError:
        raise
    except NonMatchingSplitsSizesError:
        raise IntegrityError(f"{shown} has not the rows that its own card counts", "fetch it again") from None
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in FULL:
            raise UsageError(
                f"{shown} cannot be prepared: {cause.strerror}", "free some space, it needs its size once more"
            ) from None
        raise IntegrityError(f"{shown} cannot be read as a table: {first_line(cause)}", "fetch it again") from None
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{shown} cannot be opened: {first_line(error)}", "check --data") from None


def first_line(error: BaseException) -> str:
    """What an error says, as far as it fits into a sentence."""
    return printable((str(error).splitlines() or [""])[0][:300] or type(error).__name__)
