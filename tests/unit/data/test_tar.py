import json
import os
import random
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dmpctl.data.tar import BrokenTar, Slice, members
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.images.stored import StoredImages
from dmpctl.tables.columns import Columns
from tests.unit.data.made import encoded, picture, tar_images, write_tar

FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
ONE, TWO = encoded(1), encoded(2)


def labels(source: StoredImages) -> list[int]:
    return [source.item(index)[1] for index in range(len(source))]


def seen(path: Path) -> list[str]:
    return tar_images(path, 8, on_bad="skip").names()


@pytest.mark.parametrize("form", FORMS)
def test_members_are_those_of_the_standard_library(tmp_path, form):
    names = ["a.png", "deep/er/b.jpg", "x" * 90 + "/" + "y" * 60 + ".png", "ä€.png", "no extension", "empty.txt"]
    if form != "ustar":
        names += ["z" * 300 + ".png", os.fsdecode(b"\xff\xfe.png")]
    path = write_tar(tmp_path / "a.tar", [(name, os.urandom(number * 700)) for number, name in enumerate(names)], FORMS[form])
    with tarfile.open(path, errors="surrogateescape") as other:
        expected = [(m.name, m.offset_data, m.size) for m in other]
    assert [(member.name, member.offset, member.size) for member in members(path)] == expected


def test_what_is_no_regular_file_is_told(tmp_path):
    (tmp_path / "f.png").write_bytes(ONE)
    os.link(tmp_path / "f.png", tmp_path / "g.png")
    (tmp_path / "l.png").symlink_to("f.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("f.png", "g.png", "l.png"):
            archive.add(tmp_path / name, name)
        archive.add(tmp_path, "folder.png", recursive=False)
    assert [(m.name, m.regular) for m in members(tmp_path / "a.tar")] == [
        ("f.png", True),
        ("g.png", False),
        ("l.png", False),
        ("folder.png/", False),
    ]
    assert seen(tmp_path / "a.tar") == ["a.tar:f.png"]
    bad = tar_images(tmp_path / "a.tar", on_bad="skip").bad
    assert bad == [("a.tar:g.png", "not a regular file"), ("a.tar:l.png", "not a regular file")]


@pytest.mark.parametrize("form", FORMS)
def test_damaged_tar_files_raise_nothing_unexpected(tmp_path, form):
    draw = random.Random(form)
    path = write_tar(tmp_path / "a.tar", [("x" * 90 + f"{n}.png", ONE) for n in range(4)], FORMS[form])
    whole = path.read_bytes()[: 8 * 1024]
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])])
        try:
            source = tar_images(path, 8, on_bad="skip")
        except (IntegrityError, UsageError):
            continue
        assert 1 <= len(source) <= 4


def test_samples_share_a_key(tmp_path):
    said = json.dumps({"label": 3, "caption": "from json"}).encode()
    path = write_tar(
        tmp_path / "a.tar",
        [
            *(("b/1.cls", b"7\n"), ("b/1.png", ONE), ("b/1.txt", b"one\n")),
            *(("a/1.PNG", TWO), ("a/1.cls", b"0"), ("a/1.seg.png", b"not looked at")),
            *(("c.d.png", b"no image of ours: its extension is d.png"), ("e.json", said), ("e.png", ONE)),
        ],
    )
    source = tar_images(path, on_bad="skip")
    assert source.names() == ["a.tar:b/1.png", "a.tar:a/1.png", "a.tar:e.png"]
    assert source.bad == [("a.tar:c", "no image among its members")]
    assert labels(source) == source.labels().tolist() == [7, 0, 3]
    assert source.num_classes == 8
    assert [source.captions(index) for index in range(3)] == [("one",), (), ("from json",)]
    assert np.array_equal(source.item(1)[0].permute(1, 2, 0).numpy(), np.asarray(picture(2)))


def test_other_extensions_and_words_may_be_named(tmp_path):
    said = json.dumps({"id": 2, "alt": ["x", "y"]}).encode()
    path = write_tar(tmp_path / "a.tar", [("a.png", ONE), ("a.json", said), ("a.cls", b"1"), ("a.title", b"t")])
    source = tar_images(path, columns=Columns(label="id", caption="alt"))
    assert (labels(source), source.captions(0)) == ([2], ("x", "y"))
    assert tar_images(path, columns=Columns(caption="title")).captions(0) == ("t",)


