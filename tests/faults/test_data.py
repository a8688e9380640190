"""Data of users, and how commands use it: nothing that is meant may be passed over without a word."""

import codecs
import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from dmpctl.data.source import open_source
from dmpctl.errors import IntegrityError, UsageError
from dmpctl.images.stored import StoredImages
from dmpctl.measuring.image_sets import ImageSet, open_images_of
from dmpctl.measuring.reference import find_reference
from dmpctl.metrics.features.inception import Inception
from dmpctl.processes.command import Command
from dmpctl.settings.sections import Data
from dmpctl.types import Silent
from tests.foreign_helpers import tiny_clip
from tests.helpers import QUICK, Done, digit_folder, settings_for
from tests.unit.data.made import encoded, write_folder, write_parquet, write_tar


def colour(seed: int, width: int = 12, height: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(root: Path, *names: str, size: tuple[int, int] = (12, 12)) -> Path:
    """Pictures of these names, each of its own seed."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        colour(seed, *size).save(root / name)
    return root


def opened(root: Path, **options: Any) -> StoredImages:
    source = open_source(Data(data=str(root), **options), None, None)
    assert isinstance(source, StoredImages)
    return source


def pixels(source: StoredImages) -> list[list[list[list[int]]]]:
    return [source.item(index)[0].permute(1, 2, 0).tolist() for index in range(len(source))]


ROWS = [("b.png", "a blue thing, \u2028 odd", 2), ("a.png", "red", 0), ("c.png", "green", 1)]


def write_rows(path: Path, rows: Sequence[tuple[str, str, Any]] = ROWS, label: str | None = None) -> None:
    names = ("file_name", "text", *([label] if label else []))
    table = [dict(zip(names, row[: len(names)], strict=True)) for row in rows]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table), "utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(table)
    else:
        pq.write_table(pa.Table.from_pylist(table), path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("place", ["", "train/"])
@pytest.mark.parametrize("label", [None, "label"])
def test_metadata_is_read_as_datasets_reads_it(tmp_path, arrow_in_tmp, kind, place, label):
    root = saved(tmp_path, *(place + name for name, _, _ in ROWS))
    write_rows(root / f"{place}metadata.{kind}", label=label)
    theirs, ours = datasets.load_dataset("imagefolder", data_dir=str(root), split="train"), opened(root)
    assert [ours.captions(index) for index in range(3)] == [(row["text"],) for row in theirs]
    assert pixels(ours) == [np.asarray(row["image"].convert("RGB")).tolist() for row in theirs]
    assert [ours.item(index)[1] for index in range(3)] == [row.get("label", 0) for row in theirs]
    assert ours.num_classes == (3 if label else 0)
    assert f"captions from text of metadata.{kind}" in ours.inventory.line


def test_metadata_of_a_text_set_reaches_training(tmp_path, cli):
    root = saved(tmp_path / "set", *(f"train/{name}" for name, _, _ in ROWS))
    write_rows(root / "train" / "metadata.jsonl")
    encoder = tiny_clip(tmp_path / "clip")
    given = ("--text-conditional", "--text-encoder", encoder, "--run", tmp_path / "run", "--cache-dir", tmp_path / "cache")
    done = cli("pretrain", "--data", root, *given, *QUICK)
    assert done.code == 0, done.err
    assert "captions from text of metadata.jsonl" in done.err
    session = json.loads((tmp_path / "run" / "provenance.json").read_text())["sessions"][0]
    assert session["inventory"]["captions_from"] == "text of metadata.jsonl"
    assert session["inventory"]["images"] == 3


@pytest.mark.parametrize("label", ["word", "number", "float"])
def test_labels_of_metadata_are_used_whatever_they_are(tmp_path, label):
    """Words are numbered in their order, as torchvision numbers folders; whole floats (of pandas) are numbers."""
    root = saved(tmp_path, "a.png", "b.png", "c.png")
    values = {"word": ["dog", "cat", "dog"], "number": [2, 0, 2], "float": [2.0, 0.0, 2.0]}[label]
    write_rows(root / "metadata.csv", [(f"{name}.png", "", value) for name, value in zip("abc", values, strict=True)], "label")
    source = opened(root)
    assert source.labels().tolist() == ([1, 0, 1] if label == "word" else [2, 0, 2])
    assert source.num_classes == (2 if label == "word" else 3)


def test_a_text_beside_each_image_is_its_caption(tmp_path):
    root = saved(tmp_path, "a.png", "b.png")
    (root / "a.txt").write_bytes(codecs.BOM_UTF8 + b"red\n")
    (root / "notes.txt").write_text("none")
    source = opened(root)
    assert [source.captions(index) for index in range(2)] == [("red",), ()]
    assert "captions from the .txt of 1 images; not used: 1 .txt (notes.txt)" in source.inventory.line
    (root / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match=r"a\.txt is not text in UTF-8: byte 0xe9 in line 1, at 3"):
        opened(root).captions(0)


FORMS = {"png": "PNG", "tif": "TIFF", "gif": "GIF", "ppm": "PPM", "avif": "AVIF", "bmp": "BMP", "webp": "WEBP", "jp2": "JPEG2000"}


def test_all_that_pillow_reads_is_used_and_the_rest_is_named(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    for kind, form in FORMS.items():
        for number in range(2):
            colour(number).save(root / f"{number}.{kind}", form)
    for name in ("x.heic", "y.heic", "z", ".DS_Store"):
        (root / name).write_bytes(b"?")
    source = opened(root)
    assert len(source) == 2 * len(FORMS)
    for index, name in enumerate(source.names()):
        expected = np.asarray(Image.open(root / name).convert("RGB"))
        assert np.array_equal(source.item(index)[0].permute(1, 2, 0).numpy(), expected)
    assert source.inventory.line.endswith("not used: 1 without extension (z), 2 .heic (x.heic), 1 hidden (.DS_Store)")
    assert source.inventory.forms == dict.fromkeys(source.inventory.forms, 2)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_levels_without_a_known_range_are_refused(tmp_path, mode):
    Image.fromarray(np.full((8, 8), 0.5 if mode == "F" else 70_000, np.float32 if mode == "F" else np.int32)).save(
        tmp_path / "a.tif"
    )
    with pytest.raises(IntegrityError, match=r"a\.tif \(its levels are floats or above 16 bits"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("cat/1.png", "cow/1.tif", "dog/1.png"),
        ("0/a.png", "1/a.png", "2/a.png", "10/a.png"),
        ("Zebra/1.png", "ant/deep/1.png", "\u00e9mu/1.png"),
        ("cat/1.png", "dog/1.png", "empty/"),
    ],
)
def test_classes_are_numbered_as_torchvision_numbers_them(tmp_path, names):
    root = saved(tmp_path, *(name for name in names if not name.endswith("/")))
    for name in names:
        (root / name).mkdir(exist_ok=True) if name.endswith("/") else None
    theirs, ours = ImageFolder(str(root), allow_empty=True), opened(root)
    assert list(ours.classes) == theirs.classes
    assert ours.labels().tolist() == theirs.targets
    shown = ", ".join(f"{number} {name} ({theirs.targets.count(number)})" for number, name in enumerate(theirs.classes))
    assert f"{len(theirs.classes)} classes from its folders: {shown}" in ours.inventory.line


def test_an_empty_class_is_no_class_to_train_on(tmp_path, cli):
    root = saved(tmp_path / "set", "cat/1.png", "dog/1.png")
    (root / "cow").mkdir()
    done = cli("pretrain", "--data", root, "--class-conditional", "--dry-run", *QUICK)
    assert done.code == 2
    assert "the class cow of set has no image" in done.err


def two_kinds(root: Path) -> None:
    write_tar(saved(root, *(f"{n:02}.png" for n in range(18))) / "backup.tar", [("a.png", encoded(1)), ("b.png", encoded(2))])


def pictures_and_parquet(root: Path) -> None:
    write_parquet(saved(root, "a.png") / "rows.parquet", [encoded(1)])


def two_splits(root: Path) -> None:
    saved(root, "train/1.png", "val/1.png")


def splits_of_each_class(root: Path) -> None:
    for name in ("ant/train", "ant/test", "bee/train", "bee/test"):
        digit_folder(root / "set" / name, 2)


def two_splits_of_classes(root: Path) -> None:
    saved(root, "Training/cat/1.png", "Training/dog/1.png", "test2017/cat/1.png")


def splits_of_shards(root: Path) -> None:
    for split in ("train", "val"):
        write_tar(root / f"set-{split}-000.tar", [("a.png", encoded(1))])


def missing_rows(root: Path) -> None:
    saved(root, "a.png")
    write_rows(root / "metadata.csv", [("a.png", "x", 0), ("gone.png", "y", 0), ("../a.png", "z", 0)])


def two_metadata(root: Path) -> None:
    saved(root, "a.png")
    write_rows(root / "metadata.csv", [("a.png", "x", 0)])
    write_rows(root / "metadata.jsonl", [("a.png", "x", 0)])


def metadata_without_names(root: Path) -> None:
    (saved(root, "a.png") / "metadata.csv").write_text("name,text\na.png,x\n")


def edm_lacks_one(root: Path) -> None:
    (saved(root, "0/a.png", "0/b.png") / "dataset.json").write_text('{"labels": [["0/a.png", 1]]}')


def edm_vectors(root: Path) -> None:
    (saved(root, "a.png") / "dataset.json").write_text('{"labels": [["a.png", [0.5, 1.5]]]}')


def float_labels(root: Path) -> None:
    write_parquet(root / "a.parquet", [encoded(1), encoded(2)], label=(datasets.Value("float32"), [0.5, 1.0]))


def listed_labels(root: Path) -> None:
    write_parquet(root / "a.parquet", [encoded(1)], labels=(datasets.List(datasets.Value("int64")), [[0, 1]]))


def far_card(root: Path) -> None:
    write_parquet(root / "set" / "a.parquet", [encoded(1)])
    write_parquet(root / "secret.parquet", [encoded(2)])
    (root / "set" / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: ../secret.parquet\n---\n")


def web_card(root: Path) -> None:
    write_parquet(root / "a.parquet", [encoded(1)])
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: x\n  data_files:\n  - split: train\n    path: https://e.invalid/b.parquet\n---\n"
    )


def linked_table(root: Path) -> None:
    far = write_parquet(root / "far.parquet", [encoded(1)])
    (root / "set").mkdir()
    (root / "set" / "a.parquet").symlink_to(far)


def linked_tar(root: Path) -> None:
    far = write_tar(root / "far.tar", [("a.png", encoded(1))])
    (root / "set").mkdir()
    (root / "set" / "a.tar").symlink_to(far)


REFUSED = {
    two_kinds: (r"holds data of 2 kinds, images \(18, such as 00\.png\) and tar \(1, such as backup\.tar\)", "backup.tar"),
    pictures_and_parquet: (r"images \(1, such as a\.png\) and parquet \(1, such as rows\.parquet\)", "rows.parquet"),
    two_splits: ("holds several splits: train and val", "train"),
    two_splits_of_classes: ("holds several splits: Training and test2017", "Training"),
    splits_of_each_class: ("holds several splits in each folder: test and train", "a folder of its own"),
    splits_of_shards: (r"several splits: set-train-000\.tar and set-val-000\.tar", "a folder of its own"),
    missing_rows: (r"metadata\.csv of .* names 2 images that are not there: gone\.png, \.\./a\.png", "metadata.csv"),
    two_metadata: (r"has metadata\.csv and metadata\.jsonl, which both say", "metadata.jsonl"),
    metadata_without_names: (r"metadata\.csv of .* has no column file_name", "name, text"),
    edm_lacks_one: (r"dataset\.json of .* has no label for 1 images: 0/b\.png", "anew"),
    edm_vectors: (r"dataset\.json of .* labels that are no classes but \[0\.5, 1\.5\]", "whole numbers"),
    float_labels: ("the labels of .* are no whole numbers but float", "--label-column none"),
    listed_labels: ("the column 'labels' of .* is no label but list", "--label-column none"),
    far_card: (r"the card of .* names data outside of its folder: \.\./secret\.parquet", "card"),
    web_card: (r"the card of .* names data outside of its folder: https://e\.invalid/b\.parquet", "card"),
    linked_table: (r"a\.parquet is a link that leaves the folder", "--follow-links"),
    linked_tar: (r"a\.tar in .* is a link that leaves the folder", "--follow-links"),
}


@pytest.mark.parametrize("make", REFUSED, ids=[make.__name__ for make in REFUSED])
def test_what_is_meant_and_cannot_be_used_is_refused(tmp_path, arrow_in_tmp, make):
    make(tmp_path)
    reason, hint = REFUSED[make]
    with pytest.raises(UsageError, match=reason) as caught:
        opened(tmp_path / "set" if (tmp_path / "set").is_dir() else tmp_path)
    assert caught.value.exit_code == 2
    assert hint in str(caught.value.hint)


def test_the_hints_of_a_refusal_work(tmp_path, arrow_in_tmp):
    for make in (two_kinds, two_splits, float_labels, linked_table):
        make(tmp_path / make.__name__)
    assert len(opened(tmp_path / "two_kinds" / "backup.tar")) == 2
    (tmp_path / "two_kinds" / "backup.tar").rename(tmp_path / "backup.tar")
    assert len(opened(tmp_path / "two_kinds")) == 18
    assert opened(tmp_path / "two_splits" / "train").num_classes == 0
    assert opened(tmp_path / "float_labels", label_column="none").num_classes == 0
    assert len(opened(tmp_path / "linked_table" / "set", follow_links=True)) == 1


def test_the_one_split_there_is_is_the_data(tmp_path):
    source = opened(saved(tmp_path, "train/dog/1.png", "train/cat/1.png"))
    assert source.classes == ("cat", "dog")
    assert "those of train/" in source.inventory.line


def test_a_class_may_be_called_train(tmp_path):
    assert opened(saved(tmp_path, "train/1.png", "plane/1.png", "car/1.png")).classes == ("car", "plane", "train")


@pytest.mark.parametrize("labels", [[["10/b.png", 1], ["2/a.png", 0]], None])
def test_labels_of_edm(tmp_path, labels):
    root = saved(tmp_path, "2/a.png", "10/b.png")
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    source = opened(root)
    assert [source.names(), source.labels().tolist()] == [["10/b.png", "2/a.png"], [1, 0] if labels else [0, 0]]
    assert source.num_classes == (2 if labels else 0)


@pytest.mark.parametrize("kind", ["string", "large_string", "bool", "double"])
def test_a_column_called_label_is_used(tmp_path, arrow_in_tmp, kind):
    values = {"bool": [True, False, True], "double": [1.0, 0.0, None]}.get(kind, ["b", "a", "b"])
    write_parquet(tmp_path / "a.parquet", [encoded(n) for n in range(3)], label=(datasets.Value(kind), values))
    source = opened(tmp_path / "a.parquet", on_bad="skip")
    assert source.labels().tolist() == [1, 0, 1][: len(source)]
    assert list(source.inventory.classes)[:2] == (["0", "1"] if kind in ("bool", "double") else ["a", "b"])


@pytest.mark.parametrize("layout", ["side by side", "metadata apart", "shards apart", "files"])
def test_what_img2dataset_writes(tmp_path, layout):
    """Its shards are the data, or the files; parquet without images is what it says of them."""
    apart = {"metadata apart": ("", "metadata/"), "shards apart": ("shards/", "")}.get(layout, ("", ""))
    members = [("0.jpg", encoded(0, "JPEG")), ("0.txt", b"a thing"), ("0.json", b'{"key": "0"}')]
    if layout == "files":
        write_folder(tmp_path, {f"00000/{name}": content for name, content in members})
    else:
        write_tar(tmp_path / f"{apart[0]}00000.tar", members)
    (tmp_path / apart[1]).mkdir(exist_ok=True)
    pq.write_table(pa.table({"url": ["x"], "caption": ["a thing"], "key": ["0"]}), tmp_path / f"{apart[1]}00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    source = opened(tmp_path)
    assert (len(source), source.captions(0)) == (1, ("a thing",))
    assert "1 .parquet (" in source.inventory.line


def test_strays_and_what_a_disk_station_leaves_are_named(tmp_path, cli):
    root = saved(tmp_path / "set", "cat/1.png", "dog/1.png", "cat/@eaDir/1.png/SYNOPHOTO_THUMB_M.png", "__MACOSX/1.png")
    assert opened(root).classes == ("cat", "dog")
    assert "not used: 2 of the system (__MACOSX)" in opened(root).inventory.line
    saved(root, "stray.png")
    assert "no classes: stray.png lies outside of the sub-folders" in opened(root).inventory.line
    done = cli("pretrain", "--data", root, "--class-conditional", "--dry-run", *QUICK)
    assert (done.code, "no classes: stray.png" in done.err) == (2, True)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_are_followed_when_asked_for(tmp_path, what):
    saved(tmp_path / "far", "dog/1.png")
    root = saved(tmp_path / "set", "cat/1.png")
    (root / "dog").symlink_to(tmp_path / "far" / "dog") if what == "folder" else (root / "dog").mkdir()
    if what == "file":
        (root / "dog" / "1.png").symlink_to(tmp_path / "far" / "dog" / "1.png")
    with pytest.raises(IntegrityError, match="a link") as caught:
        opened(root)
    assert "--follow-links" in str(caught.value.hint)
    (root / "dog" / "loop").symlink_to(root) if what == "file" else None
    source = opened(root, follow_links=True, on_bad="skip")
    assert (source.classes, source.names()) == (("cat", "dog"), ["cat/1.png", "dog/1.png"])


def test_labels_that_are_not_used_are_said(tmp_path, cli):
    root = saved(tmp_path / "set", *(f"{name}/{n}.png" for name in "abc" for n in range(4)))
    done = cli("pretrain", "--data", root, "--dry-run", "--json", *QUICK)
    assert "set: 12 images (12 png, 12x12); 3 classes from its folders: 0 a (4), 1 b (4), 2 c (4)\n" in done.err
    assert "3 classes found, not used: add --class-conditional\n" in done.err
    assert json.loads(done.out)["inventory"]["classes"] == {"a": 4, "b": 4, "c": 4}
    assert "not used" not in cli("pretrain", "--data", root, "--dry-run", "--class-conditional", *QUICK).err
    assert cli("pretrain", "--data", root, "--dry-run", "--quiet", *QUICK).err == ""


def test_the_bundled_backbone_is_for_small_grey_images(tmp_path, cli):
    photos = saved(tmp_path / "photos", "a.png", "b.png", size=(64, 48))
    done = cli("patch", "--data", photos, "--dry-run")
    assert done.code == 2
    assert "photos has colour images of 64x48 pixels, the backbone digits is for grey ones of 8x8" in done.err
    assert "--size 8 --channels 1" in done.err
    done = cli("patch", "--data", photos, "--dry-run", "--size", 8, "--channels", 1)
    assert done.code == 0
    assert "2 cropped to squares; 2 resized to 8x8; 2 made grey" in done.err
    assert cli("patch", "--data", digit_folder(tmp_path / "digits", 9), "--dry-run").code == 0


def distance(cli: Callable[..., Done], what: Path, reference: Path, *given: object) -> float:
    done = cli("fid", what, "--reference", reference, "--json", "--allow-small", *given)
    assert done.code == 0, done.err
    return float(json.loads(done.out)["value"])


def prepared(what: Path, reference: Path, pixels: bool, clean: bool = False) -> tuple[ImageSet, ImageSet]:
    """Both sides of `dmpctl fid WHAT --reference REFERENCE`, as the extractor gets them."""
    command = Command.alone(settings_for("fid", cpu=True), Silent())
    images = open_images_of(what, command)
    real = find_reference(str(reference), images, pixels, command, clean)
    assert isinstance(real, ImageSet)
    return images, real


def test_channels_are_the_protocol_s_not_the_samples(tmp_path, cli):
    """Pictures stored grey or as three equal channels are as far from colour ones, whichever side they are."""
    for name, draw in (("real", range(30)), ("rgb", range(40, 70)), ("grey", range(40, 70))):
        (tmp_path / name).mkdir()
        for seed in draw:
            image = colour(seed, 6, 6)
            image = image if name == "real" else image.convert("L")
            (image.convert("RGB") if name == "rgb" else image).save(tmp_path / name / f"{seed}.png")
    given = ("--protocol", "pixels", "--cpu", "--cache-dir", tmp_path / "cache")
    rgb, grey = (distance(cli, tmp_path / name, tmp_path / "real", *given) for name in ("rgb", "grey"))
    assert grey == pytest.approx(rgb, rel=1e-6)
    back = [distance(cli, tmp_path / "real", tmp_path / name, *given) for name in ("rgb", "grey")]
    assert back == pytest.approx([rgb, rgb], rel=1e-6)
    assert prepared(tmp_path / "grey", tmp_path / "real", pixels=False)[1].shape == (3, 6, 6)


@pytest.mark.parametrize("size", [(20, 14), (18, 18)])
def test_images_of_another_size_go_to_the_network_as_they_are(tmp_path, random_inception, size):
    """As torch-fidelity measures two folders: each image is resized once, from its own size to the network's side."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    saved(tmp_path / "small", *(f"{n:02}.png" for n in range(2)))
    saved(tmp_path / "large", *(f"{n:02}.png" for n in range(2)), size=size)
    theirs, ours = (
        FeatureExtractorInceptionV3("i", ["2048"], feature_extractor_weights_path=str(random_inception)),
        Inception(random_inception, pinned=False),
    )
    for side, name in zip(prepared(tmp_path / "small", tmp_path / "large", pixels=False), ("small", "large"), strict=True):
        images = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted((tmp_path / name).iterdir())])
        expected = theirs(images.permute(0, 3, 1, 2).contiguous())[0]
        (_, found), *rest = side.read(range(2))
        assert torch.allclose(ours(found), expected, rtol=1e-4, atol=1e-5)
        assert not rest


