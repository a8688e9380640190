import os
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmpctl.data import folder
from dmpctl.errors import DmpError, IntegrityError, MissingError, UsageError
from dmpctl.images import scan, stored
from tests.unit.data.made import folder_images, header_of, picture

FORMS = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}


def fill(root: Path, *names: str, **options: int) -> Path:
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed, **options).save(path, FORMS[path.suffix.lower()])
    return root


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("this is no image\n" * 20)


def truncated(path: Path) -> None:
    picture(9).save(path)
    path.write_bytes(path.read_bytes()[:-60])


def bomb(path: Path) -> None:
    path.write_bytes(header_of(20_000, 20_000))


def large(path: Path) -> None:
    path.write_bytes(header_of(12_000, 9_000))  # Pillow only warns of this one


def small(path: Path) -> None:
    picture(9, size=3).save(path)


def postscript(path: Path) -> None:
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def broken_link(path: Path) -> None:
    path.symlink_to("nowhere.png")


def outward_link(path: Path) -> None:
    picture(9).save(path.parent.parent / "outside.png")
    path.symlink_to("../outside.png")


def sibling_link(path: Path) -> None:
    (path.parent.parent / "images-2").mkdir()  # the same first letters as the folder itself
    picture(9).save(path.parent.parent / "images-2" / "b.png")
    path.symlink_to("../images-2/b.png")


BAD = [
    (empty, "empty"),
    (text, "not a PNG"),
    (truncated, "truncated"),
    (bomb, "pixels"),
    (large, "pixels"),
    (small, "too small: 3x3 for size 8"),
    (postscript, "not a PNG"),
    (pipe, "not a regular file"),
    (broken_link, "a broken link"),
    (outward_link, "leaves the folder"),
    (sibling_link, "leaves the folder"),
]


@pytest.mark.parametrize(("spoil", "reason"), BAD, ids=[spoil.__name__ for spoil, _ in BAD])
def test_a_bad_file_is_named_and_never_replaced(tmp_path, recwarn, spoil, reason):
    root = fill(tmp_path / "images", "a.png", "c.png")
    spoil(root / "b.png")
    source = folder_images(root, 8, on_bad="skip")
    assert not list(recwarn)
    assert [name for name, _ in source.bad] == ["b.png"]
    assert reason in source.bad[0][1]
    assert source.names() == ["a.png", "c.png"]
    for index in range(2):
        assert np.array_equal(source.item(index)[0].permute(1, 2, 0).numpy(), np.asarray(picture(index)))
    with pytest.raises(IntegrityError, match=r"1 of 3 images .*b\.png \(") as caught:
        folder_images(root, 8)
    assert reason in caught.value.message
    assert caught.value.exit_code == 4
    assert "--on-bad skip" in str(caught.value.hint)


def test_many_bad_files_are_counted_and_the_first_named(tmp_path):
    fill(tmp_path, "a.png")
    for number in range(5):
        text(tmp_path / f"b{number}.png")
    with pytest.raises(IntegrityError, match=r"5 of 6 images .*b0\.png .*b1\.png .*b2\.png .*\.\.\.$"):
        folder_images(tmp_path, 8)


def test_with_nothing_left_even_skip_refuses(tmp_path):
    text(tmp_path / "a.png")
    with pytest.raises(IntegrityError, match="1 of 1 images") as caught:
        folder_images(tmp_path, 8, on_bad="skip")
    assert "none is left" in str(caught.value.hint)


@pytest.mark.parametrize("held", [True, False])
def test_a_bomb_is_never_decoded(tmp_path, monkeypatch, held):
    fill(tmp_path, "a.png")
    bomb(tmp_path / "b.png")
    large(tmp_path / "c.png")
    sizes = []
    monkeypatch.setattr(Image.Image, "load", lambda image, load=Image.Image.load: sizes.append(image.size) or load(image))
    source = folder_images(tmp_path, 8, on_bad="skip", most_held=3 * held)
    source.item(0)
    assert len(source) == 1
    assert set(sizes) == {(8, 8)}


def test_a_file_that_may_not_be_read_is_bad(tmp_path, monkeypatch):
    fill(tmp_path, "a.png", "b.png")

    def guarded(path, mode):
        if path.endswith("b.png"):
            raise PermissionError(13, "Permission denied", path)
        return open(path, mode)

    monkeypatch.setattr(folder, "open", guarded, raising=False)
    assert folder_images(tmp_path, 8, on_bad="skip").bad == [("b.png", "Permission denied")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permissions_is_bad(tmp_path):
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / "b.png").chmod(0)
    assert folder_images(tmp_path, 8, on_bad="skip").bad == [("b.png", "Permission denied")]


