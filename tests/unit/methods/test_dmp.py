"""The patch against the paper: its edit, published counts, and what a zero patch is."""

import itertools

import pytest
import torch

from dmpctl.backbones.dit import DiT, shape_config
from dmpctl.errors import UsageError
from dmpctl.methods.dmp import DmpPatch, DmpShape, dmp_shape
from dmpctl.settings.methods import Dmp
from dmpctl.types import BackboneSpec
from tests.unit.methods.made import B, D, L, N, T, X, Y, backbone, fresh, made, normal, routed, spec

# ---- the edit


@torch.no_grad()
@pytest.mark.parametrize("scale", [None, 1.0, 2.5])
def test_prompt_k_is_scaled_by_gate_k_and_added_to_token_k(scale):
    """Equations 2 and 3, number by number."""
    patch, tokens = made(Dmp(gate_scale=scale)), normal(B, N, D, seed=5)
    plan = patch.plan(normal(B, D))
    gates = routed(plan).gates
    for site in range(L):
        found = plan.edit(site, tokens)
        for sample, token, at in itertools.product(range(B), range(N), range(D)):
            added = gates[site, sample, token] * (scale or 1.0) * patch.prompt_embeddings[site, token, at]
            assert abs(float(found[sample, token, at] - tokens[sample, token, at] - added)) < 1e-5


@pytest.mark.parametrize("count", [6, 16])
def test_gate_scale_n_lets_a_uniform_gate_pass_prompts_unchanged(count):
    patch = DmpPatch(DmpShape(L, count, D, count), Dmp(gate_scale=count))
    patch.prompt_embeddings.data.normal_(generator=torch.Generator().manual_seed(0))
    edited = patch.plan(normal(B, D)).edit(1, torch.zeros(B, count, D))
    torch.testing.assert_close(edited, patch.prompt_embeddings[1].expand(B, -1, -1))


def test_published_scale_divides_prompts_by_n():
    patch = DmpPatch(DmpShape(L, 16, D, 16), Dmp())
    patch.prompt_embeddings.data.fill_(1)
    edited = patch.plan(normal(B, D)).edit(1, torch.zeros(B, 16, D))
    assert torch.equal(edited, torch.full((B, 16, D), 1 / 16))


def test_a_prepend_gate_sees_the_time_alone():
    assert made(Dmp(position="prepend")).time_only
    assert not made(Dmp()).time_only


# ---- a zero patch

ZEROES = [
    Dmp(),
    Dmp(gate="topk", topk=3),
    Dmp(prompt_depth=1),
    Dmp(prompt_sites="1-2"),
    Dmp(gate="hard"),
    Dmp(gate="uniform"),
    Dmp(gate_per_site=True),
    Dmp(prompt_sets=2, prompt_rank=2),
]


@pytest.mark.parametrize(("settings", "noisy", "classes"), [(one, n % 2 == 0, 4 * (n % 3 > 0)) for n, one in enumerate(ZEROES)])
def test_a_zero_patch_is_its_backbone_bit_for_bit(settings, noisy, classes):
    model = backbone(num_classes=classes)
    patch = DmpPatch(dmp_shape(model.spec, settings), settings)
    labels = Y if classes else None
    noise = normal(3, patch.shape.sites, patch.shape.choices) if noisy else None
    plan = patch.plan(model.embed(T, labels), noise)
    assert torch.equal(model.denoise(X, T, labels, plan.edit), model.denoise(X, T, labels))


def test_a_zero_patch_is_its_backbone_bit_for_bit_under_autocast_too():
    model = backbone()
    patch = DmpPatch(dmp_shape(model.spec, Dmp()), Dmp())
    with torch.autocast("cpu", torch.bfloat16):
        plan = patch.plan(model.embed(T, Y), normal(3, 3, 16))
        assert torch.equal(model.denoise(X, T, Y, plan.edit), model.denoise(X, T, Y))


@pytest.mark.parametrize("noisy", [False, True])
def test_a_zero_prepend_is_not_its_backbone_as_its_zero_tokens_are_attended_to(noisy):
    """Zero tokens leave a block's norm as its shift, so every other token sees them: prepend does not start at the backbone."""
    model, settings = backbone(), Dmp(position="prepend")
    patch = DmpPatch(dmp_shape(model.spec, settings), settings)
    plan = patch.plan(model.embed_time(T), normal(3, 3, 16) if noisy else None)
    difference = model.denoise(X, T, Y, plan.edit) - model.denoise(X, T, Y)
    assert difference.abs().max() > 1e-3


def test_prompts_learn_at_the_first_step_and_the_gate_at_the_second():
    """The gate's gradient is a multiple of the prompts, so it is zero until those have moved."""
    model = backbone()
    patch = DmpPatch(dmp_shape(model.spec, Dmp()), Dmp())

    def backward() -> None:
        patch.zero_grad()
        plan = patch.plan(model.embed(T, Y), normal(3, 3, 16))
        model.denoise(X, T, Y, plan.edit).square().mean().backward()

    backward()
    assert patch.prompt_embeddings.grad is not None
    assert (patch.prompt_embeddings.grad.abs().sum((1, 2)) > 0).all()
    assert patch.gate.weight.grad is not None
    assert not patch.gate.weight.grad.any()
    patch.prompt_embeddings.data.normal_(generator=torch.Generator().manual_seed(0))
    backward()
    for tensor in patch.parameters():
        assert tensor.grad is not None
        assert tensor.grad.any()


# ---- counts


def spec_of(name: str, num_classes: int = 0) -> BackboneSpec:
    """Of a published shape at 256 x 256 pixels: latents of side 32."""
    config = shape_config(name, 32, num_classes)
    assert config is not None
    with torch.device("meta"):
        return DiT(config).spec


