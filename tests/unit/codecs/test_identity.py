import numpy as np
import torch
from PIL import Image
from torchvision.utils import save_image

from dmpctl.codecs.identity import Identity


def test_every_byte_makes_the_round_trip():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    latents = Identity().encode(images).mean
    assert latents.dtype == torch.float32
    assert (float(latents.min()), float(latents.max())) == (-1.0, 1.0)
    assert torch.equal(Identity().decode(latents), images)


def test_decoding_agrees_with_what_dit_saves_its_samples_with(tmp_path):
    latents = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    save_image(latents, tmp_path / "sample.png", normalize=True, value_range=(-1, 1))
    saved = np.asarray(Image.open(tmp_path / "sample.png")).transpose(2, 0, 1)
    assert np.array_equal(Identity().decode(latents[None])[0].numpy(), saved)


def test_values_out_of_range_are_clamped():
    extreme = torch.tensor([-9.0, -1.01, 1.01, 9.0]).view(1, 1, 2, 2)
    assert Identity().decode(extreme).flatten().tolist() == [0, 0, 255, 255]


def test_nothing_is_random_about_it():
    moments = Identity().encode(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    assert moments.logvar is None
    assert Identity().latent_shape(3, 4) == (3, 4, 4)
