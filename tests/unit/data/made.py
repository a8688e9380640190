"""Real files in miniature: images as bytes, and the folders, parquet and tar files that hold them."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from dmpctl.data.coco import CocoReader
from dmpctl.data.folder import FolderReader
from dmpctl.data.tar import TarReader
from dmpctl.images.stored import StoredImages
from dmpctl.store.locate import HubRows, locate_data
from dmpctl.tables.columns import UNNAMED, Columns
from dmpctl.tables.hub_rows import hub_rows, stream_hub
from dmpctl.tables.parquet import parquet_rows
from dmpctl.tables.stream import StreamedImages, StreamReader


def picture(seed: int, size: int = 8, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, channels), dtype=np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[..., 0])


def encoded(image: Image.Image | int, form: str = "PNG", **options: Any) -> bytes:
    """An image's file; a number stands for the picture of that seed."""
    file = io.BytesIO()
    (picture(image) if isinstance(image, int) else image).save(file, form, **options)
    return file.getvalue()


def header_of(width: int, height: int) -> bytes:
    """A PNG that says it is large, and has no pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    """A tar file of these names and contents, by the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form, errors="surrogateescape") as archive:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


def write_parquet(path: Path, images: Sequence[bytes | None], per_group: int = 100, **columns: tuple[Any, Sequence[Any]]) -> Path:
    """A parquet file as `push_to_hub` writes it; other columns as (feature, values)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(decode=False), **{k: kind for k, (kind, _) in columns.items()}})
    cells = [None if content is None else {"bytes": content, "path": f"{row}.png"} for row, content in enumerate(images)]
    rows = datasets.Dataset.from_dict({"image": cells, **{k: list(v) for k, (_, v) in columns.items()}}, features=features)
    rows = rows.cast_column("image", datasets.Image())
    rows.to_parquet(path, batch_size=per_group)
    return path


def write_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_coco(root: Path, split: str, images: Mapping[str, bytes], captions: int = 5) -> Path:
    """COCO's layout: the images get ids in the opposite order of their names, and captions in a mixed one."""
    write_folder(root / split, images)
    ids = {name: 1000 - number for number, name in enumerate(images)}
    notes = [
        {"id": 100 * number + turn, "image_id": ids[name], "caption": f"{name} said {turn} \n"}
        for turn in reversed(range(captions))
        for number, name in enumerate(images)
    ]
    about = {"images": [{"id": number, "file_name": name} for name, number in ids.items()], "annotations": notes}
    write_folder(root, {f"annotations/captions_{split}.json": json.dumps(about).encode()})
    return root


def folder_images(path: Path | str, *form: Any, **options: Any) -> StoredImages:
    return StoredImages(FolderReader(path), *form, **options)


def tar_images(path: Path, *form: Any, columns: Columns = UNNAMED, **options: Any) -> StoredImages:
    return StoredImages(TarReader(path, columns), *form, **options)


def parquet_images(path: Path, columns: Columns = UNNAMED, split: str | None = None, **options: Any) -> StoredImages:
    return StoredImages(parquet_rows(path, columns, split), **options)


def coco_images(images: Path, annotations: Path, split: str, **options: Any) -> StoredImages:
    return StoredImages(CocoReader(images, annotations, split), **options)


def hub_set(word: str) -> HubRows:
    """Returns the source that --data WORD stands for, with nothing fetched."""
    found = locate_data(word, streaming=True)
    assert isinstance(found, HubRows)
    return found


def hub_images(wanted: HubRows, columns: Columns = UNNAMED, **options: Any) -> StoredImages:
    return StoredImages(hub_rows(wanted, columns), **options)


def streamed_hub_images(wanted: HubRows) -> StreamedImages:
    return StreamedImages(stream_hub(wanted))


def streamed_images(files: Sequence[Path], origin: str | None = None, **options: Any) -> StreamedImages:
    return StreamedImages(StreamReader(files, "set", "the set", UNNAMED, origin), **options)
