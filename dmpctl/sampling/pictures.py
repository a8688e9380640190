"""Images on disk: PNG files, contact sheets, and the npz that ADM's evaluator reads."""

import io
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dmpctl.errors import Damaged
from dmpctl.files import SEAL, put_aside, sha256_of_bytes, write_atomic, writing
from dmpctl.images.scan import BROKEN, reason_of
from dmpctl.types import Progress

AGAIN = "make it again: dmpctl sample"


def to_image(image: Tensor) -> Image.Image:
    """uint8 [C, H, W] with 1 or 3 channels as a picture."""
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def png_of(folder: Path, index: int) -> Path:
    """Returns where image `index` lies in a folder of samples."""
    return folder / f"{index:06d}.png"


def write_pngs(folder: Path, indices: Sequence[int], images: Tensor, key: str | None = None) -> None:
    """Write images under their six-digit index, sealed with `key`; a half-written file never bears that name."""
    for index, image in zip(indices, images, strict=True):
        final = png_of(folder, index)
        temporary = final.with_name(f".{final.name}")
        about = PngInfo()
        if key is not None:
            about.add_text(SEAL, _seal_of(image, index, key))
        with writing(final):
            to_image(image).save(temporary, "PNG", pnginfo=about)
            temporary.replace(final)


def _seal_of(image: Tensor, index: int, key: str) -> str:
    """The sha256 of an image, of its place, and of the folder's `key`: all that makes its images these."""
    return sha256_of_bytes(f"{key} {index} {list(image.shape)} ".encode() + image.contiguous().numpy().tobytes())


def sealed_png(folder: Path, index: int, key: str | None) -> Tensor | None:
    """Image `index` of a folder as uint8 [C, H, W], None where there is none. Damaged where it is not what was written.

    `key` None: the folder is older than seals.
    """
    path = png_of(folder, index)
    if not path.exists():
        return None
    image, seal = _read(path)
    if key is not None and seal != _seal_of(image, index, key):
        raise Damaged(f"{path} is not the image that was made", AGAIN)
    return image


def read_sheet(path: Path) -> Tensor:
    """A contact sheet as uint8 [3, H, W]. Damaged where it is not what was written; older ones have no seal."""
    image, seal = _read(path)
    if seal not in (None, _seal_of(image, 0, "sheet")):
        raise Damaged(f"{path} is not the picture that was made", AGAIN)
    return image


def _read(path: Path) -> tuple[Tensor, str | None]:
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return _pixels(picture), picture.info.get(SEAL)
    except BROKEN as error:
        raise Damaged(f"{path} cannot be read ({reason_of(error)})", AGAIN) from None


def sealed_pngs(folder: Path, indices: Sequence[int], key: str | None, progress: Progress) -> dict[int, Tensor]:
    """Those of the images that are there and whole; others are put aside, and that is said."""
    found: dict[int, Tensor] = {}
    for index in indices:
        try:
            image = sealed_png(folder, index, key)
        except Damaged as error:
            aside = put_aside(png_of(folder, index))
            progress.say(f"warning: {error.message}; put aside as {aside.name}, and made again")
            continue
        found |= {} if image is None else {index: image}
    return found


def read_png(path: Path) -> Tensor:
    """A PNG as uint8 [C, H, W]."""
    with Image.open(path, formats=("PNG",)) as image:
        return _pixels(image)


def _pixels(image: Image.Image) -> Tensor:
    array = np.asarray(image)
    return torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def contact_sheet(images: Sequence[Tensor], columns: int = 8, side: int = 96) -> Image.Image:
    """Images uint8 [C, H, W] on one white sheet, enlarged in whole steps so that small pixels stay square."""
    _, height, width = images[0].shape
    factor = max(1, side // max(height, width))
    gap = 4
    rows = -(-len(images) // columns)
    cell_w, cell_h = width * factor + gap, height * factor + gap
    sheet = Image.new("RGB", (min(columns, len(images)) * cell_w + gap, rows * cell_h + gap), "white")
    for position, image in enumerate(images):
        row, column = divmod(position, columns)
        picture = to_image(image).convert("RGB").resize((width * factor, height * factor), Image.Resampling.NEAREST)
        sheet.paste(picture, (gap + column * cell_w, gap + row * cell_h))
    return sheet


def write_picture(path: Path, picture: Image.Image) -> None:
    """Atomically write a PNG in RGB, sealed."""
    buffer, about = io.BytesIO(), PngInfo()
    about.add_text(SEAL, _seal_of(_pixels(picture), 0, "sheet"))
    picture.save(buffer, "PNG", pnginfo=about)
    write_atomic(path, buffer.getvalue())


def write_npz(path: Path, batches: Iterator[Tensor], count: int) -> None:
    """Stream images into `arr_0` uint8 [N, H, W, 3] of an npz, the layout of ADM's evaluator; grey is repeated.

    One batch is in memory at a time.
    """
    temporary = path.with_name(f".{path.name}")
    try:
        with (
            writing(path),
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as file,
        ):
            _write_array(file, batches, count)
        with writing(path):
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _write_array(file: IO[bytes], batches: Iterator[Tensor], count: int) -> None:
    for number, images in enumerate(batches):
        colour = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
        if number == 0:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *colour.shape[1:])}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(colour.tobytes())
