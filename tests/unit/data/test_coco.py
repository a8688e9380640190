import json
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dmpctl.data.coco import captions_file, read_captions
from dmpctl.errors import IntegrityError, MissingError
from dmpctl.images.stored import StoredImages
from tests.unit.data.made import coco_images, encoded, picture, write_coco

IMAGES = {f"COCO_train2014_{n:012}.jpg": encoded(n) for n in range(4)}
ANNOTATIONS = "annotations/captions_train2014.json"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_coco(tmp_path, "train2014", IMAGES)


def opened(root: Path, **options: object) -> StoredImages:
    return coco_images(root / "train2014", root / ANNOTATIONS, "train2014", **options)


def zipped(root: Path, method: int = zipfile.ZIP_STORED) -> tuple[Path, Path]:
    """The two archives as they are published."""
    with zipfile.ZipFile(root / "train2014.zip", "w", method) as archive:
        archive.mkdir("train2014")
        for path in sorted((root / "train2014").iterdir()):
            archive.write(path, f"train2014/{path.name}")
    with zipfile.ZipFile(root / "annotations_trainval2014.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(root / ANNOTATIONS, ANNOTATIONS)
    return root / "train2014.zip", root / "annotations_trainval2014.zip"


def test_images_by_id_with_their_captions_by_id(root):
    source = opened(root)
    assert (source.name, source.num_classes, len(source)) == ("coco-train2014", 0, 4)
    for index, seed in enumerate(reversed(range(4))):
        name = f"COCO_train2014_{seed:012}.jpg"
        assert source.captions(index) == tuple(f"{name} said {turn}" for turn in range(5))
        assert np.array_equal(source.item(index)[0].permute(1, 2, 0).numpy(), np.asarray(picture(seed)))


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_archives_are_read_where_they_lie(root, method, held):
    loose = opened(root)
    before = sorted(root.rglob("*"))
    images, annotations = zipped(root, method)
    packed = coco_images(images, annotations, "train2014", most_held=9 * held)
    for index in range(4):
        assert (packed.item(index)[0] == loose.item(index)[0]).all()
        assert packed.captions(index) == loose.captions(index)
    assert sorted(root.rglob("*")) == sorted([*before, images, annotations])
    assert (packed.fingerprint == loose.fingerprint) == held


def test_an_image_that_is_not_there_is_bad(root):
    (root / "train2014" / "COCO_train2014_000000000002.jpg").unlink()
    with pytest.raises(IntegrityError, match=r"1 of 4 images .*2\.jpg \(not there\)"):
        opened(root)
    source = opened(root, on_bad="skip")
    assert [source.captions(index)[0] for index in range(3)] == [f"COCO_train2014_{n:012}.jpg said 0" for n in (3, 1, 0)]


def test_a_name_may_not_lead_out_of_the_folder(root):
    (root / "secret.png").write_bytes(encoded(9))
    about = json.loads((root / ANNOTATIONS).read_bytes())
    about["images"][0]["file_name"] = "../secret.png"
    (root / ANNOTATIONS).write_text(json.dumps(about))
    assert opened(root, on_bad="skip").bad == [("secret.png", "not there")]


def test_damage_inside_of_an_archive(root):
    images, annotations = zipped(root, zipfile.ZIP_DEFLATED)
    content = bytearray(images.read_bytes())
    start = content.index(b"COCO_train2014_000000000001.jpg") + 40
    content[start : start + 60] = b"\xff" * 60
    images.write_bytes(content)
    source = coco_images(images, annotations, "train2014", on_bad="skip")
    assert [name for name, _ in source.bad] == ["COCO_train2014_000000000001.jpg"]
    images.write_bytes(bytes(content)[:-100])
    with pytest.raises(IntegrityError, match=r"train2014\.zip is no whole zip file"):
        coco_images(images, annotations, "train2014")
    with pytest.raises(IntegrityError, match=r"holds no captions_val2014\.json"):
        coco_images(zipped(root)[0], annotations, "val2014")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"[" * 100_000, b'{"images": 3}', b'{"images": [], "annotations": []}'),
        b'{"images": [{"id": "x"}], "annotations": []}',
        b'{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"id": 1, "image_id": 2, "caption": "b"}]}',
    ],
)
def test_what_are_no_captions(content):
    with pytest.raises(IntegrityError, match=r"annotations (are no captions of COCO|name no image)"):
        read_captions(content)


def test_what_is_missing(root):
    with pytest.raises(MissingError, match=r"val2014 is not there") as caught:
        coco_images(root / "val2014", root / ANNOTATIONS, "val2014")
    assert "dmpctl download coco" in str(caught.value.hint)


def test_the_layout_is_known(root):
    assert captions_file(root) == root / ANNOTATIONS
    assert captions_file(root / "train2014") is None
    (root / "train2014").rename(root / "elsewhere")
    assert captions_file(root) is None


@pytest.mark.parametrize("held", [True, False])
def test_the_fingerprint_sees_captions_and_images(root, held):
    lazily = partial(opened, root, most_held=9 * held)
    found = [lazily().fingerprint, lazily(size=6).fingerprint]
    assert lazily().fingerprint == found[0]
    (root / ANNOTATIONS).write_bytes((root / ANNOTATIONS).read_bytes().replace(b"said 3", b"says 3"))
    found.append(lazily().fingerprint)
    (root / "train2014" / next(iter(IMAGES))).write_bytes(encoded(99))
    found.append(lazily().fingerprint)
    assert len(set(found)) == 4
