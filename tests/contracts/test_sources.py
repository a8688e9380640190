"""What every Source promises."""

import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from dmpctl.batches.loader import TrainingItems, order_of
from dmpctl.data.bundled import Digits
from dmpctl.models.encode import build_latents
from dmpctl.types import Silent, Source
from tests.contracts.rows import Rows
from tests.latent_helpers import Ramp
from tests.unit.data.made import (
    coco_images,
    folder_images,
    hub_images,
    hub_set,
    parquet_images,
    streamed_images,
    tar_images,
    write_coco,
    write_parquet,
    write_tar,
)


def made_folder(root: Path, seed: int = 0) -> Path:
    draw = np.random.default_rng(seed)
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "emu/1.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(root / name)
    return root


def made_latents(root: Path) -> Source:
    return build_latents(Digits(), Ramp(), root / "cache", Silent(), batch=512, per_shard=1_000)


LABELS = (0, 0, 1, 2)


def images_in(root: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(made_folder(root / "files").rglob("*.png"))]


def parquet_in(root: Path) -> Path:
    path, kind = root / "rows.parquet", datasets.ClassLabel(names=["cat", "dog", "emu"])
    return path if path.exists() else write_parquet(path, images_in(root), 3, label=(kind, LABELS))


def tar_in(root: Path) -> Path:
    path, images = root / "shard.tar", images_in(root)
    members = [pair for n, data in enumerate(images) for pair in ((f"{n}.png", data), (f"{n}.cls", f"{LABELS[n]}".encode()))]
    return path if path.exists() else write_tar(path, members)


def coco_in(root: Path) -> Path:
    if not (root / "val2014").exists():
        write_coco(root, "val2014", {f"{n}.png": data for n, data in enumerate(images_in(root))})
    return root


def packed_in(root: Path) -> Path:
    """The images of COCO as they are published, in one zip file."""
    path, folder = root / "val2014.zip", coco_in(root) / "val2014"
    if not path.exists():
        with zipfile.ZipFile(path, "w") as archive:
            for image in sorted(folder.iterdir()):
                archive.write(image, f"val2014/{image.name}")
    return path


def hub_in(root: Path) -> Path:
    """A commit of a repository, as the Hub's cache holds it."""
    target = root / ("c" * 40) / "data" / "train-00000-of-00001.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        parquet_in(root).rename(target)
    return target.parent.parent


def made_streamed_latents(root: Path) -> Source:
    """The latents of images that are read in an order of their own."""
    images = streamed_images([parquet_in(root)], "a@b", size=8)
    return build_latents(images, Ramp(), root / "cache", Silent())


SOURCES: dict[str, Callable[[Path], Source]] = {
    "digits": lambda root: Digits(),
    "digits-rgb": lambda root: Digits(channels=3),
    "folder": lambda root: folder_images(made_folder(root)),
    "folder-cropped": lambda root: folder_images(made_folder(root), 6, 1),
    "folder-lazy": lambda root: folder_images(made_folder(root), most_held=0),
    "latents": made_latents,
    "parquet": lambda root: parquet_images(parquet_in(root)),
    "parquet-lazy": lambda root: parquet_images(parquet_in(root), most_held=0),
    "streamed": lambda root: streamed_images([parquet_in(root)], "a@b"),
    "tar": lambda root: tar_images(tar_in(root)),
    "tar-lazy": lambda root: tar_images(tar_in(root), on_bad="skip", most_held=0),
    "hub": lambda root: hub_images(replace(hub_set("hf://owner/name"), folder=hub_in(root))),
    "streamed-latents": made_streamed_latents,
    "coco-packed": lambda root: coco_images(packed_in(root), root / "annotations/captions_val2014.json", "val2014"),
    "coco": lambda root: coco_images(coco_in(root) / "val2014", root / "annotations/captions_val2014.json", "val2014"),
}


rows = Rows("opened", SOURCES)


pytestmark = pytest.mark.usefixtures("arrow_in_tmp")


@pytest.fixture
def opened(request, tmp_path) -> Callable[[], Source]:
    SOURCES[request.param](tmp_path)
    return lambda: again(request.param, tmp_path)


