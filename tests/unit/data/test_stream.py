import pickle
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Value

from dmpctl.batches.loader import StepBatches, batches, order_of
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.rng import seed_of
from dmpctl.tables import stream
from dmpctl.tables.columns import UNNAMED, Columns
from dmpctl.tables.stream import StreamedImages, StreamReader
from tests.unit.data.made import encoded, parquet_images, write_parquet

ROWS, PER_GROUP = 60, 7


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files of 30 rows, in row groups of 7, 7, 7, 7 and 2."""
    kind = ClassLabel(names=["a", "b", "c"])
    return [
        write_parquet(
            tmp_path / f"train-0000{part}-of-00002.parquet",
            [encoded(row) for row in rows],
            PER_GROUP,
            label=(kind, [row % 3 for row in rows]),
            text=(Value("string"), [f"row {row}" for row in rows]),
        )
        for part, rows in enumerate((range(30), range(30, ROWS)))
    ]


def opened(files: list[Path], window: int = stream.WINDOW, **options: object) -> StreamedImages:
    return StreamedImages(StreamReader(files, "set", "the set", UNNAMED, window=window), **options)


def order(source: StreamedImages, seed: int = 0) -> list[int]:
    return source.order(torch.Generator().manual_seed(seed)).tolist()


def fetched(source: StreamedImages, monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Counts the fetches of each row group from now on."""
    source._rows._held.clear()
    return counted(monkeypatch)


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    count: Counter[int] = Counter()
    fetch = StreamReader._fetched
    monkeypatch.setattr(StreamReader, "_fetched", lambda groups, group: count.update([group.first]) or fetch(groups, group))
    return count


def test_items_are_those_of_the_same_files_at_rest(files, tmp_path):
    source, other = opened(files), parquet_images(tmp_path)
    assert len(source) == len(other) == ROWS
    assert source.num_classes == other.num_classes == 3
    assert source.images() is None
    for index in (0, 6, 7, 29, 30, 59):
        assert torch.equal(source.item(index)[0], other.item(index)[0])
        assert source.item(index)[1] == other.item(index)[1] == index % 3
        assert source.captions(index) == other.captions(index) == (f"row {index}",)
    assert torch.equal(source.labels(), other.labels())
    with pytest.raises(IndexError):
        source.item(ROWS)


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(files):
    source = opened(files)
    assert all(sorted(order(source, seed)) == list(range(ROWS)) for seed in range(5))
    assert len({tuple(order(source, seed)) for seed in range(5)}) == 5
    assert order(source, 3) == order(opened(files), 3)


def test_each_row_group_is_fetched_once_in_an_epoch(files, monkeypatch):
    sizes = [group.bytes for group in opened(files)._rows._groups]
    source = opened(files, 2 * max(sizes))
    count = fetched(source, monkeypatch)
    for index in order(source):
        source.item(index)
    assert len(count) == len(sizes) == 10
    assert set(count.values()) == {1}
    held = sum(source._rows._groups[number].bytes for number in source._rows._held)
    assert held <= 2 * 2 * max(sizes)


def test_rows_are_shuffled_within_windows(files):
    source = opened(files, 3 * max(group.bytes for group in opened(files)._rows._groups))
    firsts = torch.tensor([group.first for group in source._rows._groups])
    groups = [int(torch.searchsorted(firsts, row, right=True)) for row in order(source)]
    assert len(set(groups[:PER_GROUP])) > 1
    gone = [len(groups) - 1 - groups[::-1].index(group) for group in dict.fromkeys(groups)]
    begun = [groups.index(group) for group in dict.fromkeys(groups)]
    assert max(end - start for start, end in zip(begun, gone, strict=True)) <= 4 * PER_GROUP


def test_nothing_is_fetched_before_it_is_used(files, monkeypatch):
    count = counted(monkeypatch)
    source = opened(files)
    assert set(count) <= {0}
    source.item(31)
    assert set(count) == {0, 30}


def test_loader_processes_get_the_same(files):
    source = opened(files)
    source.item(0)
    dumped = pickle.dumps(source)
    copy = pickle.loads(dumped)  # noqa: S301
    assert len(dumped) < 20_000
    assert torch.equal(copy.item(40)[0], source.item(40)[0])
    assert order(copy) == order(source)


