"""examples/fetch_images.py on a made-up archive in the packages' format; no network."""

import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dmpctl.errors import IntegrityError, MissingError

EXAMPLE = Path(__file__).parents[2] / "examples" / "fetch_images.py"
LABELS, EACH = 2, 20


@pytest.fixture(scope="module")
def fetch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_images", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_images"] = module  # its dataclass looks there for its own module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (LABELS * EACH, 28, 28), dtype=np.uint8)


def tgz(files: dict[str, bytes], link: str | None = None) -> bytes:
    """A .tgz of these files, and a symbolic link of that name to /etc/hostname."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
            archive.addfile(info)
    return made.getvalue()


def nested(images: NDArray[np.uint8]) -> bytes:
    return json.dumps({"data": [*images.reshape(len(images), -1).tolist(), []]}).encode()


@pytest.fixture
def archive(images: NDArray[np.uint8]) -> bytes:
    texts = {f"package/src/clothes/{k}.json": nested(images[k * EACH : (k + 1) * EACH]) for k in range(LABELS)}
    return tgz({"package/LICENSE": b"free", "../evil.json": b"{}", "package/index.js": b"!", **texts})


def test_decodes_lists_of_integers_and_leaves_out_empty_ones(fetch: ModuleType, images: NDArray[np.uint8]) -> None:
    assert np.array_equal(fetch.decode(nested(images), 1), images)


def test_decodes_flat_fractions_rounded_to_three_digits(fetch: ModuleType, images: NDArray[np.uint8]) -> None:
    flat = [round(float(value) / 255, 3) for value in images.ravel()]
    assert np.array_equal(fetch.decode(json.dumps({"data": flat}).encode(), 255), images)


@pytest.mark.parametrize("data", [[0] * 785, [[0] * 784, [0] * 783], [0] * 783 + [256], [0] * 783 + [-1]])
def test_refuses_what_is_no_image(fetch: ModuleType, data: list[object]) -> None:
    with pytest.raises(IntegrityError):
        fetch.decode(json.dumps({"data": data}).encode(), 1)


def test_32_keeps_every_pixel_and_16_is_the_mean_of_squares(fetch: ModuleType, images: NDArray[np.uint8]) -> None:
    whole = np.asarray(fetch.resize(images[0], 32))
    assert np.array_equal(whole[2:30, 2:30], images[0])
    assert whole.sum() == images[0].sum(dtype=np.int64)
    means = whole.reshape(16, 2, 16, 2).mean((1, 3), dtype=np.float64)
    assert np.abs(np.asarray(fetch.resize(images[0], 16)) - means).max() <= 0.5


def test_split_is_disjoint_whole_and_blind_to_order_and_copies(fetch: ModuleType, images: NDArray[np.uint8]) -> None:
    train, test = fetch.split([images[:EACH], images[EACH:]])
    assert (len(train), len(test)) == (36, 4)
    assert {image.tobytes() for _, image in [*train, *test]} == {image.tobytes() for image in images}
    again = fetch.split([images[::-1], images[:5]])
    for part, other in zip((train, test), again, strict=True):
        assert all(np.array_equal(image, same) for (_, image), (_, same) in zip(part, other, strict=True))


def test_members_reads_regular_files_only(fetch: ModuleType) -> None:
    data = tgz({"package/1.json": b"one", "x/package/2.json": b"two"}, link="package/3.json")
    assert fetch.members(data, r"package/\d\.json") == {"package/1.json": b"one"}
    with pytest.raises(IntegrityError):
        fetch.members(data, r"nothing")


def test_builds_the_folder(fetch: ModuleType, archive: bytes, images: NDArray[np.uint8], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "images"
    assert fetch.build(archive, fetch.FASHION, 32, out) == (36, 4)
    assert sorted(path.name for path in out.iterdir()) == ["LICENSE", "SOURCE.txt", "test", "train"]
    assert [path.name for path in sorted((out / "test").iterdir())] == [f"{k:06d}.png" for k in range(4)]
    read = {np.asarray(Image.open(path))[2:30, 2:30].tobytes() for path in out.glob("*/*.png")}
    assert read == {image.tobytes() for image in images}
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in out.parent.iterdir()] == ["images"]


def test_builds_a_folder_per_class(fetch: ModuleType, archive: bytes, images: NDArray[np.uint8], tmp_path: Path) -> None:
    fetch.build(archive, fetch.FASHION, 32, tmp_path / "images", classes=True)
    read = {
        np.asarray(Image.open(path))[2:30, 2:30].tobytes(): path.parent.name for path in (tmp_path / "images").glob("*/*/*.png")
    }
    assert read == {image.tobytes(): str(k // EACH) for k, image in enumerate(images)}


def test_an_archive_that_is_another_is_refused(
    fetch: ModuleType, archive: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.tgz"
    file.write_bytes(archive)
    assert fetch.verified(file, hashlib.sha256(archive).hexdigest()) == archive
    assert fetch.main(["fashion16", str(tmp_path / "out"), "--archive", str(file)]) == IntegrityError.exit_code
    assert "sha256" in capsys.readouterr().err
    assert fetch.main(["fashion16", str(tmp_path), "--archive", str(file)]) == 2
    assert fetch.main(["fashion16", str(tmp_path / "out"), "--archive", str(tmp_path / "no")]) == MissingError.exit_code
    assert not (tmp_path / "out").exists()


def test_without_npm_it_says_so(fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingError, match="npm"):
        fetch.download(fetch.DIGITS, tmp_path)
