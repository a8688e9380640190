"""What every Codec promises."""

import pytest
import torch

from dmpctl.codecs.identity import Identity
from dmpctl.codecs.vae import Vae
from dmpctl.types import Codec
from tests.contracts.rows import Rows
from tests.latent_helpers import TINY_SIDE, tiny_vae

CODECS = {  # how to make it in an empty folder, and the channels and side of the images to try it on
    "identity": (lambda folder: Identity(), 3, 16),
    "identity-grey": (lambda folder: Identity(), 1, 8),
    "vae-shifted": (lambda folder: Vae(tiny_vae(folder, shift_factor=0.5, scaling_factor=0.3), "vae-shifted", 2), 3, TINY_SIDE),
    "vae-wide": (lambda folder: Vae(tiny_vae(folder, latent_channels=8), "vae-wide", 1), 3, TINY_SIDE),
    "vae": (lambda folder: Vae(tiny_vae(folder), "vae", 2), 3, TINY_SIDE),
}


rows = Rows("case", CODECS)


@pytest.fixture(scope="module")
def case(request, tmp_path_factory) -> tuple[Codec, torch.Tensor]:
    make, channels, size = CODECS[request.param]
    codec = make(tmp_path_factory.mktemp("codec"))
    assert codec.name == request.param.removesuffix("-grey")
    images = torch.randint(0, 256, (3, channels, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return codec, images


@rows.but("")
def test_latents_have_the_shape_that_was_announced(case):
    codec, images = case
    moments = codec.encode(images)
    assert tuple(moments.mean.shape) == (3, *codec.latent_shape(images.shape[1], images.shape[2]))
    assert moments.mean.dtype == torch.float32
    assert moments.logvar is None or moments.logvar.shape == moments.mean.shape
    assert moments.mean.isfinite().all()


@rows.but("vae-wide")
def test_decoding_gives_back_bytes_of_the_same_shape(case):
    codec, images = case
    decoded = codec.decode(codec.encode(images).mean)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == images.shape


@rows.on("identity vae")
def test_any_latents_can_be_decoded(case):
    codec, images = case
    latents = 10 * torch.randn(codec.encode(images).mean.shape, generator=torch.Generator().manual_seed(1))
    assert codec.decode(latents).dtype == torch.uint8


@rows.on("identity vae-shifted vae-wide")
def test_an_image_does_not_depend_on_its_batch(case):
    codec, images = case
    together = codec.encode(images).mean
    alone = torch.cat([codec.encode(image[None]).mean for image in images])
    assert torch.allclose(together, alone, atol=1e-5)
    assert (codec.decode(together).int() - torch.cat([codec.decode(row[None]) for row in together]).int()).abs().max() <= 1


@rows.on("identity vae-shifted")
def test_nothing_is_written_into_the_arguments(case):
    codec, images = case
    kept = images.clone()
    latents = codec.encode(images).mean
    before = latents.clone()
    codec.decode(latents)
    assert torch.equal(images, kept)
    assert torch.equal(latents, before)


@rows.but("vae-shifted")
def test_the_images_behind_latents_have_the_shape_that_went_in(case):
    codec, images = case
    shape = tuple(images.shape[1:])
    assert codec.image_shape(codec.latent_shape(*shape[:2])) == shape


@rows.on("identity vae")
def test_it_says_what_it_is(case):
    codec, _ = case
    assert len(bytes.fromhex(codec.fingerprint)) == 32
    assert codec.scale > 0


def test_every_row_is_asked_for_what_it_promises():
    assert not rows.forgotten()
