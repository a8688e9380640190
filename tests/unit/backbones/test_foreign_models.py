"""Models of diffusers as backbones: against diffusers' own forward, against the original DiT, and from folders."""

import json

import pytest
import torch

from dmpctl.backbones.diffusers_dit import DiffusersDiT, to_original
from dmpctl.backbones.diffusers_folder import holds_diffusers, made, open_folder, wrapped
from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.backbones.pixart import PixArt, fresh, plain_config
from dmpctl.backbones.sd_unet import SdUnet, sites_in
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.types import ScheduleSpec, TextSpec
from tests.foreign_helpers import TOKENS, WIDTH, pipeline, tiny_dit, tiny_pixart, tiny_unet

DRAW = torch.Generator().manual_seed(3)
X, T, Y = torch.randn(3, 4, 8, 8, generator=DRAW), torch.tensor([0, 400, 999]), torch.tensor([0, 3, 5])
STATES = torch.randn(3, TOKENS, WIDTH, generator=DRAW)
MASK = torch.arange(TOKENS) < torch.tensor([[1], [8], [TOKENS]])
TEXT = torch.cat([STATES, MASK.float().unsqueeze(-1)], -1)


def test_a_dit_computes_what_diffusers_computes():
    model = tiny_dit()
    expected = model(X, timestep=T, class_labels=Y).sample
    assert torch.equal(DiffusersDiT(model).denoise(X, T, Y), expected)


def test_a_pixart_computes_what_diffusers_computes():
    model = tiny_pixart()
    expected = model(X, STATES, T, {"resolution": None, "aspect_ratio": None}, encoder_attention_mask=MASK.float()).sample
    assert torch.equal(PixArt(model).denoise(X, T, TEXT), expected)


def test_padding_is_hidden_from_a_pixart_and_seen_by_a_u_net():
    other = TEXT.clone()
    other[:2, 60:, :-1] += 1.0  # padding of the first two captions
    pixart, unet = PixArt(tiny_pixart()), SdUnet(tiny_unet())
    torch.testing.assert_close(pixart.denoise(X, T, other)[:2], pixart.denoise(X, T, TEXT)[:2])
    torch.testing.assert_close(pixart.embed(T, other)[:2], pixart.embed(T, TEXT)[:2])
    assert not torch.allclose(unet.denoise(X, T, other)[:2], unet.denoise(X, T, TEXT)[:2], atol=1e-4)


def test_a_u_net_computes_what_diffusers_computes():
    model = tiny_unet()
    assert torch.equal(SdUnet(model).denoise(X, T, TEXT), model(X, T, STATES).sample)


def test_what_the_gate_sees_is_what_the_blocks_see():
    """c is the vector that each network modulates its blocks with."""
    dit, pixart, unet = tiny_dit(), tiny_pixart(), tiny_unet()
    expected = dit.transformer_blocks[0].norm1.emb(T, Y, hidden_dtype=torch.float32)
    torch.testing.assert_close(DiffusersDiT(dit).embed(T, Y), expected)
    embedded = pixart.adaln_single(T, {"resolution": None, "aspect_ratio": None}, batch_size=3, hidden_dtype=torch.float32)[1]
    torch.testing.assert_close(PixArt(pixart).embed_time(T), embedded)
    torch.testing.assert_close(SdUnet(unet).embed(T, TEXT), unet.time_embedding(unet.get_time_embed(X, T)))


def test_the_two_layouts_of_a_dit_differ_in_how_they_embed_time_alone():
    theirs = DiffusersDiT(tiny_dit(norm_eps=1e-6))
    config, tensors = to_original(theirs)
    ours = DiT(config).eval()
    ours.load_state_dict(tensors)
    assert (ours.denoise(X, T, Y) - theirs.denoise(X, T, Y)).abs().max() > 0.01
    torch.testing.assert_close(ours.denoise(X, T * 0, Y), theirs.denoise(X, T * 0, Y), rtol=0, atol=1e-5)  # all angles are 0
    for block in theirs.model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    torch.testing.assert_close(ours.denoise(X, T, Y), theirs.denoise(X, T, Y), rtol=0, atol=1e-5)


