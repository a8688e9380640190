"""The patch against the paper: a slow gate, published counts, Shazeer's losses, and what a zero patch is."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dmpctl.backbones.dit import DiT, DiTConfig, shape_config
from dmpctl.errors import UsageError
from dmpctl.methods.dmp import DmpPatch, DmpShape, dmp_shape, expected_load, per_sample_importance, squared_cv
from dmpctl.settings.sections import Dmp
from dmpctl.types import BackboneSpec, Plan, Routing, ScheduleSpec, Site

L, N, D, B = 3, 6, 8, 4  # blocks, prompts, width, batch
TOPK = Dmp(gate="topk", topk=2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(settings: Dmp | None = None, shape: DmpShape | None = None, std: float = 0.5) -> DmpPatch:
    """A patch whose every number is random."""
    settings = settings or Dmp()
    patch, draw = DmpPatch(shape or DmpShape(L, N, D, settings.topk or N), settings), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in patch.parameters():
            tensor.normal_(0, std, generator=draw)
    return patch


def routed(plan: Plan) -> Routing:
    assert plan.routing is not None
    return plan.routing


def backbone(**changes: object) -> DiT:
    """A random DiT of 16 tokens, width 16 and 3 blocks, frozen."""
    model, draw = DiT(replace(DiTConfig(8, 2, 2, 16, 3, 2, 4), **changes)), torch.Generator().manual_seed(3)  # type: ignore[arg-type]
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, std=0.15, generator=draw)
    return model.eval().requires_grad_(False)


def spec_of(name: str, num_classes: int = 0) -> BackboneSpec:
    """Of a published shape at 256 x 256 pixels: latents of side 32."""
    config = shape_config(name, 32, num_classes)
    assert config is not None
    with torch.device("meta"):
        return DiT(config).spec


X, T, Y = normal(3, 2, 8, 8, seed=4), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 4])


# ---- the gate


def slow_gates(patch: DmpPatch, c: Tensor, noise: Tensor | None) -> list[list[list[float]]]:
    """Gates [L][B][N] as the paper writes them, one number at a time: Linear on [c; l], noise, the k best, softmax."""
    weight, bias, w_noise = patch.gate.weight.tolist(), patch.gate.bias.tolist(), patch.w_noise.tolist()
    blocks, prompts, width, kept = patch.shape.sites, patch.shape.prompts, patch.shape.width, patch.shape.kept
    gates = [[[0.0] * prompts for _ in c] for _ in range(blocks)]
    for block in range(blocks):
        for sample, vector in enumerate(c.tolist()):
            seen = [*vector, float(block)]
            logits = []
            for prompt in range(prompts):
                logit = sum(w * value for w, value in zip(weight[prompt], seen, strict=True)) + bias[prompt]
                if noise is not None:
                    raw = sum(vector[d] * w_noise[d][prompt] for d in range(width))
                    logit += float(noise[sample, block, prompt]) * (math.log1p(math.exp(raw)) + 0.01)
                logits.append(logit)
            best = sorted(range(prompts), key=lambda prompt: logits[prompt], reverse=True)[:kept]
            total = sum(math.exp(logits[prompt]) for prompt in best)
            for prompt in best:
                gates[block][sample][prompt] = math.exp(logits[prompt]) / total
    return gates


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("kept", [1, 2, 5, 6])
def test_the_gate_equals_the_slow_one(kept, noisy):
    patch = made(Dmp(gate="topk", topk=kept))
    c, noise = normal(B, D, seed=1), normal(B, L, N, seed=2) if noisy else None
    gates = routed(patch.plan(c, noise)).gates
    assert gates.shape == (L, B, N)
    torch.testing.assert_close(gates, torch.tensor(slow_gates(patch, c, noise)), rtol=0, atol=1e-6)
    assert ((gates > 0).sum(-1) == kept).all()


def test_a_soft_gate_keeps_all():
    patch, c = made(), normal(B, D)
    gates = routed(patch.plan(c)).gates
    assert (gates > 0).all()
    torch.testing.assert_close(gates, torch.tensor(slow_gates(patch, c, None)), rtol=0, atol=1e-6)


def test_the_gate_sees_the_block_index_and_nothing_else_of_a_block():
    patch, c = made(), normal(B, D)
    logits = routed(patch.plan(c)).gates.log()
    tilt = (logits[1:] - logits[:-1]).diff(dim=-1)  # differences over prompts, as softmax drops a constant
    expected = patch.gate.weight[:, -1].diff()
    torch.testing.assert_close(tilt, expected.expand_as(tilt), rtol=0, atol=1e-4)
    patch.gate.weight.data[:, -1] = 0
    gates = routed(patch.plan(c)).gates
    torch.testing.assert_close(gates, gates[:1].expand_as(gates))


@pytest.mark.parametrize("settings", [Dmp(), TOPK])
def test_a_gate_does_not_depend_on_the_batch(settings):
    patch, c, noise = made(settings), normal(B, D), normal(B, L, N, seed=2)
    together = routed(patch.plan(c, noise)).gates
    for sample in range(B):
        alone = routed(patch.plan(c[sample : sample + 1], noise[sample : sample + 1])).gates
        torch.testing.assert_close(alone[:, 0], together[:, sample], rtol=0, atol=1e-6)


def test_without_noise_w_noise_has_no_part():
    patch, c = made(TOPK), normal(B, D)
    before = routed(patch.plan(c))
    patch.w_noise.data.fill_(9)
    assert torch.equal(routed(patch.plan(c)).gates, before.gates)
    assert before.load is None


def test_noise_is_never_smaller_than_its_floor():
    """softplus of a very negative number is 0: what is left is 0.01."""
    patch = DmpPatch(DmpShape(1, N, D, N), Dmp())
    patch.w_noise.data.fill_(-1e3)
    noise = normal(B, 1, N)
    gates = routed(patch.plan(torch.ones(B, D), noise)).gates
    torch.testing.assert_close(gates[0], (0.01 * noise[:, 0]).softmax(-1))


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_ties_keep_exactly_k(kept):
    """All logits of a fresh patch are equal."""
    patch = DmpPatch(DmpShape(L, N, D, kept), Dmp(gate="topk", topk=kept))
    gates = routed(patch.plan(normal(B, D))).gates
    assert ((gates > 0).sum(-1) == kept).all()
    assert torch.equal(gates[gates > 0], torch.full((L * B * kept,), 1 / kept))
    patch.gate.bias.data[:] = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    tied = routed(patch.plan(normal(B, D))).gates
    assert ((tied > 0).sum(-1) == kept).all()
    torch.testing.assert_close(tied.sum(-1), torch.ones(L, B))


@pytest.mark.parametrize("settings", [Dmp(), TOPK])
def test_under_bfloat16_autocast_gates_stay_float32_and_tokens_stay_what_they_are(settings):
    patch, c = made(settings), normal(B, D)
    noise, tokens = normal(B, L, N, seed=2), normal(B, N, D, seed=3).bfloat16()
    expected = routed(patch.plan(c.bfloat16().float(), noise))
    with torch.autocast("cpu", torch.bfloat16):
        plan = patch.plan(c.bfloat16(), noise)
        edited = plan.edit(0, tokens)
        penalty = patch.penalty(routed(plan))
    assert routed(plan).gates.dtype == torch.float32
    assert torch.equal(routed(plan).gates, expected.gates)
    assert edited.dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in penalty.values())


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


@pytest.mark.parametrize("position", ["add", "prepend"])
def test_blocks_beyond_the_depth_are_left_alone(position):
    patch = made(Dmp(position=position))
    tokens = normal(B, N, D)
    assert patch.plan(normal(B, D)).edit(L, tokens) is tokens


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


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 5])
def test_prepended_prompts_are_replaced_in_each_patched_block_and_removed_at_the_end(count, depth):
    model = backbone()
    settings = Dmp(position="prepend", prompts=count, prompt_depth=depth)
    patch = made(settings, dmp_shape(model.spec, settings)).requires_grad_(False)
    plan = patch.plan(model.embed_time(T))
    gates, c = routed(plan).gates, model.embed(T, Y)
    own = model.x_embedder(X) + model.pos_embed
    prompts = torch.empty(3, 0, 16)
    for site, block in enumerate(model.blocks):
        if site < depth:
            prompts = torch.stack([gates[site, sample, :, None] * patch.prompt_embeddings[site] for sample in range(3)])
        prompts, own = block(torch.cat([prompts, own], 1), c).split([count, 16], 1)
    by_hand = model._unpatchify(model.final_layer(own, c))
    torch.testing.assert_close(model.denoise(X, T, Y, plan.edit), by_hand, rtol=0, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 3])
def test_prepend_adds_its_tokens_once(depth):
    model = backbone()
    settings = Dmp(position="prepend", prompts=5, prompt_depth=depth)
    plan, lengths = made(settings, dmp_shape(model.spec, settings)).plan(model.embed_time(T)), list[int]()

    def edit(site: int, tokens: Tensor) -> Tensor:
        edited = plan.edit(site, tokens)
        lengths.append(edited.shape[1])
        return edited

    assert model.denoise(X, T, Y, edit).shape == (3, 4, 8, 8)
    assert lengths == [21, 21, 21]


def test_a_prepend_gate_sees_the_time_alone():
    assert made(Dmp(position="prepend")).time_only
    assert not made(Dmp()).time_only


# ---- a zero patch


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("settings", [Dmp(), Dmp(gate="topk", topk=3), Dmp(prompt_depth=1), Dmp(gate_scale=16, balance="none")])
@pytest.mark.parametrize("classes", [0, 4])
def test_a_zero_patch_is_its_backbone_bit_for_bit(settings, noisy, classes):
    model = backbone(num_classes=classes)
    patch = DmpPatch(dmp_shape(model.spec, settings), settings)
    labels = Y if classes else None
    noise = normal(3, patch.shape.sites, 16) if noisy else None
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


@pytest.mark.parametrize(
    ("name", "added", "share"), [("DiT-B/2", 2_556_416, 1.97), ("DiT-L/2", 6_554_112, 1.43), ("DiT-XL/2", 8_552_960, 1.27)]
)
def test_published_counts_and_shares(name, added, share):
    """Shares of the unconditional backbone, as for FFHQ; whether its fixed position table is counted does not show."""
    spec = spec_of(name)
    shape = dmp_shape(spec, Dmp())
    assert shape.parameters() == added
    with torch.device("meta"):
        patch = DmpPatch(shape, Dmp())
    assert sum(p.numel() for name, p in patch.named_parameters() if name != "w_noise") == added
    table = spec.sites[0].tokens * spec.sites[0].width
    assert round(100 * added / spec.parameters, 2) == share
    assert round(100 * added / (spec.parameters + table), 2) == share


def test_the_published_share_of_dit_b_is_not_that_of_a_thousand_classes():
    spec = spec_of("DiT-B/2", 1000)
    assert round(100 * dmp_shape(spec, Dmp()).parameters() / spec.parameters, 2) == 1.96


def test_a_patch_of_dit_l_takes_26_megabytes():
    assert round(4 * dmp_shape(spec_of("DiT-L/2"), Dmp()).parameters() / 1e6) == 26


def test_state_dict_keys_and_shapes_are_the_published_ones():
    shapes = {name: tuple(value.shape) for name, value in made().state_dict().items()}
    assert shapes == {"prompt_embeddings": (L, N, D), "gate.weight": (N, D + 1), "gate.bias": (N,), "w_noise": (D, N)}


def test_a_fresh_patch_is_all_zero_in_float32():
    for tensor in DmpPatch(DmpShape(L, N, D, N), Dmp()).state_dict().values():
        assert not tensor.any()
        assert tensor.dtype == torch.float32


# ---- sizes


def spec(*sites: tuple[int, int]) -> BackboneSpec:
    return BackboneSpec((1, 8, 8), tuple(Site(*site) for site in sites), "epsilon", True, ScheduleSpec(), 0, 1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Dmp(), DmpShape(3, 16, 8, 16)),
        (Dmp(prompts=16), DmpShape(3, 16, 8, 16)),
        (Dmp(prompt_depth=2), DmpShape(2, 16, 8, 16)),
        (Dmp(gate="topk", topk=16), DmpShape(3, 16, 8, 16)),
        (Dmp(gate="topk", topk=1), DmpShape(3, 16, 8, 1)),
        (Dmp(position="prepend", prompts=40, gate="topk", topk=40), DmpShape(3, 40, 8, 40)),
        (Dmp(position="prepend", prompts=1), DmpShape(3, 1, 8, 1)),
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
        (Dmp(), [(16, 8), (16, 4)], "several sizes"),
        (Dmp(), [(16, 8), (4, 8)], "several sizes"),
    ],
)
def test_settings_that_do_not_fit_the_backbone_are_refused(settings, sites, message):
    with pytest.raises(UsageError, match=message) as caught:
        dmp_shape(spec(*sites), settings)
    assert caught.value.exit_code == 2


# ---- balance


def test_squared_cv_is_variance_over_squared_mean():
    values = normal(5, 7).square()
    expected = np.var(values.double().numpy(), axis=-1, ddof=1) / values.double().numpy().mean(-1) ** 2
    np.testing.assert_allclose(squared_cv(values).numpy(), expected, rtol=1e-5)
    assert squared_cv(torch.full((3, 4), 2.0)).tolist() == [0, 0, 0]


def test_one_lone_prompt_is_balanced():
    """Its variance is 0, not undefined: a loss that is not a number would end the training."""
    assert squared_cv(torch.tensor([[3.0], [0.0]])).tolist() == [0, 0]
    for balance in ("shazeer", "per-sample"):
        settings = Dmp(position="prepend", prompts=1, balance=balance)
        patch = made(settings, DmpShape(L, 1, D, 1))
        losses = patch.penalty(patch.plan(normal(1, D), normal(1, L, 1)).routing)
        assert losses["importance"].item() == 0


def one_hot(batch: int = N) -> Tensor:
    """Gates [L, B, N]: each sample takes one prompt, and all prompts are taken equally often."""
    return torch.eye(N).repeat(batch // N, 1).expand(L, -1, -1)


def importance(gates: Tensor, balance: str) -> float:
    patch = made(Dmp(balance=balance, importance_weight=1.0))  # type: ignore[arg-type]
    return patch.penalty(Routing(gates))["importance"].item()


def test_shazeer_wants_prompts_used_equally_and_per_sample_wants_uniform_gates():
    """One-hot and balanced: CV² over samples x prompts is N² / (N + 1) for N samples, over prompts it is 0."""
    assert importance(one_hot(), "shazeer") == 0
    assert importance(one_hot(), "per-sample") == pytest.approx(N**2 / (N + 1), rel=1e-5)
    uniform = torch.full((L, B, N), 1 / N)
    assert importance(uniform, "shazeer") < 1e-9
    assert importance(uniform, "per-sample") < 1e-9


def test_collapsed_gates_cost_n():
    """All samples take prompt 0: values (B, 0, ..., 0), whose CV² is N."""
    collapsed = torch.zeros(L, B, N)
    collapsed[:, :, 0] = 1
    assert importance(collapsed, "shazeer") == pytest.approx(N, rel=1e-5)
    assert importance(collapsed, "per-sample") > 1


def test_shazeer_is_the_mean_over_blocks():
    gates = torch.cat([one_hot()[:1], torch.zeros(1, N, N)])
    gates[1, :, 0] = 1
    assert importance(gates, "shazeer") == pytest.approx(N / 2, rel=1e-5)


def test_per_sample_importance_sums_blocks_first():
    """Gates that differ from block to block but are uniform over all blocks cost nothing."""
    gates = torch.stack([torch.eye(N).roll(shift, 1) for shift in range(N)])
    assert per_sample_importance(gates) == 0
    assert per_sample_importance(gates[:1]) > 1


def test_penalty_weights_scale_their_losses():
    c, noise = normal(B, D), normal(B, L, N, seed=2)

    def losses(**weights: float) -> dict[str, float]:
        patch = made(Dmp(gate="topk", topk=2, **weights))  # type: ignore[arg-type]
        return {name: value.item() for name, value in patch.penalty(patch.plan(c, noise).routing).items()}

    one = losses(importance_weight=1.0, load_weight=1.0)
    assert min(one.values()) > 0
    assert losses(importance_weight=0.5, load_weight=3.0) == pytest.approx(
        {"importance": 0.5 * one["importance"], "load": 3 * one["load"]}
    )
    assert losses() == pytest.approx({"importance": 0.01 * one["importance"], "load": 0.01 * one["load"]})
    assert losses(importance_weight=0.0, load_weight=0.0) == {"importance": 0, "load": 0}


@pytest.mark.parametrize("balance", ["shazeer", "per-sample"])
@pytest.mark.parametrize(
    ("topk", "noisy", "names"),
    [(2, True, {"importance", "load"}), (2, False, {"importance"}), (N, True, {"importance"}), (None, True, {"importance"})],
)
def test_load_is_balanced_only_where_it_is_defined(balance, topk, noisy, names):
    patch = made(Dmp(balance=balance, gate="topk" if topk else "soft", topk=topk))
    routing = routed(patch.plan(normal(B, D), normal(B, L, N, seed=2) if noisy else None))
    assert (routing.load is None) == ("load" not in names)
    assert set(patch.penalty(routing)) == names


def test_no_balance_and_no_routing_give_no_losses():
    patch = made(Dmp(balance="none", gate="topk", topk=2))
    assert patch.penalty(patch.plan(normal(B, D), normal(B, L, N)).routing) == {}
    assert made().penalty(None) == {}


# ---- load


@pytest.mark.parametrize("kept", [1, 2, 5])
def test_load_is_the_chance_to_stay_under_fresh_noise_of_that_prompt_alone(kept):
    """Against counting: redraw the noise of one prompt, keep that of the others, see whether it is among the k best."""
    draws = 20_000
    patch = made(Dmp(gate="topk", topk=kept))
    c, noise = normal(B, D), normal(B, L, N, seed=2)
    load = routed(patch.plan(c, noise)).load
    assert load is not None
    assert load.shape == (L, N)
    std = torch.nn.functional.softplus(c @ patch.w_noise) + 0.01
    for block, prompt in itertools.product(range(L), range(N)):
        seen = torch.cat([c, torch.full((B, 1), float(block))], 1)
        clean = patch.gate(seen)
        logits = (clean + noise[:, block] * std).expand(draws, B, N).clone()
        fresh = normal(draws, B, seed=100 + block * N + prompt)
        logits[..., prompt] = clean[:, prompt] + fresh * std[:, prompt]
        stays = (logits.topk(kept, dim=-1).indices == prompt).any(-1).double().mean(0)
        error = (stays * (1 - stays) / draws).sum().sqrt() + 1e-4
        assert abs(stays.sum() - load[block, prompt]) < 5 * error


def test_load_of_two_prompts_in_closed_form():
    """k = 1 of 2: each stays with probability Φ((its clean logit - the other's noisy one) / std)."""
    clean, noise, std = torch.tensor([[[0.3, -0.2]]]), torch.tensor([[[1.0, -0.5]]]), torch.tensor([[0.5, 2.0]])
    noisy = clean + noise * std

    def phi(z: float) -> float:
        return 0.5 * (1 + math.erf(z / math.sqrt(2)))

    expected = [phi((0.3 - (-0.2 - 1.0)) / 0.5), phi((-0.2 - (0.3 + 0.5)) / 2.0)]
    assert expected_load(clean, noisy, std, 1)[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_load_counts_samples():
    clean = torch.zeros(1, 7, N)
    noisy, std = normal(1, 7, N), torch.ones(7, N)
    load = expected_load(clean, noisy, std, 3)
    torch.testing.assert_close(
        load, torch.stack([expected_load(clean[:, :1], row[None, None], std[:1], 3) for row in noisy[0]]).sum(0)
    )
    assert ((load > 0) & (load < 7)).all()


@pytest.mark.parametrize("extreme", [False, True])
def test_load_has_a_finite_gradient_for_gate_and_noise(extreme):
    """`extreme`: logits hundreds of standard deviations apart."""
    patch = made(Dmp(gate="topk", topk=2), std=0.5)
    if extreme:
        patch.gate.weight.data.mul_(100)
        patch.w_noise.data.fill_(-10)
    c = normal(B, D).abs()
    patch.penalty(patch.plan(c, normal(B, L, N, seed=2)).routing)["load"].backward()
    for tensor in (patch.gate.weight, patch.gate.bias, patch.w_noise):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert extreme or tensor.grad.any()
    assert patch.prompt_embeddings.grad is None


def test_the_load_loss_is_not_dead():
    """Descending it alone evens out a gate that prefers two prompts."""
    patch = DmpPatch(DmpShape(1, N, D, 2), Dmp(gate="topk", topk=2, load_weight=1.0))
    patch.gate.bias.data[:2] = 3
    optimizer = torch.optim.Adam([patch.gate.bias], lr=0.1)
    losses = []
    for step in range(40):
        loss = patch.penalty(patch.plan(normal(32, D), normal(32, 1, N, seed=step)).routing)["load"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


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