def added_to(spec: BackboneSpec) -> int:
    with torch.device("meta"):
        return fresh(of=spec).added


@pytest.mark.parametrize(
    ("name", "added", "share"), [("DiT-B/2", 2_556_416, 1.97), ("DiT-L/2", 6_554_112, 1.43), ("DiT-XL/2", 8_552_960, 1.27)]
)
def test_published_counts_and_shares(name, added, share):
    """Shares of the unconditional backbone, as for FFHQ; whether its fixed position table is counted does not show."""
    spec = spec_of(name)
    assert added_to(spec) == added
    table = spec.sites[0].tokens * spec.sites[0].width
    assert round(100 * added / spec.parameters, 2) == share
    assert round(100 * added / (spec.parameters + table), 2) == share


def test_the_published_share_of_dit_b_is_not_that_of_a_thousand_classes():
    spec = spec_of("DiT-B/2", 1000)
    assert round(100 * added_to(spec) / spec.parameters, 2) == 1.96


def test_a_patch_of_dit_l_takes_26_megabytes():
    assert round(4 * added_to(spec_of("DiT-L/2")) / 1e6) == 26


def test_state_dict_keys_and_shapes_are_the_published_ones():
    shapes = {name: tuple(value.shape) for name, value in made().state_dict().items()}
    assert shapes == {"prompt_embeddings": (L, N, D), "gate.weight": (N, D + 1), "gate.bias": (N,), "w_noise": (D, N)}


def test_a_fresh_patch_is_all_zero_in_float32():
    for tensor in DmpPatch(DmpShape(L, N, D, N), Dmp()).state_dict().values():
        assert not tensor.any()
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "added"),
    [
        (Dmp(), 3 * 48 + 60),
        (Dmp(prompt_sites="0,2"), 2 * 48 + 60),
        (Dmp(gate="uniform"), 3 * 48),
        (Dmp(gate_per_site=True), 3 * 48 + 3 * 9 * 6),
        (Dmp(gate_per_site=True, prompt_depth=1), 48 + 9 * 6),
        (Dmp(prompt_sets=2), 3 * 2 * 48 + 20),
        (Dmp(prompt_sets=2, gate_per_site=True), 3 * 2 * 48 + 3 * 9 * 2),
        (Dmp(prompt_sets=2, prompt_rank=2), 3 * 2 * 2 * (6 + 8) + 20),
        (Dmp(position="prepend", prompts=2, prompt_rank=1), 3 * (2 + 8) + 20),
    ],
)
def test_what_each_kind_adds(settings, added):
    """6 tokens of width 8 in 3 blocks: 48 numbers per block, (8 + 2) for each thing that a shared gate chooses among."""
    patch = fresh(settings)
    assert patch.added == added
    assert sum(tensor.numel() for name, tensor in patch.state_dict().items() if name != "w_noise") == added
    assert patch.merged() is None


# ---- sizes


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Dmp(), DmpShape(3, 16, 8, 16)),
        (Dmp(prompt_depth=2), DmpShape(2, 16, 8, 16)),
        (Dmp(gate="topk", topk=1), DmpShape(3, 16, 8, 1)),
        (Dmp(position="prepend", prompts=40, gate="topk", topk=40), DmpShape(3, 40, 8, 40)),
        (Dmp(prompt_sites="0,2"), DmpShape(2, 16, 8, 16, chosen=(0, 2))),
        (Dmp(gate="hard"), DmpShape(3, 16, 8, 1)),
        (Dmp(gate="uniform"), DmpShape(3, 16, 8, 16)),
        (Dmp(gate_per_site=True), DmpShape(3, 16, 8, 16)),
        (Dmp(prompt_sets=5), DmpShape(3, 16, 8, 5, sets=5)),
        (Dmp(prompt_sets=5, gate="topk", topk=2, prompt_rank=3), DmpShape(3, 16, 8, 2, sets=5, rank=3)),
    ],
)
def test_sizes_follow_from_backbone_and_settings(settings, expected):
    assert dmp_shape(spec((16, 8), (16, 8), (16, 8)), settings) == expected


@pytest.mark.parametrize(
    ("settings", "sites", "message"),
    [
        (Dmp(prompts=8), [(16, 8)], "one prompt per token: 16"),
        (Dmp(prompt_depth=2), [(16, 8)], "prompt-depth 2"),
        (Dmp(gate="topk", topk=17), [(16, 8)], "topk 17"),
        (Dmp(prompt_sites="0-1"), [(16, 8)], "no block 1"),
    ],
)
def test_settings_that_do_not_fit_the_backbone_are_refused(settings, sites, message):
    with pytest.raises(UsageError, match=message) as caught:
        dmp_shape(spec(*sites), settings)
    assert caught.value.exit_code == 2


# ---- training settings


def test_rates_of_prompts_gate_and_noise():
    groups = {group["name"]: group for group in made(Dmp(prompt_lr=3e-4, gate_lr=2e-3)).param_groups()}
    assert {name: group["lr"] for name, group in groups.items()} == {"prompts": 3e-4, "gate": 2e-3}
    published = [group["lr"] for group in made().param_groups()]
    assert published == [1e-4, 1e-3]


def test_without_gate_noise_none_is_drawn_and_w_noise_is_not_trained():
    patch = made(Dmp(gate_noise=False))
    assert patch.noise_shape() is None
    assert not patch.w_noise.requires_grad
    assert all(tensor is not patch.w_noise for group in patch.param_groups() for tensor in group["params"])
    assert "w_noise" in patch.state_dict()
    assert made().noise_shape() == (L, N)