@pytest.mark.parametrize("bad", [0, 40])
def test_bad_rows(tmp_path, bad):
    images = [b"no image" if row == bad else encoded(row) for row in range(50)]
    path = write_parquet(tmp_path / "a.parquet", images, PER_GROUP)
    if bad:  # found when it is used
        with pytest.raises(IntegrityError, match="row 40 cannot be decoded"):
            opened([path]).item(40)
    else:
        with pytest.raises(IntegrityError, match=r"1 of 50 images .*row 0"):
            opened([path])
    source = opened([path], on_bad="skip")
    assert len(source) == (50 if bad else 49)
    assert sorted(order(source)) == list(range(len(source)))
    other = opened([write_parquet(tmp_path / "b.parquet", [encoded(row) for row in range(50)], PER_GROUP)])
    assert torch.equal(source.item(bad)[0], other.item(bad + 1)[0])
    assert (source.replaced, len(source.bad)) == (["row 40"] if bad else [], 0 if bad else 1)


def test_a_row_without_a_label_is_bad(tmp_path):
    kind = ClassLabel(names=["a", "b"])
    path = write_parquet(tmp_path / "a.parquet", [encoded(row) for row in range(20)], 5, label=(kind, [0, 1] * 9 + [-1, None]))
    with pytest.raises(IntegrityError, match="row 18 cannot be decoded: no label"):
        opened([path]).item(18)


def test_labels_without_names(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [encoded(0)], label=(Value("int64"), [3]))
    assert opened([path]).num_classes == 0
    with pytest.raises(UsageError, match="have no names, and streaming cannot count them"):
        StreamReader([path], "set", "the set", Columns(label="label"))


def test_what_cannot_be_read(files, tmp_path):
    source = opened(files)
    files[1].unlink()
    with pytest.raises(MissingError, match=r"00001-of-00002\.parquet cannot be read: .*No such file") as caught:
        source.item(40)
    assert "goes on where it stopped" in str(caught.value.hint)
    (tmp_path / "b.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(IntegrityError, match=r"b\.parquet is no whole parquet file"):
        opened([tmp_path / "b.parquet"])
    with pytest.raises(UsageError, match="the set has no rows"):
        opened([write_parquet(tmp_path / "c.parquet", [])])


def test_the_shuffle_reaches_everywhere(files):
    source = opened(files)
    first = [order(source, seed)[0] for seed in range(200)]
    assert len(set(first)) > 40
    assert abs(float(np.mean(first)) - (ROWS - 1) / 2) < 5


@pytest.mark.parametrize("world", [1, 2, 4])
def test_training_sees_each_row_once_in_an_epoch_on_any_layout(files, world):
    """Two epochs and more in batches of 8 out of 60 rows; then the same from the middle, with two loader processes."""
    opened_here = partial(opened, files, 3_000)
    known = {opened_here().item(row)[0].numpy().tobytes(): row for row in range(ROWS)}

    def steps(count: int, start: int = 0, workers: int = 0) -> list[int]:
        sources = [opened_here() for _ in range(world)]
        orders = [StepBatches(ROWS, 8, 3, start, rank, world, order_of(source)) for rank, source in enumerate(sources)]
        ranks = [batches(source, order, num_workers=workers) for source, order in zip(sources, orders, strict=True)]
        taken = [[images for images, _ in islice(rank, count)] for rank in ranks]
        for rank in ranks:
            rank.close()
        together = [torch.stack(step, 1).flatten(0, 1) for step in zip(*taken, strict=True)]
        return [known[image.numpy().tobytes()] for step in together for image in step]

    seen = steps(16)
    generators = [torch.Generator().manual_seed(seed_of(3, "order", epoch)) for epoch in range(3)]
    assert seen == [row for generator in generators for row in opened_here().order(generator).tolist()][: 16 * 8]
    assert all(Counter(seen[epoch * ROWS : (epoch + 1) * ROWS]) == Counter(range(ROWS)) for epoch in range(2))
    assert steps(4, start=6) == seen[48:80]
    assert steps(4, start=6, workers=2) == seen[48:80]
