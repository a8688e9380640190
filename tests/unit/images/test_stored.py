"""Odd and broken images, in whatever they are stored."""

import logging
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmpctl.batches.loader import StepBatches, batches
from dmpctl.errors import IntegrityError
from dmpctl.images.stored import StoredImages
from tests.unit.data.made import (
    encoded,
    folder_images,
    header_of,
    parquet_images,
    picture,
    tar_images,
    write_folder,
    write_parquet,
    write_tar,
)

Make = Callable[..., StoredImages]


def as_folder(root: Path, images: list[bytes] | None, **options: object) -> StoredImages:
    """`images` None: what was written before."""
    write_folder(root / "images", {f"{row:03}.png": data for row, data in enumerate(images or [])})
    return folder_images(root / "images", **options)


def as_parquet(root: Path, images: list[bytes] | None, **options: object) -> StoredImages:
    if images is not None:
        write_parquet(root / "images.parquet", images)
    return parquet_images(root / "images.parquet", **options)


def as_tar(root: Path, images: list[bytes] | None, **options: object) -> StoredImages:
    if images is not None:
        write_tar(root / "images.tar", [(f"{row:03}.png", data) for row, data in enumerate(images)])
    return tar_images(root / "images.tar", **options)


@pytest.fixture(params=[as_folder, as_parquet, as_tar], ids=["folder", "parquet", "tar"])
def make(request, tmp_path) -> Make:
    return lambda images, **options: request.param(tmp_path, images, **options)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 3  # EXIF 2.32: row 0 at the bottom, column 0 at the right
    return exif


