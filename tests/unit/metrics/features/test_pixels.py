"""Pixel features: exact values, order and scale."""

import pytest
import torch

from dmpctl.errors import UsageError
from dmpctl.metrics.features.pixels import Pixels


def test_every_grey_level_has_its_value():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    features = Pixels(1, 16)(levels)
    assert features.dtype == torch.float32
    assert features[0, 0] == -1
    assert features[0, 255] == 1
    torch.testing.assert_close(features[0].double(), torch.linspace(-1, 1, 256, dtype=torch.float64), atol=1e-7, rtol=0)


def test_channels_come_first_then_rows():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    features = Pixels(3, 4)(images)
    assert features.shape == (2, 48)
    assert torch.equal(((features + 1) * 127.5).round().long(), torch.arange(96).reshape(2, 48))


def test_views_are_read_in_order():
    images = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    planes = images.permute(0, 3, 1, 2)
    assert torch.equal(Pixels(3, 4)(planes), Pixels(3, 4)(planes.contiguous()))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 8, 7), (2, 1, 4, 16), (2, 64)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(UsageError):
        Pixels(1, 8)(torch.zeros(shape, dtype=torch.uint8))