def test_blocks_that_embed_in_ways_of_their_own_have_no_original_layout():
    model = tiny_dit()
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight[0, 0] += 1
    with pytest.raises(ValueError, match="block 1 embeds"):
        to_original(DiffusersDiT(model))


def test_parameters_keep_the_names_of_diffusers():
    for kind, model in ((DiffusersDiT, tiny_dit()), (PixArt, tiny_pixart()), (SdUnet, tiny_unet())):
        assert list(kind(model).state_dict()) == list(model.state_dict())


def test_an_edit_is_in_force_for_its_own_call_alone():
    backbone = PixArt(tiny_pixart())
    plain = backbone.denoise(X, T, TEXT)
    backbone.denoise(X, T, TEXT, lambda site, tokens: tokens + 1)
    assert torch.equal(backbone.denoise(X, T, TEXT), plain)
    with pytest.raises(ZeroDivisionError):
        backbone.denoise(X, T, TEXT, lambda site, tokens: tokens + 1 / 0)
    assert torch.equal(backbone.denoise(X, T, TEXT), plain)


@pytest.mark.parametrize(("kind", "model"), [(PixArt, tiny_pixart), (SdUnet, tiny_unet)])
def test_blocks_that_run_twice_give_the_same_gradient(kind, model):
    found = []
    for recompute in (False, True):
        backbone = kind(model())
        backbone.recompute = recompute
        site = backbone.spec.sites[0]
        shift = torch.zeros(site.tokens, site.width, requires_grad=True)
        edit = lambda number, tokens, shift=shift: tokens + shift if number == 0 else tokens  # noqa: E731
        backbone.denoise(X, T, TEXT, edit).square().sum().backward()
        found.append(shift.grad)
    assert found[0].any()
    torch.testing.assert_close(found[1], found[0])


def test_parts_of_a_u_net():
    names = SdUnet(tiny_unet()).block_names
    assert [sites_in(names, part) for part in ("down", "mid", "up")] == [(0,), (1,), (2, 3)]


def test_a_u_net_that_needs_more_is_refused(tmp_path):
    model = tiny_unet(class_embed_type="timestep")
    with pytest.raises(ValueError, match="more than a timestep and a caption"):
        SdUnet(model)
    with pytest.raises(UsageError, match="more than a timestep and a caption"):
        wrapped(model)
    with pytest.raises(UsageError, match="cannot be patched"):
        open_folder(pipeline(tmp_path / "pipe", model))


# ---- folders


@pytest.mark.parametrize(
    ("model", "schedule", "kind"),
    [
        (tiny_dit, "linear", "linear"),
        (tiny_pixart, None, "linear"),
        (tiny_unet, "scaled_linear", "scaled-linear"),
        (tiny_unet, None, "scaled-linear"),
    ],
)
def test_a_pipeline_is_opened_with_its_schedule(tmp_path, model, schedule, kind):
    saved = model()
    folder = pipeline(tmp_path / "pipe", saved, schedule)
    assert holds_diffusers(folder)
    opened, around = open_folder(folder)
    assert around == folder
    assert opened.spec.schedule == ScheduleSpec(kind)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in opened.state_dict().items())
    assert open_folder(folder / ("unet" if model is tiny_unet else "transformer"))[1] is None


def test_a_config_alone_makes_the_same_network():
    model = fresh(DiTConfig(8, 4, 2, 16, 2, 2), TextSpec(TOKENS, WIDTH))
    again = made(json.loads(json.dumps(plain_config(model))), ScheduleSpec("cosine"), 33)
    assert again.spec.text == TextSpec(33, WIDTH)
    assert again.spec.schedule.kind == "cosine"
    again.load_state_dict(model.state_dict())
    with pytest.raises(IntegrityError, match="makes no model"):
        made({"_class_name": "os"}, None, None)
    with pytest.raises(IntegrityError, match="makes no model"):
        made({"_class_name": "PixArtTransformer2DModel", "norm_type": "none"}, None, None)


