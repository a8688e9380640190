"""Where prompts are, how they start, and how they reach the tokens."""

import pytest
import torch
from torch import Tensor

from dmpctl.errors import UsageError
from dmpctl.methods import prompts as prompts_module
from dmpctl.methods.dmp import dmp_shape
from dmpctl.methods.prompts import PromptShape, bmm_gradients, cached_gradients, gated_edit, patched_blocks, prompt_shape
from dmpctl.settings.methods import Dmp, PromptTuning
from tests.unit.methods.made import SPEC, B, D, L, N, T, X, Y, backbone, fresh, made, normal, routed, spec


@pytest.mark.parametrize("position", ["add", "prepend"])
def test_blocks_beyond_the_depth_are_left_alone(position):
    patch = made(Dmp(position=position))
    tokens = normal(B, N, D)
    assert patch.plan(normal(B, D)).edit(L, tokens) is tokens


@pytest.mark.parametrize(("count", "depth"), [(1, 3), (5, 1), (5, 2)])
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


# ---- which blocks


@pytest.mark.parametrize(
    ("given", "blocks"),
    [
        ({}, (0, 1, 2, 3, 4, 5, 6, 7)),
        ({"prompt_depth": 3}, (0, 1, 2)),
        ({"prompt_sites": "0,2,4-7"}, (0, 2, 4, 5, 6, 7)),
        ({"prompt_sites": "6,1-3,2,2-4"}, (1, 2, 3, 4, 6)),
        ({"prompt_sites": "7,0"}, (0, 7)),
    ],
)
def test_the_blocks_that_are_named_are_patched_once_and_in_order(given, blocks):
    for shape in (dmp_shape(spec(*[(N, D)] * 8), Dmp(**given)), prompt_shape(spec(*[(N, D)] * 8), PromptTuning(**given))):
        assert shape.blocks == blocks
        assert shape.sites == len(blocks)


def test_the_first_blocks_are_the_same_patch_however_they_are_named():
    assert dmp_shape(SPEC, Dmp(prompt_sites="1,0")) == dmp_shape(SPEC, Dmp(prompt_depth=2))
    assert dmp_shape(SPEC, Dmp(prompt_sites="0-2")) == dmp_shape(SPEC, Dmp())


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ("3", "no block 3, this backbone's are 0-2", None),
        ("0,1-9", "no block 9", None),
        ("0,2-1", "2-1 runs backwards", "write 1-2"),
    ],
)
def test_blocks_that_are_not_there_are_refused(given, message, hint):
    with pytest.raises(UsageError, match=message) as caught:
        patched_blocks(Dmp(prompt_sites=given), 3)
    assert caught.value.hint == hint


@torch.no_grad()
def test_each_patched_block_has_its_own_prompts_and_the_others_are_left_alone():
    patch, tokens = (
        made(Dmp(prompt_sites="1,3", gate_scale=2.0), dmp_shape(spec(*[(N, D)] * 5), Dmp(prompt_sites="1,3"))),
        normal(B, N, D),
    )
    plan = patch.plan(normal(B, D))
    for block in range(6):
        if block in (1, 3):
            number = (1, 3).index(block)
            expected = tokens + 2 * routed(plan).gates[number].unsqueeze(-1) * patch.prompt_embeddings[number]
            torch.testing.assert_close(plan.edit(block, tokens), expected)
        else:
            assert plan.edit(block, tokens) is tokens


@torch.no_grad()
@pytest.mark.parametrize("sites", [(1, 3), (2, 3), (4,)])
def test_prompts_are_prepended_at_the_first_patched_block_and_travel_on(sites):
    model, count = backbone(depth=5), 4
    settings = Dmp(position="prepend", prompts=count, prompt_sites=",".join(map(str, sites)))
    patch = made(settings, dmp_shape(model.spec, settings))
    plan, c = patch.plan(model.embed_time(T)), model.embed(T, Y)
    prompts, own = torch.empty(3, 0, 16), model.x_embedder(X) + model.pos_embed
    for site, block in enumerate(model.blocks):
        if site in sites:
            number = sites.index(site)
            prompts = routed(plan).gates[number].unsqueeze(-1) * patch.prompt_embeddings[number]
        prompts, own = block(torch.cat([prompts, own], 1), c).split([prompts.shape[1], 16], 1)
    by_hand = model._unpatchify(model.final_layer(own, c))
    torch.testing.assert_close(model.denoise(X, T, Y, plan.edit), by_hand, rtol=0, atol=1e-5)


