"""The Stable Diffusion autoencoder against diffusers itself, on a tiny random one in the real file format."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmpctl.codecs.vae import WEIGHTS, Vae
from dmpctl.errors import IntegrityError, MissingError, UsageError
from tests.latent_helpers import TINY_SIDE, tiny_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def theirs(folder):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)


@pytest.fixture
def images():
    shape = (5, 3, TINY_SIDE, TINY_SIDE)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def rewritten(folder, to, change=None, **config):
    """A copy with other tensors or another config."""
    shutil.copytree(folder, to)
    if change is not None:
        save_file(change(load_file(to / WEIGHTS)), to / WEIGHTS)
    value = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps({key: found for key, found in value.items() if found != "absent"}))
    return to


def test_moments_are_the_scaled_ones_of_diffusers(folder, theirs, images):
    found = Vae(folder, "tiny").encode(images)
    posterior = theirs.encode(images.float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(found.mean, 0.18215 * posterior.mean, rtol=1e-5, atol=1e-6)
    noise = torch.randn(found.mean.shape, generator=torch.Generator().manual_seed(1))
    sample = 0.18215 * (posterior.mean + posterior.std * noise)  # what the published training takes
    torch.testing.assert_close(found.mean + (0.5 * found.logvar).exp() * noise, sample, rtol=1e-5, atol=1e-6)
    assert found.mean.dtype == found.logvar.dtype == torch.float32
    assert found.mean.shape == (5, 4, TINY_SIDE // 2, TINY_SIDE // 2)


def test_decoding_is_that_of_diffusers_by_the_rule_of_dit(folder, theirs):
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    expected = (127.5 * theirs.decode(latents / 0.18215).sample + 128).clamp(0, 255).to(torch.uint8)
    found = Vae(folder, "tiny").decode(latents)
    assert found.dtype == torch.uint8
    assert found.shape == (5, 3, TINY_SIDE, TINY_SIDE)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert (found == expected).float().mean() > 0.99


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_how_many_at_once_changes_nothing(folder, images, batch):
    whole, parts = Vae(folder, "tiny", 8), Vae(folder, "tiny", batch)
    one, two = whole.encode(images), parts.encode(images)
    torch.testing.assert_close(one.mean, two.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.logvar, two.logvar, rtol=0, atol=1e-5)
    assert (whole.decode(one.mean).int() - parts.decode(one.mean).int()).abs().max() <= 1


def test_no_more_than_the_batch_at_once(folder, images):
    vae, sizes = Vae(folder, "tiny", 2), []
    vae._model.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    vae._model.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    vae.decode(vae.encode(images).mean)
    assert sizes == [2, 2, 1] * 2


def test_autocast_outside_changes_nothing(folder, theirs, images):
    vae = Vae(folder, "tiny")
    plain, pixels = vae.encode(images), images.float() / 127.5 - 1
    with torch.autocast("cpu", torch.bfloat16):
        inside, decoded = vae.encode(images), vae.decode(plain.mean)
        coarse = 0.18215 * theirs.encode(pixels).latent_dist.mean.float()
    assert torch.equal(inside.mean, plain.mean)
    assert torch.equal(inside.logvar, plain.logvar)
    assert torch.equal(decoded, vae.decode(plain.mean))
    assert not torch.allclose(coarse, plain.mean, atol=1e-5)  # autocast would have shown


def test_it_is_frozen_and_in_float32_whatever_the_file(folder, tmp_path, images):
    half = rewritten(folder, tmp_path / "half", lambda tensors: {name: value.half() for name, value in tensors.items()})
    vae = Vae(half, "half")
    moments = vae.encode(images)
    assert not moments.mean.requires_grad
    assert not vae._model.training
    assert {(p.dtype, p.requires_grad) for p in vae._model.parameters()} == {(torch.float32, False)}
    torch.testing.assert_close(moments.mean, Vae(folder, "tiny").encode(images).mean, rtol=0, atol=1e-2)


def test_it_may_be_loaded_while_sampling_and_then_used_for_training(folder, images):
    vae = Vae(folder, "tiny")
    with torch.inference_mode():
        vae.decode(torch.zeros(1, 4, 8, 8))
    weight = torch.ones(1, requires_grad=True)
    (vae.encode(images).mean * weight).sum().backward()
    assert weight.grad is not None


def test_neither_shape_nor_fingerprint_load_anything(folder):
    vae = Vae(folder, "tiny")
    assert vae.latent_shape(3, 32) == (4, 16, 16)
    assert len(bytes.fromhex(vae.fingerprint)) == 32
    assert "_model" not in vars(vae)


def test_the_shape_of_the_published_one(folder, tmp_path):
    four = rewritten(folder, tmp_path / "sd", block_out_channels=[128, 256, 512, 512])
    vae = Vae(four, "vae-ema")
    assert (vae.name, vae.scale) == ("vae-ema", 0.18215)
    assert vae.latent_shape(3, 256) == (4, 32, 32)
    assert vae.latent_shape(3, 512) == (4, 64, 64)
    with pytest.raises(UsageError, match="multiple of 8, found 250") as caught:
        vae.latent_shape(3, 250)
    assert caught.value.hint == "take --size 248"
    with pytest.raises(UsageError, match="multiple of 8, found 7") as caught:
        vae.latent_shape(3, 7)
    assert caught.value.hint == "take --size 8"


def test_grey_images_are_refused(folder):
    with pytest.raises(UsageError, match="3 channels, found 1") as caught:
        Vae(folder, "tiny").encode(torch.zeros(1, 1, TINY_SIDE, TINY_SIDE, dtype=torch.uint8))
    assert caught.value.hint == "add --channels 3"


def test_scale_and_shift_of_the_config(folder, tmp_path, images):
    plain = Vae(folder, "tiny")
    other = Vae(rewritten(folder, tmp_path / "other", scaling_factor=0.36430, shift_factor=0.5), "other")
    absent = Vae(rewritten(folder, tmp_path / "absent", scaling_factor="absent", shift_factor="absent"), "absent")
    one, two = plain.encode(images), other.encode(images)
    torch.testing.assert_close(two.mean, 2 * (one.mean - 0.5 * 0.18215), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((two.logvar - one.logvar).exp(), torch.full_like(one.logvar, 4), rtol=1e-4, atol=0)
    assert (plain.decode(one.mean).int() - other.decode(two.mean).int()).abs().max() <= 1
    assert (absent.scale, other.scale) == (0.18215, 0.36430)


def test_the_fingerprint_tells_weights_and_scale_apart_and_nothing_else(folder, tmp_path):
    same = Vae(rewritten(folder, tmp_path / "same", _diffusers_version="9.9", _name_or_path="x", new_option=None), "other")
    scaled = Vae(rewritten(folder, tmp_path / "scaled", scaling_factor=0.2), "tiny")
    changed = Vae(rewritten(folder, tmp_path / "changed", lambda t: t | {"quant_conv.bias": t["quant_conv.bias"] + 1}), "tiny")
    plain = Vae(folder, "tiny", 1).fingerprint
    assert same.fingerprint == plain
    assert len({plain, scaled.fingerprint, changed.fingerprint}) == 3


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def test_files_of_old_have_other_names_for_the_attention(folder, tmp_path, images):
    def renamed(tensors):
        for new, old in OLD.items():
            tensors = {name.replace(new, old): value for name, value in tensors.items()}
        return tensors

    assert any("proj_attn" in name for name in renamed(load_file(folder / WEIGHTS)))
    old = Vae(rewritten(folder, tmp_path / "old", renamed), "old")
    assert torch.equal(old.encode(images).mean, Vae(folder, "tiny").encode(images).mean)


def test_a_pipeline_has_it_in_a_folder_of_its_own(folder, tmp_path, images):
    shutil.copytree(folder, tmp_path / "pipeline" / "vae")
    vae = Vae(tmp_path / "pipeline", "sd")
    assert vae.fingerprint == Vae(folder, "tiny").fingerprint
    assert vae.encode(images).mean.isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {name: v for name, v in t.items() if name != "encoder.conv_in.bias"}, "missing encoder.conv_in.bias"),
        (lambda t: t | {"another.weight": torch.zeros(2)}, "unexpected another.weight"),
        (lambda t: t | {"encoder.conv_in.bias": torch.zeros(3)}, "encoder.conv_in.bias"),
    ],
)
def test_other_weights_are_refused(folder, tmp_path, images, change, words):
    with pytest.raises(IntegrityError, match=words):
        Vae(rewritten(folder, tmp_path / "other", change), "other").encode(images)


def test_damaged_weights_are_refused(folder, tmp_path, images):
    copy = rewritten(folder, tmp_path / "copy")
    os.truncate(copy / WEIGHTS, 5000)
    with pytest.raises(IntegrityError, match="no autoencoder that can be read") as caught:
        Vae(copy, "copy").encode(images)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "holds a UNet2DConditionModel"),
        ({"latent_channels": "absent"}, "config.json"),
        ({"block_out_channels": None}, "config.json"),
    ],
)
def test_another_config_is_refused(folder, tmp_path, config, words):
    with pytest.raises(IntegrityError, match=words):
        Vae(rewritten(folder, tmp_path / "other", **config), "other")


def test_what_is_not_there(folder, tmp_path):
    with pytest.raises(MissingError, match="holds no autoencoder"):
        Vae(tmp_path, "none")
    shutil.copy(folder / WEIGHTS, tmp_path)
    with pytest.raises(MissingError, match=r"config\.json is not there"):
        Vae(tmp_path, "none")