def test_no_labels_are_no_classes(tmp_path):
    source = tar_images(write_tar(tmp_path / "a.tar", [("a.png", ONE), ("b.png", TWO)]))
    assert (source.num_classes, labels(source), source.captions(0)) == (0, [0, 0], ())


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ([("b.png", TWO)], "no label"),
        ([("b.png", TWO), ("b.cls", b"cat")], "its label is 'cat', not a number"),
        ([("b.png", TWO), ("b.cls", b"-1")], "not a number"),
        ([("b.cls", b"1")], "no image among its members"),
        ([("b.png", TWO), ("b.jpg", TWO), ("b.cls", b"1")], "more than one image"),
        ([("b.png", TWO), ("b.png", ONE), ("b.cls", b"1")], "two members called .png"),
        ([("b.png", b""), ("b.cls", b"1")], "empty"),
    ],
)
def test_a_bad_sample_is_named(tmp_path, extra, reason):
    path = write_tar(tmp_path / "a.tar", [("a.png", ONE), ("a.cls", b"4"), *extra])
    source = tar_images(path, on_bad="skip")
    assert len(source) == 1
    assert source.num_classes == 5
    assert reason in source.bad[0][1]
    with pytest.raises(IntegrityError, match=r"1 of 2 images .*a\.tar:b"):
        tar_images(path)


def test_shards_in_the_order_of_their_names(tmp_path):
    write_tar(tmp_path / "10.tar", [("a.png", ONE)])
    write_tar(tmp_path / "02.tar", [("b.png", TWO), ("a.png", TWO)])
    (tmp_path / "notes.txt").write_text("no shard")
    source = tar_images(tmp_path)
    assert seen(tmp_path) == ["02.tar:b.png", "02.tar:a.png", "10.tar:a.png"]
    assert source.name == tmp_path.name
    with pytest.raises(MissingError, match="no tar file"):
        tar_images(tmp_path.parent)


def test_of_a_truncated_shard_the_whole_samples_are_used(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", ONE), ("b.png", TWO)])
    path.write_bytes(path.read_bytes()[:1100])
    source = tar_images(path, on_bad="skip")
    assert seen(path) == ["a.tar:a.png"]
    assert len(source.bad) == 1
    assert source.bad[0][0] == "a.tar"
    assert "truncated" in source.bad[0][1]
    with pytest.raises(IntegrityError, match=r"a\.tar \(truncated"):
        tar_images(path)


@pytest.mark.parametrize("content", [b"", b"no tar file" * 100, b"\x1f\x8b\x08" + b"x" * 2000])
def test_what_is_no_tar_file(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"a\.tar \((empty|not a tar file|truncated)"):
        tar_images(tmp_path / "a.tar")


def test_a_tar_file_without_images(tmp_path):
    with pytest.raises(UsageError, match=r"no images in .*\.png"):
        tar_images(write_tar(tmp_path / "a.tar", []))


def test_nothing_is_unpacked(tmp_path):
    outside = ("../outside.png", ONE)
    source = tar_images(write_tar(tmp_path / "in" / "a.tar", [outside, ("/etc/b.png", TWO)]))
    assert len(source) == 2
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "in", tmp_path / "in" / "a.tar"]


@pytest.mark.parametrize("name", ["\udcff\udcfe.png", "z\x1b[2J\n.png", "\u202egnp.png"])
def test_names_that_are_no_text_are_escaped(tmp_path, name):
    assert len(tar_images(write_tar(tmp_path / "a.tar", [(name, ONE)]))) == 1
    with pytest.raises(IntegrityError) as caught:
        tar_images(write_tar(tmp_path / "a.tar", [(name, b"no image")]))
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("held", [True, False])
def test_the_fingerprint_sees_every_change(tmp_path, held):
    opened = partial(tar_images, most_held=9 * held)
    path = write_tar(tmp_path / "a.tar", [("a.png", ONE), ("a.cls", b"1")])
    found = [opened(path, **option).fingerprint for option in ({}, {"size": 6}, {"channels": 1})]
    assert opened(path).fingerprint == found[0]
    changes = ([("a.png", ONE), ("a.cls", b"2")], [("b.png", ONE), ("b.cls", b"2")], [("b.png", TWO), ("b.cls", b"2")])
    found += [opened(write_tar(path, files)).fingerprint for files in changes]
    assert len(set(found)) == 6


def test_a_slice_is_a_file(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(100)))
    with Slice(tmp_path / "a", 10, 20) as part:
        assert part.read() == bytes(range(10, 30))
        assert part.seek(-5, os.SEEK_END) == 15
        assert part.read(100) == bytes(range(25, 30))
        assert part.read(1) == b""
        part.seek(2)
        assert part.read(3) == bytes(range(12, 15))
        assert part.tell() == 5


def test_an_end_in_the_middle_is_no_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", ONE)])
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(BrokenTar, match="truncated"):
        list(members(path))
