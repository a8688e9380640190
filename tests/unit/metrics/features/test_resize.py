"""The resizes against the tools that they stand for."""

import numpy as np
import pytest
import torch
from timm.data.transforms_factory import create_transform

from dmpctl.metrics.features.resize import antialiased, clean, half_pixel, tf1
from tests.random_inception import random_images as images

SIZES = [(8, 8), (64, 48), (299, 299), (330, 512)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clean_is_clean_fids_own(height, width):
    from cleanfid.resize import build_resizer

    x, resizer = images(2, height, width), build_resizer("clean")
    expected = np.stack([resizer(image.permute(1, 2, 0).numpy()) for image in x])
    found = clean(x) * 128 + 128
    np.testing.assert_allclose(found.permute(0, 2, 3, 1).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_half_pixel_is_pytorch_fids(height, width):
    """Sampled at pixel centres, clamped at the border: computed in float64 from the definition."""
    x = images(1, height, width, channels=1)
    rows = (np.arange(299) + 0.5) * height / 299 - 0.5
    columns = (np.arange(299) + 0.5) * width / 299 - 0.5
    plane = x[0, 0].double().numpy()

    def ends(at, size):
        low = np.clip(np.floor(np.maximum(at, 0)).astype(int), 0, size - 1)
        return low, np.minimum(low + 1, size - 1), np.maximum(at, 0) - low

    top, bottom, down = ends(rows, height)
    left, right, across = ends(columns, width)
    upper = plane[top][:, left] * (1 - across) + plane[top][:, right] * across
    lower = plane[bottom][:, left] * (1 - across) + plane[bottom][:, right] * across
    expected = 2 * (upper * (1 - down)[:, None] + lower * down[:, None]) / 255 - 1
    np.testing.assert_allclose(half_pixel(x)[0, 0].numpy(), expected, atol=2e-4)


def test_tf1_starts_at_the_corner():
    """TensorFlow 1: output pixel i is taken at i * height / 299, so the first row is the first row."""
    x = images(1, 32, 32)
    found = tf1(x) * 128 + 128
    torch.testing.assert_close(found[0, :, 0, 0], x[0, :, 0, 0].float())
    assert not torch.allclose(found, (half_pixel(x) + 1) * 127.5, atol=1.0)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (64, 64)])
def test_antialiased_is_timms_transform_within_its_rounding(height, width):
    """timm resizes 8-bit images with Pillow and rounds: half a grey level, a little more where bicubic overshoots."""
    from torchvision.transforms.functional import to_pil_image

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = images(1, height, width)
    x = torch.nn.functional.avg_pool2d(x.float(), 5, 1, 2, count_include_pad=False).round().to(torch.uint8)  # no white noise
    transform = create_transform((3, 224, 224), interpolation="bicubic", mean=mean, std=std, crop_pct=1.0)
    expected = transform(to_pil_image(x[0]))
    off = (antialiased(x, 224, mean, std)[0] - expected).abs() * 255 * torch.tensor(std).view(-1, 1, 1)
    assert off.max() < 2.0
    assert off.mean() < 0.5