def test_what_is_wrong_with_a_folder_is_one_sentence(tmp_path):
    folder = pipeline(tmp_path / "pipe", tiny_pixart(), "linear")
    part = folder / "transformer"
    config = json.loads((part / "config.json").read_text())
    weights = (part / "diffusion_pytorch_model.safetensors").read_bytes()

    (part / "diffusion_pytorch_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(IntegrityError, match="is no PixArtTransformer2DModel that can be read"):
        open_folder(folder)
    (part / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(IntegrityError, match="is no PixArtTransformer2DModel that can be read"):
        open_folder(folder)
    (part / "diffusion_pytorch_model.safetensors").write_bytes(weights)

    (part / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(IntegrityError, match=r"missing transformer_blocks\.2"):
        open_folder(folder)
    (part / "config.json").write_text(json.dumps(config | {"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(UsageError, match="holds a FluxTransformer2DModel, which cannot be patched"):
        open_folder(folder)
    (part / "config.json").write_text(json.dumps(config))

    about = folder / "scheduler" / "scheduler_config.json"
    for change, said in (({"prediction_type": "v_prediction"}, "predicts v_prediction"), ({"beta_end": 0.03}, "to 0.03")):
        about.write_text(json.dumps({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02} | change))
        with pytest.raises(UsageError, match=said):
            open_folder(folder)
    with pytest.raises(MissingError, match="holds no model"):
        open_folder(tmp_path)
    assert not holds_diffusers(tmp_path)


def test_a_fresh_text_dit_starts_without_looking_at_captions():
    model = PixArt(fresh(DiTConfig(8, 4, 2, 16, 2, 2), TextSpec(TOKENS, WIDTH)), text_tokens=TOKENS)
    model.initialise(torch.Generator().manual_seed(0))
    assert not model.denoise(X, T, TEXT).any()  # the last layer is zero
    torch.nn.init.normal_(model.model.proj_out.weight, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.denoise(X, T, TEXT), model.denoise(X, T, TEXT.roll(1, 0)))
    again = PixArt(fresh(DiTConfig(8, 4, 2, 16, 2, 2), TextSpec(TOKENS, WIDTH)))
    again.initialise(torch.Generator().manual_seed(0))
    other = again.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in model.state_dict().items() if name != "proj_out.weight")


@pytest.mark.slow
def test_sizes_of_the_real_models():
    """On the meta device: parameters as published, and what a patch adds."""
    from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel

    from dmpctl.models.build import build_patch
    from dmpctl.settings.methods import Dmp

    with torch.device("meta"):
        dit = DiffusersDiT(DiTTransformer2DModel(in_channels=4, out_channels=8, num_layers=28, sample_size=32))
        pixart = PixArt(PixArtTransformer2DModel(sample_size=32, caption_channels=4096, use_additional_conditions=False))
        unet = SdUnet(UNet2DConditionModel(sample_size=64, cross_attention_dim=768))
        found = {
            name: (model.spec.parameters, build_patch(model, Dmp()).added)
            for name, model in (("dit", dit), ("pixart", pixart), ("sd", unet))
        }
    assert [(site.tokens, site.width) for site in unet.spec.sites] == (
        [(4096, 320)] * 2
        + [(1024, 640)] * 2
        + [(256, 1280)] * 2
        + [(64, 1280)]
        + [(256, 1280)] * 3
        + [(1024, 640)] * 3
        + [(4096, 320)] * 3
    )
    assert found["sd"][0] == 859_520_964  # as Stable Diffusion 1.5 has it
    assert found["sd"] == (859_520_964, 5 * (4096 * 320 + 1024 * 640 + 256 * 1280) + 64 * 1280 + (4096 + 1024 + 256 + 64) * 1282)
    assert found["pixart"][1] == 28 * 256 * 1152 + 256 * 1154
    assert found["dit"][1] == 28 * 256 * 1152 + 256 * 1154
    shares = {name: round(100 * added / total, 2) for name, (total, added) in found.items()}
    assert shares == {"dit": 1.14, "pixart": 1.4, "sd": 2.16}
