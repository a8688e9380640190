"""What every Backbone promises."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dmpctl.backbones.diffusers_dit import DiffusersDiT
from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.backbones.pixart import PixArt
from dmpctl.backbones.sd_unet import SdUnet
from dmpctl.models.backbone import freeze
from dmpctl.types import Backbone, ScheduleSpec
from tests.contracts.rows import Rows
from tests.foreign_helpers import TOKENS, tiny_dit, tiny_pixart, tiny_unet

BATCH = 4
BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "dit-uncond": lambda: DiT(DiTConfig(8, 1, 2, 16, 3, 2, 0)),
    "dit-class": lambda: DiT(DiTConfig(8, 4, 2, 16, 2, 4, 10)),
    "dit-class-epsilon": lambda: DiT(DiTConfig(6, 3, 3, 12, 1, 1, 3, learned_sigma=False)),
    "sit-class": lambda: DiT(DiTConfig(8, 4, 2, 16, 2, 4, 10), ScheduleSpec("flow")),
    "diffusers-dit": lambda: DiffusersDiT(tiny_dit()),
    "pixart": lambda: PixArt(tiny_pixart(), text_tokens=TOKENS),
    "pixart-1024": lambda: PixArt(
        tiny_pixart(use_additional_conditions=True, attention_head_dim=12, cross_attention_dim=24), text_tokens=TOKENS
    ),
    "sd-unet": lambda: SdUnet(tiny_unet()),
}


rows = Rows("backbone", BACKBONES)


@pytest.fixture
def backbone(request) -> Backbone:
    """With random weights, so that no path is dead; frozen as everywhere."""
    model, draw = BACKBONES[request.param](), torch.Generator().manual_seed(0)
    if isinstance(model, DiT):
        for tensor in model.parameters():
            nn.init.normal_(tensor, std=0.15, generator=draw)
    freeze(model)
    return model


@pytest.fixture
def inputs(backbone) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, the first and last timestep among t, and labels with the null class among them, or captions of different lengths."""
    spec, draw = backbone.spec, torch.Generator().manual_seed(1)
    t = torch.tensor([0, 3, spec.schedule.steps // 2, spec.schedule.steps - 1])
    cond = None if spec.null_class is None else torch.tensor([0, 1, spec.num_classes - 1, spec.null_class])
    x = torch.randn(BATCH, *spec.latent_shape, generator=draw)
    if spec.text is not None:
        mask = torch.arange(spec.text.tokens) < torch.tensor([[2], [5], [9], [spec.text.tokens]])
        cond = torch.randn(BATCH, spec.text.tokens, spec.text.width + 1, generator=draw)
        cond[..., -1] = mask.float()
    return x, t, cond


def some_of(cond: Tensor | None, which: list[int]) -> Tensor | None:
    return None if cond is None else cond[which]


@rows.but("")
def test_the_prediction_has_the_shape_the_spec_says(backbone, inputs):
    channels, height, width = backbone.spec.latent_shape
    prediction = backbone.denoise(*inputs)
    assert prediction.shape == (BATCH, channels * (2 if backbone.spec.learned_sigma else 1), height, width)
    assert prediction.dtype == torch.float32
    assert prediction.isfinite().all()


@rows.on("dit-class diffusers-dit pixart sd-unet")
def test_it_is_frozen(backbone, inputs):
    assert not backbone.training
    assert not any(tensor.requires_grad for tensor in backbone.parameters())
    assert not backbone.denoise(*inputs).requires_grad


@rows.but("sit-class pixart")
def test_the_spec_counts_its_parameters(backbone):
    assert backbone.spec.parameters == sum(tensor.numel() for tensor in backbone.parameters())


@rows.but("sit-class pixart-1024")
def test_every_site_is_edited_once_in_order_with_the_tokens_the_spec_says(backbone, inputs):
    seen: list[tuple[int, int, int, int]] = []

    def edit(site: int, tokens: Tensor) -> Tensor:
        seen.append((site, *tokens.shape))
        return tokens

    edited = backbone.denoise(*inputs, edit)
    assert seen == [(number, BATCH, site.tokens, site.width) for number, site in enumerate(backbone.spec.sites)]
    assert torch.equal(edited, backbone.denoise(*inputs))


@rows.on("dit-class dit-class-epsilon diffusers-dit pixart sd-unet")
def test_every_site_is_felt(backbone, inputs):
    plain = backbone.denoise(*inputs)
    for number in range(len(backbone.spec.sites)):
        bump = torch.zeros(backbone.spec.sites[number].tokens, backbone.spec.sites[number].width)
        bump[0, ::2] = 1
        edited = backbone.denoise(
            *inputs, lambda site, tokens, number=number, bump=bump: tokens + bump if site == number else tokens
        )
        assert not torch.allclose(edited, plain, atol=1e-4)


@rows.on("dit-class dit-class-epsilon diffusers-dit pixart")
def test_tokens_put_in_front_fall_away(backbone, inputs):
    def prepend(site: int, tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, :2] + 1, tokens], 1) if site == 0 else tokens

    assert backbone.denoise(*inputs, prepend).shape == backbone.denoise(*inputs).shape


