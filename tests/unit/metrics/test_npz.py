"""npz files read piece by piece: as numpy reads them, without their memory, and with nothing unpickled."""

import io
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dmpctl.errors import IntegrityError, MissingError
from dmpctl.metrics.npz import names_of, npz_arrays, npz_images
from tests.helpers import Hostile


def pictures(count: int, side: int = 4, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_those_that_numpy_reads(tmp_path, save, channels):
    path = tmp_path / "x.npz"
    save(path, pictures(23, channels=channels))
    found = npz_images(path)
    assert (found.count, found.shape) == (23, (channels, 4, 4))
    expected = torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)
    parts = list(found.batches(10))
    assert [len(part) for part in parts] == [10, 10, 3]
    assert torch.equal(torch.cat(parts), expected)
    assert torch.equal(torch.cat(list(found.batches(8, limit=12))), expected[:12])


def test_a_large_file_is_never_in_memory(tmp_path):
    path = tmp_path / "large.npz"
    np.savez_compressed(path, np.zeros((4000, 64, 64, 3), np.uint8), mu=np.zeros(8))
    tracemalloc.start()
    try:
        assert sum(len(part) for part in npz_images(path).batches(64)) == 4000
        assert npz_arrays(path, ("mu",))["mu"].shape == (8,)
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20  # the images have 47 MiB
    finally:
        tracemalloc.stop()


def test_small_arrays_are_read_beside_images_and_the_others_left(tmp_path):
    mu, sigma = np.arange(3, dtype=np.float32), np.asfortranarray(np.arange(9.0).reshape(3, 3))
    np.savez(tmp_path / "x.npz", pictures(2), mu=mu, sigma=sigma, other=np.zeros(3))
    found = npz_arrays(tmp_path / "x.npz", ("mu", "sigma", "mu_s"))
    assert set(found) == {"mu", "sigma"}
    assert found["mu"].dtype == np.float64
    np.testing.assert_array_equal(found["sigma"], sigma)
    assert names_of(tmp_path / "x.npz") == {"arr_0", "mu", "sigma", "other"}


def rewritten(path: Path, member: bytes, name: str = "arr_0.npy") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, member)
    return path


def npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array, allow_pickle=True)  # one of the hostile files is of objects
    return data.getvalue()


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (npy(np.zeros((2, 4, 4, 3), np.float32)), "should be uint8"),
        (npy(np.zeros((2, 4, 4), np.uint8)), "should be uint8"),
        (npy(np.zeros((2, 4, 4, 4), np.uint8)), "should be uint8"),
        (npy(np.zeros((0, 4, 4, 3), np.uint8)), "should be uint8"),
        (npy(np.asfortranarray(pictures(3))), "columns first"),
        (npy(np.array([{}], dtype=object)), "pickled objects"),
        (b"not an array", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_an_arr_0_of_something_else_is_refused(tmp_path, member, message):
    with pytest.raises(IntegrityError, match=message):
        npz_images(rewritten(tmp_path / "x.npz", member))


def test_an_array_that_ends_early_is_found_while_reading(tmp_path):
    path = rewritten(tmp_path / "x.npz", npy(pictures(20))[:-30])
    with pytest.raises(IntegrityError, match="too early"):
        list(npz_images(path).batches(8))


def test_a_flipped_byte_fails_its_checksum(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, pictures(20))
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="not a readable npz"):
        list(npz_images(path).batches(8))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half", b"text"])
def test_files_that_are_no_npz(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(IntegrityError, match="not a readable npz"):
        npz_images(tmp_path / "x.npz")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(MissingError, match=r"no file .*x\.npz"):
        npz_images(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", mu=np.zeros(2))
    with pytest.raises(IntegrityError, match=r"holds no arr_0; it has mu\.npy"):
        npz_images(tmp_path / "y.npz")


def test_pickles_are_never_run(tmp_path):
    array = np.empty(1, dtype=object)
    array[0] = Hostile(tmp_path / "ran")
    np.savez(tmp_path / "x.npz", mu=array, arr_0=array)
    with pytest.raises(IntegrityError, match="pickled objects"):
        npz_arrays(tmp_path / "x.npz", ("mu",))
    with pytest.raises(IntegrityError, match="pickled objects"):
        npz_images(tmp_path / "x.npz")
    rewritten(tmp_path / "y.npz", pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(IntegrityError):
        npz_images(tmp_path / "y.npz")
    assert not (tmp_path / "ran").exists()