# ---- sets


@torch.no_grad()
@pytest.mark.parametrize("settings", [Dmp(gate_scale=2.5), Dmp(gate="topk", topk=2), Dmp(gate="uniform"), Dmp(prompt_rank=2)])
def test_a_mixture_of_sets_is_their_weighted_sum(settings):
    """P = scale * sum_e g_e P_e, number by number."""
    patch, tokens = made(settings.model_copy(update={"prompt_sets": 3})), normal(B, N, D, seed=5)
    plan = patch.plan(normal(B, D))
    gates, prompts = routed(plan).gates, patch.all_prompts()
    assert prompts.shape == (L, 3, N, D)
    for site in range(L):
        found = plan.edit(site, tokens) - tokens
        for sample in range(B):
            mixture = sum(float(gates[site, sample, one]) * prompts[site, one] for one in range(3))
            torch.testing.assert_close(found[sample], mixture * (settings.gate_scale or 1), rtol=0, atol=1e-5)


def test_prepended_sets_take_as_many_tokens_as_one_set():
    patch = made(Dmp(position="prepend", prompt_sets=3, prompts=2))
    assert patch.plan(normal(B, D)).edit(0, normal(B, N, D)).shape == (B, N + 2, D)


# ---- rank


@pytest.mark.parametrize("sets", [None, 3])
def test_prompts_of_a_rank_are_a_product_of_that_rank(sets):
    patch = made(Dmp(prompt_rank=2, prompt_sets=sets))
    stack = (L,) if sets is None else (L, sets)
    names = {name: tuple(value.shape) for name, value in patch.state_dict().items() if name.startswith("prompt")}
    assert names == {"prompt_rows": (*stack, N, 2), "prompt_columns": (*stack, 2, D)}
    assert (torch.linalg.matrix_rank(patch.all_prompts()) == 2).all()
    expected = torch.einsum("...nr,...rd->...nd", patch.prompt_rows, patch.prompt_columns)
    torch.testing.assert_close(patch.all_prompts(), expected)


@torch.no_grad()
def test_a_full_patch_factored_is_the_same_patch():
    full, factored = made(Dmp()), made(Dmp(prompt_rank=N))
    left, values, right = torch.linalg.svd(full.prompt_embeddings, full_matrices=False)
    factored.prompt_rows.copy_(left)
    factored.prompt_columns.copy_(values.unsqueeze(-1) * right)
    factored.gate.load_state_dict(full.gate.state_dict())
    c, tokens = normal(B, D), normal(B, N, D, seed=5)
    for site in range(L):
        torch.testing.assert_close(factored.plan(c).edit(site, tokens), full.plan(c).edit(site, tokens), rtol=0, atol=1e-5)


def test_rows_of_a_zero_start_can_move():
    """Columns learn at the first step; were the rows zero too, neither ever would."""
    patch = fresh(Dmp(prompt_rank=2))
    assert not patch.prompt_columns.any()
    patch.plan(normal(B, D)).edit(0, normal(B, N, D)).square().sum().backward()
    assert patch.prompt_columns.grad[0].all()
    assert not patch.prompt_rows.grad.any()


# ---- the start


@pytest.mark.parametrize(
    "extra", [{}, {"prompt_rank": 4}, {"prompt_rank": 1}, {"prompt_sets": 3}, {"prompt_sets": 3, "prompt_rank": 4}]
)
def test_random_prompts_have_a_standard_deviation_of_two_hundredths(extra):
    wide = spec(*[(64, 128)] * 12)
    prompts = fresh(Dmp(prompt_init="random", **extra), wide).all_prompts()
    assert prompts.std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(prompts.mean().item()) < 1e-3
    assert not torch.equal(prompts[0], prompts[1])
    assert not fresh(Dmp(**extra), wide).all_prompts().any()