@pytest.mark.parametrize("which", ["top", "sub"])
def test_a_folder_that_may_not_be_listed(tmp_path, monkeypatch, which):
    fill(tmp_path, "good/a.png", "shut/b.png")
    listing = os.scandir

    def guarded(path):
        if str(path).rstrip("/").endswith("shut" if which == "sub" else tmp_path.name):
            raise PermissionError(13, "Permission denied", path)
        return listing(path)

    monkeypatch.setattr(scan.os, "scandir", guarded)
    if which == "top":
        with pytest.raises(UsageError, match="cannot be listed: Permission denied"):
            folder_images(tmp_path, 8)
    else:
        source = folder_images(tmp_path, 8, on_bad="skip")
        assert source.bad == [("shut/", "Permission denied")]
        assert source.classes == ("good", "shut")


def test_links_inside_the_folder_are_images_and_links_to_folders_are_not_followed(tmp_path):
    fill(tmp_path, "x/a.png")
    (tmp_path / "x" / "b.png").symlink_to("a.png")
    (tmp_path / "x" / "loop").symlink_to("..")
    source = folder_images(tmp_path, 8, on_bad="skip")
    assert source.names() == ["x/a.png", "x/b.png"]
    assert source.bad == [("x/loop/", "a link to a folder, not followed")]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP"])
def test_damaged_bytes_raise_nothing_unexpected(tmp_path, form):
    draw = random.Random(form)
    suffix = {value: key for key, value in FORMS.items()}[form]
    picture(0).save(tmp_path / f"whole{suffix}", form)
    whole = (tmp_path / f"whole{suffix}").read_bytes()
    for number in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 5)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / f"{number:03}{suffix}").write_bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])])
    source = folder_images(tmp_path, 8, on_bad="skip")
    assert len(source) + len(source.bad) == 151
    assert len(source.bad) > 50


def test_a_truncated_png_is_bad_unless_all_of_its_pixels_are_there(tmp_path):
    picture(0).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for length in range(0, len(whole), 3):
        (tmp_path / f"{length:04}.png").write_bytes(whole[:length])
    source = folder_images(tmp_path, 8, on_bad="skip")
    assert len(source) <= 10  # checksums and end mark are 24 bytes
    assert all((source.images() == torch.tensor(np.asarray(picture(0))).permute(2, 0, 1)).flatten())