def test_images_of_several_sizes_are_the_protocol_s_matter(tmp_path):
    """ADM crops to squares of the samples' size; clean-fid takes each as it is."""
    saved(tmp_path / "made", "a.png", size=(8, 8))
    saved(saved(tmp_path / "real", "a.png", size=(16, 12)), "b.png", size=(10, 10))
    shapes = {
        clean: [
            tuple(images.shape[1:]) for _, images in prepared(tmp_path / "made", tmp_path / "real", False, clean)[1].read([0, 1])
        ]
        for clean in (False, True)
    }
    assert shapes == {False: [(3, 8, 8)], True: [(3, 12, 16), (3, 10, 10)]}


def test_what_is_resized_is_said_and_recorded(tmp_path, cli):
    saved(tmp_path / "real", *(f"{n:02}.png" for n in range(30)), size=(16, 12))
    saved(tmp_path / "made", *(f"{n:02}.png" for n in range(30)), size=(8, 8))
    given = (
        "--reference",
        tmp_path / "real",
        "--protocol",
        "pixels",
        "--allow-small",
        "--cpu",
        "--cache-dir",
        tmp_path / "cache",
    )
    done = cli("fid", tmp_path / "made", "--json", *given)
    assert "real: 30 images (30 png, 16x12); 30 cropped to squares; 30 resized to 8x8" in done.err
    data = json.loads(done.out)["data"]
    assert (data["images"]["images"], data["reference"]["assumed"][-1]) == (30, "30 resized to 8x8")


def test_a_folder_of_two_kinds_is_no_reference(tmp_path, cli):
    two_kinds(tmp_path / "set")
    for line in ((tmp_path / "set", "--reference", "digits"), (digit_folder(tmp_path / "d", 9), "--reference", tmp_path / "set")):
        done = cli("fid", *line, "--allow-small", "--cpu")
        assert (done.code, "holds data of 2 kinds" in done.err) == (2, True)
