"""Any decoded image to uint8 [C, S, S]: upright, grey or RGB, cropped the way ADM and DiT crop."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"}  # palettes count as colour


def plain(image: Image.Image, channels: int) -> Image.Image:
    """Mode L (`channels` 1) or RGB (3): turned upright by its EXIF tag, 16 bits / 257, transparency over white.

    ValueError for levels whose range nothing says: floats, whole numbers above 16 bits.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or (image.mode == "I" and not 0 <= np.asarray(image).min() <= np.asarray(image).max() <= 65535):
        raise ValueError("its levels are floats or above 16 bits, and nothing says their range")
    if image.mode.startswith("I"):  # Pillow's own conversion would clip 16 bits at 255
        levels = np.asarray(image).astype(np.float64).clip(0, 65535)
        image = Image.fromarray((levels / 257).round().astype(np.uint8))
    elif image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours)
    return image.convert("L" if channels == 1 else "RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square, `size` pixels wide, as ADM's `center_crop_arr` makes it (Dhariwal & Nichol 2021).

    Halved by box averaging while the short side is at least 2 * size, then bicubic to short side = size, then cropped.
    Expects mode L or RGB: palette indices must not be averaged.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_square(image: Image.Image, size: int, channels: int) -> Tensor:
    """uint8 [C, size, size] of an image of any mode and shape; size 0: [C, H, W], not cropped."""
    image = plain(image, channels)
    pixels = np.array(center_crop(image, size) if size else image)  # a copy: torch wants memory that it may write to
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()
