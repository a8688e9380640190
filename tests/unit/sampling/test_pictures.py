"""Images on disk: PNG, contact sheets, npz."""

import os
from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from dmpctl.errors import Damaged
from dmpctl.sampling import pictures

CPU = torch.device("cpu")
FAST = {"sampler": "ddim", "steps": 3, "sample_batch": 5, "cpu": True}


@pytest.mark.parametrize("length", [0, 6, 30, 48, 84])
def test_a_png_that_is_cut_off_is_no_png(tmp_path, length):
    path = tmp_path / "000000.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    assert pictures.sealed_png(tmp_path, 0, None) is not None
    data = path.read_bytes()
    assert len(data) > 120
    path.write_bytes(data[:length])
    with pytest.raises(Damaged):
        pictures.sealed_png(tmp_path, 0, None)
    path.write_bytes(data[:length] + b"\xff" + data[length + 1 :])
    with suppress(Damaged):  # whatever the bytes: an answer
        pictures.sealed_png(tmp_path, 0, None)


def test_npz_streams_one_batch_at_a_time(tmp_path):
    """A batch is on its way to the disk before the next is made."""
    sizes = []

    def batches():
        for number in range(4):
            sizes.append(os.path.getsize(tmp_path / ".x.npz"))
            yield torch.full((100, 3, 8, 8), number, dtype=torch.uint8)

    pictures.write_npz(tmp_path / "x.npz", batches(), 400)
    assert all(later - earlier > 10_000 for earlier, later in pairwise(sizes[1:]))
    array = np.load(tmp_path / "x.npz", allow_pickle=False)["arr_0"]
    assert array.shape == (400, 8, 8, 3)
    assert [int(array[100 * number].mean()) for number in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (8, 3), (9, 1), (64, 3)])
def test_a_contact_sheet_shows_every_image(count, channels):
    images = [torch.full((channels, 8, 8), 20 + 3 * k, dtype=torch.uint8) for k in range(count)]
    sheet = pictures.contact_sheet(images, columns=8, side=24)
    assert sheet.mode == "RGB"
    cell = 24 + 4
    assert sheet.size == (min(8, count) * cell + 4, -(-count // 8) * cell + 4)
    for k in range(count):
        row, column = divmod(k, 8)
        assert sheet.getpixel((column * cell + 16, row * cell + 16)) == (20 + 3 * k,) * 3


def test_images_come_back_from_png(tmp_path):
    images = torch.randint(0, 256, (2, 3, 5, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures.write_pngs(tmp_path, [8, 3], images)
    pictures.write_pngs(tmp_path, [1], images[:1, :1])
    assert sorted(os.listdir(tmp_path)) == ["000001.png", "000003.png", "000008.png"]
    assert torch.equal(pictures.read_png(tmp_path / "000003.png"), images[1])
    assert torch.equal(pictures.read_png(tmp_path / "000001.png"), images[0, :1])