@pytest.mark.parametrize("extra", [{}, {"prompt_rank": 2}])
def test_random_prompts_do_not_depend_on_the_seed_and_leave_it_alone(extra):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = fresh(Dmp(prompt_init="random", **extra)).all_prompts()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(first, fresh(Dmp(prompt_init="random", **extra)).all_prompts())


def test_factors_are_drawn_apart():
    """A square pair would else be the same numbers twice."""
    patch = fresh(Dmp(prompt_init="random", prompt_rank=D), spec(*[(D, D)] * L))
    rows, columns = patch.prompt_rows * D**0.5, patch.prompt_columns / 0.02
    assert rows.shape == columns.shape
    assert not torch.allclose(rows, columns, atol=1e-3)


# ---- what prompts are, to whoever looks at them

KINDS = [
    Dmp(),
    Dmp(prompt_sites="0,2"),
    Dmp(prompt_rank=2),
    Dmp(prompt_sets=3),
    Dmp(gate="uniform"),
    Dmp(gate="uniform", prompt_sets=3),
]


@torch.no_grad()
@pytest.mark.parametrize("settings", KINDS)
def test_rows_of_prompts_are_what_gate_weights_multiply(settings):
    patch = made(settings)
    plan = patch.plan(normal(B, D))
    for number, block in enumerate(patch.shape.blocks):
        gates, rows = routed(plan).gates[number], patch.prompts_of(number)
        assert rows.shape == (patch.shape.choices, N * D if settings.prompt_sets else D)
        expected = gates @ rows if settings.prompt_sets else gates.unsqueeze(-1) * rows
        edited = plan.edit(block, torch.zeros(B, N, D))
        torch.testing.assert_close(edited, expected.view(B, N, D), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [Dmp(), Dmp(prompt_sets=3, prompt_rank=2), Dmp(gate="uniform"), Dmp(gate_per_site=True), Dmp(gate="hard")]
)
def test_prompts_are_mixed_in_float32_under_autocast(settings):
    patch, c, tokens = made(settings), normal(B, D), normal(B, N, D, seed=3)
    expected = [patch.plan(c).edit(block, tokens) for block in range(L)]
    with torch.autocast("cpu", torch.bfloat16):
        plan = patch.plan(c)
        found = [plan.edit(block, tokens) for block in range(L)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float64), (5, torch.float32), (1, torch.bfloat16), (5, torch.bfloat16)])
def test_the_gated_sum_and_its_gradients_are_those_of_the_formula(rows, dtype):
    """tokens + gates * prompts written out, in the tokens' own format, with gradients by autograd; gates of one row serve all."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 4, 6, generator=generator).to(dtype).requires_grad_()
    gates = torch.rand(rows, 4, generator=generator).requires_grad_()
    prompts = torch.randn(4, 6, generator=generator).requires_grad_()
    weight = torch.randn(5, 4, 6, generator=generator)
    found = gated_edit(PromptShape(1, 4, 6), [gates], [prompts])(0, tokens)
    expected = (tokens.float() + gates.unsqueeze(-1) * prompts).to(dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=2e-2 if dtype == torch.bfloat16 else 1e-6
    )
    inputs = [tokens, gates, prompts]
    one, two = (torch.autograd.grad((out.float() * weight).sum(), inputs, retain_graph=True) for out in (found, expected))
    for mine, theirs in zip(one, two, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cached", [1, 24, 48, 1000])
def test_gradients_of_the_gated_sum_do_not_depend_on_the_parts_they_are_summed_in(cached, monkeypatch):
    """Sample by sample, two at a time with one left over, all at once; and as a GPU takes them: autograd's own."""
    monkeypatch.setattr(prompts_module, "CACHED", cached)
    generator = torch.Generator().manual_seed(0)
    grad, gates, prompts = (torch.randn(*shape, generator=generator) for shape in ((5, 4, 6), (5, 4), (4, 6)))
    inputs = gates.requires_grad_(), prompts.requires_grad_()
    expected = torch.autograd.grad(gates.unsqueeze(-1) * prompts, inputs, grad)
    with torch.no_grad():
        for found in (cached_gradients(grad, gates, prompts), bmm_gradients(grad, gates, prompts)):
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