@rows.on("dit-class diffusers-dit pixart sd-unet")
def test_gradients_pass_through_to_the_edit_and_stop_there(backbone, inputs):
    site = backbone.spec.sites[0]
    shift = torch.zeros(site.tokens, site.width, requires_grad=True)
    backbone.denoise(*inputs, lambda number, tokens: tokens + shift if number == 0 else tokens).square().sum().backward()
    assert shift.grad is not None
    assert shift.grad.any()
    assert all(tensor.grad is None for tensor in backbone.parameters())


@rows.on("dit-uncond dit-class diffusers-dit pixart-1024 sd-unet")
def test_denoising_is_deterministic_and_writes_nothing_into_its_arguments(backbone, inputs):
    kept = [None if value is None else value.clone() for value in inputs]
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert torch.equal(backbone.denoise(*inputs), backbone.denoise(*inputs))
    assert all(before is None if now is None else torch.equal(before, now) for before, now in zip(kept, inputs, strict=True))
    assert all(torch.equal(weights[name], value) for name, value in backbone.state_dict().items())


@rows.but("dit-class-epsilon")
def test_a_sample_does_not_depend_on_its_neighbours(backbone, inputs):
    x, t, cond = inputs
    together, c = backbone.denoise(x, t, cond), backbone.embed(t, cond)
    for i in range(BATCH):
        torch.testing.assert_close(backbone.denoise(x[[i]], t[[i]], some_of(cond, [i]))[0], together[i], rtol=0, atol=1e-5)
        torch.testing.assert_close(backbone.embed(t[[i]], some_of(cond, [i]))[0], c[i], rtol=0, atol=1e-5)
    order = [2, 0, 3, 1]
    shuffled = backbone.denoise(x[order], t[order], some_of(cond, order))
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-5)


@rows.but("dit-class-epsilon")
def test_embedding_is_one_vector_of_the_sites_width_per_sample(backbone, inputs):
    _, t, cond = inputs
    for c in (backbone.embed(t, cond), backbone.embed_time(t)):
        assert c.shape == (BATCH, backbone.spec.cond_width or backbone.spec.sites[0].width)
        assert c.isfinite().all()
        assert not torch.allclose(c[0], c[1], atol=1e-4)


@rows.but("dit-uncond dit-class-epsilon")
def test_the_condition_is_added_to_the_times_share(backbone, inputs):
    """c = t_emb + y_emb: what is left without the time is the same at all times."""
    _, t, cond = inputs
    if isinstance(backbone, SdUnet):
        assert torch.equal(backbone.embed(t, cond), backbone.embed_time(t))  # a caption has no vector there
        return
    share = backbone.embed(t, cond) - backbone.embed_time(t)
    later = backbone.embed(t.flip(0), cond) - backbone.embed_time(t.flip(0))
    torch.testing.assert_close(share, later, rtol=0, atol=1e-5)
    assert share.abs().max() > 1e-3


@rows.but("dit-uncond pixart-1024 sit-class")
def test_labels_are_felt(backbone, inputs):
    x, t, cond = inputs
    others = backbone.denoise(x, t, cond.roll(1))
    differs = (others - backbone.denoise(x, t, cond)).flatten(1).abs().amax(1) > 1e-4
    assert differs.all()


def test_every_row_is_asked_for_what_it_promises():
    assert not rows.forgotten()
