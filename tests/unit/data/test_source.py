import pytest
import torch
from datasets import ClassLabel, Value
from PIL import Image

from dmpctl.data.bundled import Digits
from dmpctl.data.source import open_source
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.images.stored import StoredImages
from dmpctl.settings.sections import Data
from dmpctl.store import locate
from dmpctl.tables.stream import StreamedImages
from tests.unit.data.made import (
    encoded,
    folder_images,
    write_coco,
    write_folder,
    write_parquet,
    write_tar,
)


@pytest.fixture
def images(tmp_path):
    Image.new("RGB", (12, 12), "red").save(tmp_path / "a.png")
    return tmp_path


def test_digits_are_bundled():
    assert isinstance(open_source(Data(data="digits"), None, None), Digits)
    with pytest.raises(UsageError, match="8x8"):
        open_source(Data(data="digits"), 64, None)


def test_a_path_is_a_folder_of_images(images):
    source = open_source(Data(data=str(images)), None, None)
    assert isinstance(source, StoredImages)
    assert source.item(0)[0].shape == (3, 12, 12)


def test_what_the_backbone_wants_goes_before_the_section(images):
    section = Data(data=str(images), size=10, channels=1)
    assert open_source(section, None, None).item(0)[0].shape == (1, 10, 10)
    assert open_source(section, 8, 3).item(0)[0].shape == (3, 8, 8)


def test_local_parquet_tar_and_coco(tmp_path):
    write_parquet(tmp_path / "p" / "a.parquet", [encoded(0)], text=(Value("string"), ["x"]), alt=(Value("string"), ["y"]))
    write_tar(tmp_path / "t" / "a.tar", [("a.png", encoded(0)), ("a.note", b"z")])
    write_coco(tmp_path / "c", "val2014", {"a.png": encoded(0)}, captions=1)
    folder = write_folder(tmp_path / "f", {"a.png": encoded(0)})
    found = {}
    for name, column in (("p", "alt"), ("p/a.parquet", None), ("t", "note"), ("t/a.tar", None), ("c", None), ("f", None)):
        source = open_source(Data(data=str(tmp_path / name), caption_column=column), None, None)
        assert torch.equal(source.item(0)[0], folder_images(folder).item(0)[0])
        found[name] = (source.names(), source.captions(0))
    assert found == {
        "p": (["row 0"], ("y",)),
        "p/a.parquet": (["row 0"], ("x",)),
        "t": (["a.tar:a.png"], ("z",)),
        "t/a.tar": (["a.tar:a.png"], ()),
        "c": (["a.png"], ("a.png said 0",)),
        "f": (["a.png"], ()),
    }


def test_streaming_is_for_parquet(tmp_path, images):
    rows = write_parquet(tmp_path.with_name(f"{tmp_path.name}-p") / "a.parquet", [encoded(row) for row in range(9)], 3)
    source = open_source(Data(data=str(rows.parent), streaming=True), None, None)
    assert isinstance(source, StreamedImages)
    assert len(source) == 9
    with pytest.raises(UsageError, match="is read where it lies already"):
        open_source(Data(data=str(images), streaming=True), None, None)


def test_names_are_looked_up_where_downloads_lie(tmp_path, monkeypatch):
    commit = tmp_path / "snapshots" / ("a" * 40)
    write_parquet(commit / "data/train-00000-of-00001.parquet", [encoded(0)], label=(ClassLabel(names=["n01", "n02"]), [1]))
    write_coco(tmp_path, "train2014", {"a.png": encoded(0)})
    places = {
        "imagenet": commit,
        "coco-train2014": tmp_path / "train2014",
        "coco-annotations": tmp_path / "annotations" / "captions_train2014.json",
    }
    monkeypatch.setattr(locate, "require", lambda name, settings: places[name])
    imagenet = open_source(Data(data="imagenet"), None, None)
    assert (imagenet.name, imagenet.num_classes, imagenet.item(0)[1]) == ("imagenet", 2, 1)
    coco = open_source(Data(data="coco"), None, None)
    assert (coco.name, len(coco.captions(0))) == ("coco-train2014", 5)


def test_a_folder_of_synsets_has_imagenet_s_class_order(tmp_path):
    files = {f"{synset}/{synset}_1.JPEG": encoded(0, "JPEG") for synset in ("n02111889", "n01440764", "n01443537")}
    source = open_source(Data(data=str(write_folder(tmp_path, files))), None, None)
    assert source.classes == ("n01440764", "n01443537", "n02111889")  # tench 0, goldfish 1, as in the published list
    assert [source.item(index)[1] for index in range(3)] == [0, 1, 2]


def test_a_bare_name_may_be_a_folder_here(images, monkeypatch):
    monkeypatch.chdir(images.parent)
    assert open_source(Data(data=images.name), None, None).name == images.name


def test_home_is_understood(images, monkeypatch):
    monkeypatch.setenv("HOME", str(images.parent))
    assert open_source(Data(data=f"~/{images.name}"), None, None).name == images.name


def test_a_typo_is_answered_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"'digts'; the nearest is 'digits'") as caught:
        open_source(Data(data="digts"), None, None)
    assert caught.value.exit_code == 2
    assert "folder" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["pictures of cats", "", "x" * 5000, "a\0b"])
def test_an_unknown_name_is_answered_with_the_known_ones(name):
    with pytest.raises(UsageError, match="there is digits"):
        open_source(Data(data=name), None, None)


@pytest.mark.parametrize("name", ["./digts", "data/ffhq", "/nowhere/at/all", "~/no such folder"])
def test_what_looks_like_a_path_is_missing(name):
    with pytest.raises(MissingError, match="there is no folder") as caught:
        open_source(Data(data=name), None, None)
    assert caught.value.exit_code == 3


def test_no_name_is_no_data():
    with pytest.raises(UsageError, match="no data is named"):
        open_source(Data(data=None), None, None)


def test_latent_channels_are_not_image_channels(images):
    with pytest.raises(UsageError, match="1 or 3 channels, not 4"):
        open_source(Data(data=str(images)), None, 4)


def test_bad_files_follow_the_section(images):
    (images / "b.png").write_bytes(b"no image")
    with pytest.raises(IntegrityError):
        open_source(Data(data=str(images)), None, None)
    assert len(open_source(Data(data=str(images), on_bad="skip"), None, None)) == 1