def test_the_same_list_in_whatever_order_files_were_made(tmp_path):
    fill(tmp_path / "one", "b/1.png", "a/2.png", "a/1.png")
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        (tmp_path / "two" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "two" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    one, two = folder_images(tmp_path / "one"), folder_images(tmp_path / "two")
    assert one.names() == two.names() == ["a/1.png", "a/2.png", "b/1.png"]
    assert one.fingerprint == two.fingerprint


def test_extensions_count_in_any_case_and_nothing_else_is_looked_at(tmp_path):
    fill(tmp_path, "a.PNG", "b.jpg", "c.webp", "d.bmp", "deep/er/e.png")
    picture(5).save(tmp_path / "f.JPEG")
    text(tmp_path / "labels.txt")
    text(tmp_path / "._b.jpg")
    fill(tmp_path, ".thumbnails/a.png")
    assert folder_images(tmp_path).names() == ["a.PNG", "b.jpg", "c.webp", "d.bmp", "deep/er/e.png", "f.JPEG"]


def test_content_counts_not_the_extension(tmp_path):
    picture(0).save(tmp_path / "a.png", "BMP")
    assert np.array_equal(folder_images(tmp_path).item(0)[0].permute(1, 2, 0).numpy(), np.asarray(picture(0)))


@pytest.mark.parametrize("name", [b"\xff\xfe.png", b"z\x1b[2J\n.png", "\u202egnp.png".encode()])
def test_names_that_are_no_text_work_and_are_escaped_in_messages(tmp_path, name):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    picture(0).save(path, "PNG")
    assert len(folder_images(tmp_path)) == 1
    text(path)
    with pytest.raises(IntegrityError) as caught:
        folder_images(tmp_path)
    assert caught.value.message.isprintable()
    assert caught.value.message.encode("utf-8")


def test_folders_are_classes_if_every_image_lies_in_one(tmp_path):
    source = folder_images(fill(tmp_path, "dog/1.png", "cat/1.png", "cat/deep/2.png"))
    assert source.classes == ("cat", "dog")
    assert source.num_classes == 2
    assert [source.item(index)[1] for index in range(3)] == source.labels().tolist() == [0, 0, 1]
    fill(tmp_path, "stray.png")
    assert folder_images(tmp_path).num_classes == 0
    assert folder_images(tmp_path).labels().tolist() == [0, 0, 0, 0]


def test_a_class_of_bad_files_keeps_its_number_and_a_bad_stray_is_no_image(tmp_path):
    fill(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "cow").mkdir()
    text(tmp_path / "cow" / "1.png")
    truncated(tmp_path / "stray.png")
    source = folder_images(tmp_path, on_bad="skip")
    assert source.classes == ("cat", "cow", "dog")
    assert source.labels().tolist() == [0, 2]


def test_no_size_means_the_size_they_share(tmp_path):
    fill(tmp_path, "a.png", "b.png", size=12)
    assert folder_images(tmp_path).item(0)[0].shape == (3, 12, 12)
    assert folder_images(tmp_path, 8).item(0)[0].shape == (3, 8, 8)
    fill(tmp_path, "c.png", size=10)
    with pytest.raises(UsageError, match=r"12x12 \(2 of them\), 10x10 \(1 of them\)") as caught:
        folder_images(tmp_path)
    assert "--size" in str(caught.value.hint)


def test_no_size_needs_squares(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="not squares of one size: found 8x6"):
        folder_images(tmp_path)


def test_no_channels_means_grey_only_if_all_are(tmp_path):
    fill(tmp_path, "a.png", "b.png", channels=1)
    assert folder_images(tmp_path).item(0)[0].shape == (1, 8, 8)
    assert folder_images(tmp_path, channels=3).item(0)[0].shape == (3, 8, 8)
    picture(3).save(tmp_path / "c.png")
    assert folder_images(tmp_path).item(0)[0].shape == (3, 8, 8)
    assert folder_images(tmp_path, channels=1).item(2)[0].shape == (1, 8, 8)


def test_up_to_twice_is_enlarged(tmp_path):
    fill(tmp_path, "a.png", size=8)
    assert folder_images(tmp_path, 16).item(0)[0].shape == (3, 16, 16)
    with pytest.raises(IntegrityError, match="too small: 8x8 for size 17"):
        folder_images(tmp_path, 17)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_of_an_animation_the_first_frame_counts(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert folder_images(tmp_path).item(0)[0][:, 0, 0].tolist() == [255, 0, 0]


def test_missing_a_file_and_empty_are_told_apart(tmp_path):
    with pytest.raises(MissingError, match="there is no folder") as missing:
        folder_images(tmp_path / "nowhere")
    assert missing.value.exit_code == 3
    with pytest.raises(UsageError, match="is a file, not a folder"):
        folder_images(fill(tmp_path, "a.png") / "a.png")
    (tmp_path / "empty").mkdir()
    text(tmp_path / "empty" / "labels.txt")
    with pytest.raises(UsageError, match=r"no images in .*\.png, \.jpg, \.jpeg, \.webp, \.bmp") as nothing:
        folder_images(tmp_path / "empty")
    assert nothing.value.exit_code == 2


@pytest.mark.parametrize("limit", ["items", "bytes"])
def test_a_large_folder_is_decoded_as_it_is_used(tmp_path, monkeypatch, limit):
    fill(tmp_path, "a/1.png", "b/2.jpg", size=11)
    held = folder_images(tmp_path, 8)
    if limit == "bytes":
        monkeypatch.setattr(stored, "HELD_BYTES", 1)
    lazy = folder_images(tmp_path, 8, **({"most_held": 1} if limit == "items" else {}))
    assert held.images().shape == (2, 3, 8, 8)
    assert lazy.images() is None
    assert torch.equal(lazy.labels(), held.labels())
    for index in range(2):
        assert torch.equal(lazy.item(index)[0], held.item(index)[0])
        assert lazy.item(index)[1] == held.item(index)[1]


def test_in_a_large_folder_a_broken_file_stops_by_name(tmp_path):
    fill(tmp_path, "a.png")
    truncated(tmp_path / "b.png")
    text(tmp_path / "c.png")
    with pytest.raises(IntegrityError, match=r"c\.png"):
        folder_images(tmp_path, 8, most_held=0)
    (tmp_path / "c.png").unlink()
    source = folder_images(tmp_path, 8, most_held=0)
    assert len(source) == 2  # what its header does not tell is found when it is used
    with pytest.raises(DmpError, match=r"b\.png cannot be decoded: .*truncated") as caught:
        source.item(1)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("held", [True, False])
def test_the_fingerprint_sees_every_change(tmp_path, held):
    opened = partial(folder_images, most_held=9 * held)
    fill(tmp_path, "a/1.png", "b/2.png")
    options = ({}, {"size": 6}, {"channels": 1})
    seen = [opened(tmp_path, **option).fingerprint for option in options]
    assert opened(tmp_path).fingerprint == seen[0]
    picture(7).save(tmp_path / "a" / "1.png")
    seen.append(opened(tmp_path).fingerprint)
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "3.png")
    seen.append(opened(tmp_path).fingerprint)
    (tmp_path / "b" / "2.png").unlink()
    seen.append(opened(tmp_path).fingerprint)
    assert len(set(seen)) == 6


def test_touching_a_small_folder_changes_nothing(tmp_path):
    before = folder_images(fill(tmp_path, "a.png")).fingerprint
    os.utime(tmp_path / "a.png", (1, 1))
    assert folder_images(tmp_path).fingerprint == before


def test_its_name_is_the_folder_s(tmp_path, monkeypatch):
    fill(tmp_path / "faces", "a.png")
    assert folder_images(tmp_path / "faces").name == "faces"
    monkeypatch.chdir(tmp_path / "faces")
    assert folder_images(Path(".")).name == "faces"