def again(name: str, root: Path) -> Source:
    """The same files, opened anew."""
    if "folder" not in name:
        return SOURCES[name](root)
    form = {"folder-cropped": {"size": 6, "channels": 1}, "folder-lazy": {"most_held": 0}}
    return folder_images(root, **form.get(name, {}))


def some(source: Source) -> list[int]:
    return [0, 1, len(source) // 2, len(source) - 1]


@rows.but("folder-lazy parquet-lazy tar-lazy coco-packed")
def test_items_are_square_and_of_one_shape(opened):
    """Bytes of 1 or 3 channels, or moments: as many means as log variances."""
    source = opened()
    first, _ = source.item(0)
    channels, height, width = first.shape
    assert height == width
    assert channels in (1, 3) if first.dtype == torch.uint8 else first.is_floating_point() and channels % 2 == 0
    for index in some(source):
        image, _ = source.item(index)
        assert image.dtype == first.dtype
        assert image.shape == first.shape


@rows.but("folder-cropped folder-lazy parquet-lazy tar-lazy digits-rgb coco-packed")
def test_labels_lie_within_the_classes(opened):
    source = opened()
    labels = [source.item(index)[1] for index in range(min(len(source), 200))]
    assert all(type(label) is int for label in labels)
    assert set(labels) <= set(range(max(source.num_classes, 1)))
    assert len(set(labels)) == max(source.num_classes, 1)


@rows.but("")
def test_an_item_never_changes(opened):
    one, two = opened(), opened()
    assert len(one) == len(two)
    for index in some(one):
        image, label = one.item(index)
        kept = image.clone()
        one.item(0)
        for source in (one, two):
            assert torch.equal(source.item(index)[0], kept)
            assert source.item(index)[1] == label


@rows.on("digits folder-lazy parquet-lazy streamed tar-lazy latents coco-packed")
def test_items_are_not_all_the_same(opened):
    source = opened()
    assert not torch.equal(source.item(0)[0], source.item(1)[0])


@rows.on("digits folder folder-lazy parquet parquet-lazy streamed tar tar-lazy latents coco")
def test_the_end_is_the_end(opened):
    source = opened()
    with pytest.raises(IndexError):
        source.item(len(source))


@rows.but("folder-lazy parquet-lazy tar-lazy")
def test_the_fingerprint_is_a_stable_sha256(opened):
    one, two = opened(), opened()
    assert one.fingerprint == two.fingerprint
    assert len(bytes.fromhex(one.fingerprint)) == 32


def test_fingerprints_tell_sources_apart(tmp_path):
    named = {name: make(tmp_path / name) for name, make in SOURCES.items()}
    assert named.pop("coco-packed").fingerprint == named["coco"].fingerprint  # the same images, read from elsewhere
    sources = list(named.values())
    sources.append(folder_images(made_folder(tmp_path / "other", seed=1)))
    assert len({source.fingerprint for source in sources}) == len(sources)


@rows.on("digits folder latents parquet streamed tar hub coco")
def test_it_says_what_it_is(opened):
    source = opened()
    assert source.name
    assert source.name.isprintable()
    assert isinstance(source.mirror, bool)


@rows.on("digits folder folder-lazy latents parquet-lazy streamed tar-lazy hub streamed-latents coco-packed")
def test_loader_processes_get_the_same_source(opened):
    source = opened()
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301
    for index in some(source):
        assert torch.equal(copy.item(index)[0], source.item(index)[0])


@rows.on("digits folder latents streamed streamed-latents")
def test_an_epoch_has_each_item_once_in_an_order_of_its_own(opened):
    source, order = opened(), order_of(opened())
    one, again, other = (order(len(source), torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 5))
    assert sorted(one) == sorted(other) == list(range(len(source)))
    assert one == again
    assert one != other


@rows.on("digits-rgb folder folder-lazy latents streamed tar-lazy streamed-latents coco")
def test_training_sees_the_items(opened):
    source = opened()
    places = [(0, index) for index in some(source)]
    images, labels = TrainingItems(source, hflip=False, seed=0).at(places)
    assert (images.dtype, labels.dtype) == (source.item(0)[0].dtype, torch.int64)
    for row, (_, index) in enumerate(places):
        assert torch.equal(images[row], source.item(index)[0])
        assert int(labels[row]) == source.item(index)[1]


def test_every_row_is_asked_for_what_it_promises():
    assert not rows.forgotten()