def frames(form: str) -> bytes:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    return encoded(red, form, save_all=True, append_images=[blue], **({"lossless": True} if form == "WEBP" else {}))


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
RED = np.zeros((8, 8, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
PALETTE = Image.new("P", (8, 8), 1)
PALETTE.putpalette([0, 0, 0, 255, 0, 0])
ODD = {
    "grey": (encoded(Image.fromarray(GREY)), np.stack([GREY] * 3, -1)),
    "rgba": (encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0))), np.full((8, 8, 3), 255)),
    "palette": (encoded(PALETTE), RED),
    "cmyk": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), RED),
    "16-bit": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257)), np.stack([GREY] * 3, -1)),
    "exif": (encoded(picture(1), exif=turned()), np.asarray(picture(1))[::-1, ::-1]),
    "animated-png": (frames("PNG"), RED),
    "animated-webp": (frames("WEBP"), RED),
}
BAD = {
    "zero-byte": (b"", "empty|not a PNG"),
    "text": (b"this is no image\n" * 20, "not a PNG"),
    "truncated": (encoded(9)[:-60], "truncated"),
    "cut-header": (encoded(9)[:20], "."),
    "bomb": (header_of(20_000, 20_000), "more than 89478485 pixels"),
    "large": (header_of(12_000, 9_000), "more than 89478485 pixels"),
    "small": (encoded(picture(9, size=3)), "too small: 3x3 for size 8"),
    "tga": (encoded(9, "TGA"), "not a PNG"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", "not a PNG"),
}
BEHIND = encoded(picture(9, size=64))[:-6000]  # a good header, and then not enough


@pytest.mark.parametrize(("kind", "held"), [(kind, n % 2 == 0) for n, kind in enumerate(ODD)])
def test_odd_images_become_rgb(make, kind, held):
    content, expected = ODD[kind]
    image, _ = make([encoded(0), content], size=8, channels=3, most_held=2 * held).item(1)
    assert (image.permute(1, 2, 0).int() - torch.tensor(expected.astype(np.int32))).abs().max() <= 3  # JPEG is lossy


@pytest.mark.parametrize(
    ("kind", "held"), [("truncated", True), ("small", False), *((kind, n % 2 == 0) for n, kind in enumerate(BAD))]
)
def test_bad_images_are_named_counted_and_left_out(make, kind, held):
    content, reason = BAD[kind]
    images = [encoded(0), content, encoded(2)]
    if held or kind != "truncated":  # which only decoding shows
        with pytest.raises(IntegrityError, match=f"1 of 3 images .* cannot be used: .*1.*\\(.*({reason})") as caught:
            make(images, size=8, most_held=3 * held)
        assert caught.value.exit_code == 4
        assert "--on-bad skip" in str(caught.value.hint)
        source = make(images, size=8, on_bad="skip", most_held=3 * held)
        assert len(source.bad) == 1
        assert len(source) == 2
        for index, seed in enumerate((0, 2)):
            assert np.array_equal(source.item(index)[0].permute(1, 2, 0).numpy(), np.asarray(picture(seed)))


def test_with_nothing_left_even_skip_refuses(make):
    with pytest.raises(IntegrityError, match="2 of 2 images"):
        make([b"no", b"image"], size=8, on_bad="skip")


class Lazy:
    """Sources that are decoded as they are used, with images at `broken` that end behind their header."""

    @pytest.fixture
    def make(self, make) -> Make:
        return partial(make, most_held=0)

    @staticmethod
    def images(count: int, *broken: int) -> list[bytes]:
        return [BEHIND if row in broken else encoded(picture(row, size=64)) for row in range(count)]


class TestBrokenBehindItsHeader(Lazy):
    def test_under_fail_it_stops_by_name(self, make):
        source = make(self.images(3, 1))
        source.item(0)
        with pytest.raises(IntegrityError, match=r"1.* cannot be decoded: .*truncated") as caught:
            source.item(1)
        assert "--on-bad skip" in str(caught.value.hint)

    def test_under_skip_the_next_good_one_stands_in(self, make, caplog):
        source = make(self.images(6, 1, 2, 5), on_bad="skip")
        assert len(source) == 6
        assert source.bad == source.replaced == []
        with caplog.at_level(logging.WARNING, "dmpctl"):
            for _ in range(3):
                for index, other in ((5, 0), (1, 3), (2, 3), (0, 0), (4, 4)):
                    expected = np.asarray(picture(other, size=64))
                    assert np.array_equal(source.item(index)[0].permute(1, 2, 0).numpy(), expected)
        assert len(source.replaced) == 3
        assert [record.getMessage().split(" cannot")[0] for record in caplog.records] == [
            source.names()[index] for index in (5, 1, 2)
        ]

    def test_whichever_is_asked_for_first(self, make):
        one, two = (make(self.images(4, 1, 2), on_bad="skip") for _ in range(2))
        forwards = [one.item(index)[0] for index in range(4)]
        backwards = [two.item(index)[0] for index in reversed(range(4))]
        assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))

    def test_loader_processes_count_them_together(self, make):
        source = make(self.images(8, 3, 6), on_bad="skip")
        running = batches(source, StepBatches(len(source), 4, 0), num_workers=2)
        for _ in range(4):
            next(running)
        running.close()
        assert len(source.replaced) == 2

    def test_a_pickled_one_gives_the_same(self, make):
        source = make(self.images(4, 1), on_bad="skip")
        copy = pickle.loads(pickle.dumps(source))  # noqa: S301
        assert torch.equal(copy.item(1)[0], source.item(2)[0])

    def test_too_many_in_a_row_are_no_longer_a_few_bad_ones(self, make):
        source = make(self.images(104, *range(2, 102)), on_bad="skip")
        assert torch.equal(source.item(3)[0], source.item(102)[0])
        with pytest.raises(IntegrityError, match=r"none of 100 images from .*2.* on can be decoded"):
            source.item(2)

    def test_the_fingerprint_needs_no_decoding(self, make):
        written = make(self.images(3, 1))
        assert make(None, on_bad="skip").fingerprint == make(None).fingerprint == written.fingerprint


class TestGone(Lazy):
    def test_a_file_that_has_gone_away_stops_even_under_skip(self, tmp_path):
        source = as_folder(tmp_path, self.images(3), on_bad="skip", most_held=0)
        (tmp_path / "images" / "001.png").unlink()
        with pytest.raises(IntegrityError, match=r"001\.png cannot be decoded: No such file") as caught:
            source.item(1)
        assert "disk" in str(caught.value.hint)


def test_the_label_is_that_of_the_image_that_stands_in(tmp_path):
    files = {"a/1.png": encoded(0), "a/2.png": BEHIND, "b/1.png": encoded(1)}
    source = folder_images(write_folder(tmp_path, files), 8, on_bad="skip", most_held=0)
    assert [source.item(index)[1] for index in range(3)] == [0, 1, 1]
