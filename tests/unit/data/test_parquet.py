import pickle
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Value

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.images.stored import StoredImages
from dmpctl.tables import parquet
from dmpctl.tables.columns import Columns
from dmpctl.tables.parquet import missing_shards
from tests.unit.data.made import encoded, parquet_images, picture, write_parquet

IMAGES = [encoded(seed) for seed in range(4)]
NAMES = ClassLabel(names=["cat", "dog", "emu"])


def labels(source: StoredImages) -> list[int]:
    return [source.item(index)[1] for index in range(len(source))]


def test_rows_are_the_images_in_their_order(tmp_path):
    source = parquet_images(write_parquet(tmp_path / "faces.parquet", IMAGES))
    assert source.name == "faces"
    assert source.num_classes == 0
    for index in range(4):
        assert np.array_equal(source.item(index)[0].permute(1, 2, 0).numpy(), np.asarray(picture(index)))


def test_a_folder_as_the_hub_has_it(tmp_path):
    for number in (1, 0):
        write_parquet(tmp_path / f"data/train-0000{number}-of-00002.parquet", IMAGES[2 * number : 2 * number + 2])
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", [encoded(9)])
    source = parquet_images(tmp_path)
    assert np.array_equal(source.images().permute(0, 2, 3, 1).numpy(), [np.asarray(picture(seed)) for seed in range(4)])
    assert len(parquet_images(tmp_path, split="test")) == 1
    with pytest.raises(UsageError, match="no split 'validation'") as caught:
        parquet_images(tmp_path, split="validation")
    assert "train, test" in str(caught.value.hint)


def test_a_missing_shard_is_no_smaller_set(tmp_path):
    for number in (0, 2):
        write_parquet(tmp_path / f"train-0000{number}-of-00003.parquet", IMAGES[:1])
    with pytest.raises(MissingError, match=r"not complete: train-00001-of-00003\.parquet is not there"):
        parquet_images(tmp_path)


def test_missing_shards():
    assert missing_shards(["a/x-00000-of-00002.parquet", "y.parquet"]) == ["x-00001-of-00002.parquet"]
    assert missing_shards(["x-00000-of-00002.parquet", "x-00001-of-00002.parquet"]) == []


