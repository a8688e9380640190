import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d
from torchvision.transforms import v2

from dmpctl.images.scan import header_of
from dmpctl.images.transforms import center_crop, plain, to_square

# EXIF 2.32, tag 0x0112: where row 0 and column 0 of the stored pixels lie -> how to turn them upright
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def reopened(image: Image.Image, form: str, **options: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, form, **options)
    return Image.open(file)


def to_uint8(image: Image.Image, channels: int) -> torch.Tensor:
    pixels = np.array(plain(image, channels))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def test_an_image_of_the_right_size_is_left_alone():
    pixels = noise(16, 16, 3)
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(pixels), 16)), pixels)


@pytest.mark.parametrize("halvings", [1, 2, 3])
def test_large_images_are_halved_by_averaging(halvings):
    pixels = noise(8 * 2**halvings, 8 * 2**halvings, 3)
    exact = avg_pool2d(torch.tensor(pixels).permute(2, 0, 1)[None].double(), 2**halvings)[0]
    found = to_square(Image.fromarray(pixels), 8, 3).double()
    assert (found - exact).abs().max() <= halvings  # Pillow rounds after each axis, half a level at most


@pytest.mark.parametrize(("width", "height"), [(20, 30), (30, 20), (16, 24), (31, 31)])
def test_below_twice_the_size_it_is_bicubic_and_a_centre_crop(width, height):
    image = Image.fromarray(noise(height, width, 3))
    other = v2.Compose([v2.Resize(16, v2.InterpolationMode.BICUBIC), v2.CenterCrop(16)])(image)
    assert np.array_equal(np.asarray(center_crop(image, 16)), np.asarray(other))


def by_hand(image: Image.Image, size: int) -> Image.Image:
    """The crop of Dhariwal & Nichol (2021), in one step each: the box filter that k halvings are, one bicubic, one crop."""
    factor = 1
    while min(image.width // factor, image.height // factor) >= 2 * size:
        factor *= 2
    image = image.reduce(factor)
    long, short = max(image.size), min(image.size)
    side = round(long * size / short)
    image = image.resize((side, size) if image.width > image.height else (size, side), Image.Resampling.BICUBIC)
    start = (side - size) // 2
    return image.crop((start, 0, start + size, size) if image.width > image.height else (0, start, size, start + size))


@pytest.mark.parametrize(("width", "height"), [(64, 48), (96, 160), (200, 136), (512, 512), (304, 128)])
def test_it_is_the_crop_of_adm(width, height):
    image = Image.fromarray(noise(height // 8, width // 8, 3)).resize((width, height), Image.Resampling.BICUBIC)
    found = np.asarray(center_crop(image, 16)).astype(int)
    assert np.abs(found - np.asarray(by_hand(image, 16))).max() <= 3  # of 255: several roundings against one
    assert np.abs(found - np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))).max() > 20


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((8, 8), 1), ((8, 9), 3), ((9, 8), 1), ((5, 8), 3), ((37, 100), 1), ((100, 37), 3), ((17, 1000), 1), ((15, 15), 3)],
)
def test_every_shape_becomes_the_square(shape, channels):
    square = to_square(Image.fromarray(noise(*shape, 3)), 8, channels)
    assert square.shape == (channels, 8, 8)
    assert square.dtype == torch.uint8
    assert square.is_contiguous()


def test_the_crop_is_central():
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = noise(8, 8, 3)
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(pixels), 8)), pixels[:, 8:16])


def test_sixteen_bits_are_scaled_and_not_clipped():
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    image = reopened(Image.fromarray(levels * 257), "PNG")
    assert header_of(image).grey
    assert np.array_equal(to_uint8(image, 1)[0].numpy(), levels.astype(np.uint8))


def test_transparency_lies_on_white():
    pixels = noise(16, 16, 4)
    alpha = pixels[..., 3:].astype(float) / 255
    exact = pixels[..., :3] * alpha + 255 * (1 - alpha)
    found = to_uint8(reopened(Image.fromarray(pixels), "PNG"), 3).permute(1, 2, 0).numpy()
    assert np.abs(found - exact).max() <= 1
    assert to_uint8(Image.new("LA", (4, 4), (0, 0)), 1).unique().tolist() == [255]


def test_palettes_give_their_colours_not_their_indices():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    assert to_uint8(reopened(image, "PNG"), 3)[:, 0].T.tolist() == [[10, 20, 30], [200, 100, 50]]
    transparent = to_uint8(reopened(image, "PNG", transparency=0), 3)[:, 0].T.tolist()
    assert transparent == [[255, 255, 255], [200, 100, 50]]


@pytest.mark.parametrize(
    ("ink", "colour"),
    [
        ((0, 0, 0, 0), (255, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_cmyk_jpegs_become_rgb(ink, colour):
    image = reopened(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
    assert image.mode == "CMYK"
    found = to_uint8(image, 3).permute(1, 2, 0).reshape(-1, 3).int()
    assert (found - torch.tensor(colour)).abs().max() <= 3  # JPEG is lossy


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_undone(orientation):
    pixels = noise(6, 10, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = reopened(Image.fromarray(pixels), "PNG", exif=exif)
    assert np.array_equal(to_uint8(image, 3).permute(1, 2, 0).numpy(), UPRIGHT[orientation](pixels))


def test_grey_and_colour_convert_into_each_other():
    grey, colour = noise(8, 8), noise(8, 8, 3)
    assert (to_uint8(Image.fromarray(grey), 3) == torch.tensor(grey)).all()
    luma = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    assert np.abs(to_uint8(Image.fromarray(colour), 1)[0].numpy() - luma).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_what_counts_as_grey(mode):
    assert header_of(reopened(Image.new(mode, (4, 4)), "PNG")).grey == (mode in ("1", "L", "LA"))


def test_plain_has_two_modes_only():
    for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I"):
        assert [plain(Image.new(mode, (4, 4)), channels).mode for channels in (1, 3)] == ["L", "RGB"]