def test_plain_arrow_files_without_features_work(tmp_path):
    cells = [{"bytes": content, "path": "/etc/passwd"} for content in IMAGES]
    pq.write_table(pa.table({"image": cells, "label": [0, 2, 0, 1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"jpg": IMAGES, "caption": list("abcd")}), tmp_path / "b.parquet")
    assert labels(parquet_images(tmp_path / "a.parquet")) == [0, 2, 0, 1]
    assert parquet_images(tmp_path / "a.parquet").num_classes == 3
    assert parquet_images(tmp_path / "b.parquet").captions(2) == ("c",)


def test_a_path_in_a_row_is_never_followed(tmp_path):
    picture(0).save(tmp_path / "a.png")
    cells = [{"bytes": IMAGES[0], "path": "a"}, {"bytes": None, "path": str(tmp_path / "a.png")}]
    pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet")
    assert parquet_images(tmp_path / "a.parquet", on_bad="skip").bad == [("row 1", "no image in this row")]


def test_the_class_label_is_the_label(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", IMAGES, kind=(NAMES, [2, 0, 0, 2]), year=(Value("int32"), [1, 2, 3, 4]))
    source = parquet_images(path)
    assert labels(source) == source.labels().tolist() == [2, 0, 0, 2]
    assert source.num_classes == 3
    other = parquet_images(path, columns=Columns(label="year"))
    assert (labels(other), other.num_classes) == ([1, 2, 3, 4], 5)
    assert source.fingerprint != other.fingerprint


def test_words_are_numbered_in_their_order(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", IMAGES, breed=(Value("string"), ["pug", "cob", "pug", "asp"]))
    assert labels(parquet_images(path, columns=Columns(label="breed"))) == [2, 1, 2, 0]


def test_a_row_without_a_label_is_bad(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", IMAGES, label=(NAMES, [0, -1, None, 1]))
    source = parquet_images(path, on_bad="skip")
    assert source.bad == [("row 1", "no label"), ("row 2", "no label")]
    assert labels(source) == [0, 1]
    with pytest.raises(IntegrityError, match="2 of 4 images"):
        parquet_images(path)


def test_captions_are_text_or_lists_of_it(tmp_path):
    one = write_parquet(tmp_path / "a.parquet", IMAGES, text=(Value("string"), ["a", "b", None, "d"]))
    assert [parquet_images(one).captions(index) for index in range(4)] == [("a",), ("b",), (), ("d",)]
    many = write_parquet(tmp_path / "b.parquet", IMAGES, said=(datasets.List(Value("string")), [["a", "b"], [], ["c"], ["d"]]))
    assert parquet_images(many).captions(0) == ()
    assert parquet_images(many, columns=Columns(caption="said")).captions(0) == ("a", "b")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (Columns(image="pixels"), "no column 'pixels'"),
        (Columns(image="year"), "'year' of .* holds no images"),
        (Columns(label="nothing"), "no column 'nothing'"),
        (Columns(label="image"), "'image' of .* is no label"),
        (Columns(caption="year"), "'year' of .* is no text"),
        (Columns(), "more than one column of .* is a label: kind, colour"),
    ],
)
def test_columns_that_do_not_fit(tmp_path, columns, said):
    two = {"kind": (NAMES, [0] * 4), "colour": (NAMES, [0] * 4)} if columns == Columns() else {}
    path = write_parquet(tmp_path / "a.parquet", IMAGES, year=(Value("int32"), [1] * 4), **two)
    with pytest.raises(UsageError, match=said) as caught:
        parquet_images(path, columns=columns)
    assert caught.value.exit_code == 2


def test_no_images_at_all(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"no column of .* holds images") as caught:
        parquet_images(tmp_path / "a.parquet")
    assert "--image-column: a" in str(caught.value.hint)


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1" + b"\0" * 50 + b"PAR1"])
def test_what_is_no_parquet(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises((IntegrityError, UsageError), match=r"a\.parquet cannot be") as caught:
        parquet_images(tmp_path / "a.parquet")
    assert "\n" not in caught.value.message


def test_a_truncated_file(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", IMAGES)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises((IntegrityError, UsageError), match=r"a\.parquet cannot be"):
        parquet_images(path)


def test_a_long_table_is_looked_at_here_and_there(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "LOOKED", 10)
    monkeypatch.setattr(parquet, "SAMPLE", 5)
    images = [encoded(seed) for seed in range(20)]
    images[1], images[8] = b"no image", b"no image either"
    path = write_parquet(tmp_path / "a.parquet", images)
    source = parquet_images(path, on_bad="skip")
    assert source.bad == [("row 8", "not a PNG, JPEG, TIFF or another image that is read")]
    assert source.images() is None
    assert torch.equal(source.item(1)[0], source.item(2)[0])
    assert np.array_equal(source.item(8)[0].permute(1, 2, 0).numpy(), np.asarray(picture(9)))
    assert source.replaced == ["row 1"]


def test_pickled_it_is_a_file_name_and_not_the_images(tmp_path):
    source = parquet_images(write_parquet(tmp_path / "a.parquet", [encoded(picture(0, size=128))] * 20), most_held=0)
    assert len(pickle.dumps(source)) < 10_000


@pytest.mark.parametrize("held", [True, False])
def test_the_fingerprint_sees_every_change(tmp_path, held):
    opened = partial(parquet_images, most_held=9 * held)
    path = write_parquet(tmp_path / "a.parquet", IMAGES, label=(NAMES, [0, 1, 2, 0]))
    seen = [opened(path, **option).fingerprint for option in ({}, {"size": 6}, {"channels": 1})]
    assert opened(path).fingerprint == seen[0]
    for images, values in ((IMAGES, [0, 1, 2, 1]), ([*IMAGES[:3], encoded(9)], [0, 1, 2, 1])):
        write_parquet(path, images, label=(NAMES, values))
        seen.append(opened(path).fingerprint)
    assert len(set(seen)) == 5


def test_nothing_is_written_beside_the_files(tmp_path):
    write_parquet(tmp_path / "set/a.parquet", IMAGES)
    parquet_images(tmp_path / "set")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "set", tmp_path / "set/a.parquet"]


def test_the_progress_bars_of_datasets_are_not_shown(tmp_path, capfd):
    path = write_parquet(Path(tmp_path) / "a.parquet", IMAGES)
    capfd.readouterr()
    parquet_images(path)
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()
