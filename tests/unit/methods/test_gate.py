"""The gate against the paper, written slowly; and its other kinds."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmpctl.methods.dmp import DmpPatch, DmpShape
from dmpctl.settings.methods import Dmp
from tests.unit.methods.made import TOPK, B, D, L, N, fresh, made, normal, routed, spec


def slow_gates(patch: DmpPatch, c: Tensor, noise: Tensor | None) -> list[list[list[float]]]:
    """Gates [L][B][N] as the paper writes them, one number at a time: Linear on [c; l], noise, the k best, softmax."""
    weight, bias, w_noise = patch.gate.weight.tolist(), patch.gate.bias.tolist(), patch.w_noise.tolist()
    blocks, prompts, width, kept = patch.shape.sites, patch.shape.choices, patch.shape.width, patch.shape.kept
    gates = [[[0.0] * prompts for _ in c] for _ in range(blocks)]
    for block in range(blocks):
        for sample, vector in enumerate(c.tolist()):
            seen = [*vector, float(patch.shape.blocks[block])]
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


@pytest.mark.parametrize(("kept", "noisy"), [(1, True), (2, False), (5, True), (6, False), (6, True)])
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


@pytest.mark.parametrize("kept", [1, 5])
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


# ---- where the gate is


def test_the_block_index_is_the_backbones_own():
    """Blocks 0 and 2 of three are patched: the second gate has l = 2."""
    patch, c = made(Dmp(prompt_sites="0,2")), normal(B, D)
    gates = routed(patch.plan(c)).gates
    assert gates.shape == (2, B, N)
    torch.testing.assert_close(gates, torch.tensor(slow_gates(patch, c, None)), rtol=0, atol=1e-6)
    everywhere = made(Dmp())
    everywhere.gate.load_state_dict(patch.gate.state_dict())
    torch.testing.assert_close(gates, routed(everywhere.plan(c)).gates[::2])


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("settings", [Dmp(gate_per_site=True), Dmp(gate_per_site=True, gate="topk", topk=2, prompt_sites="1-2")])
def test_a_gate_per_block_sees_c_alone(settings, noisy):
    patch, c = made(settings), normal(B, D, seed=1)
    sites = patch.shape.sites
    noise = normal(B, sites, N, seed=2)
    gates = routed(patch.plan(c, noise if noisy else None)).gates
    assert patch.gate.weight.shape == (sites, N, D)
    assert gates.shape == (sites, B, N)
    for site, weight, bias in zip(range(sites), patch.gate.weight.detach(), patch.gate.bias.detach(), strict=True):
        logits = (weight @ c.T).T + bias
        if noisy:
            logits = logits + noise[:, site] * (F.softplus(c @ patch.w_noise) + 0.01)
        worst = logits.sort(-1).values[:, [N - patch.shape.kept]]
        expected = logits.masked_fill(logits < worst, -torch.inf).softmax(-1)
        torch.testing.assert_close(gates[site], expected, rtol=0, atol=1e-6)


def test_gates_of_different_blocks_share_no_number():
    patch = made(Dmp(gate_per_site=True))
    routed(patch.plan(normal(B, D))).gates[1].square().sum().backward()
    assert [bool(gradient.any()) for gradient in patch.gate.weight.grad] == [False, True, False]
    assert [bool(gradient.any()) for gradient in patch.gate.bias.grad] == [False, True, False]


@pytest.mark.parametrize(
    ("position", "given", "time_only"),
    [
        ("add", None, False),
        ("add", "t", True),
        ("add", "t+y", False),
        ("prepend", None, True),
        ("prepend", "t", True),
        ("prepend", "t+y", False),
    ],
)
def test_what_the_gate_sees(position, given, time_only):
    assert fresh(Dmp(position=position, gate_input=given)).time_only is time_only


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("settings", [Dmp(prompt_sets=3), Dmp(prompt_sets=3, gate="topk", topk=2)])
def test_a_gate_over_sets_is_the_gate_with_as_many_outputs(settings, noisy):
    patch, c, noise = made(settings), normal(B, D, seed=1), normal(B, L, 3, seed=2) if noisy else None
    routing = routed(patch.plan(c, noise))
    assert patch.noise_shape() == (L, 3)
    torch.testing.assert_close(routing.gates, torch.tensor(slow_gates(patch, c, noise)), rtol=0, atol=1e-6)
    assert (routing.load is not None) == (noisy and settings.topk == 2)


# ---- the best alone


@pytest.mark.parametrize("noisy", [False, True])
def test_a_hard_gate_gives_exactly_one_to_the_largest_logit(noisy):
    patch, c, noise = made(Dmp(gate="hard")), normal(B, D, seed=1), normal(B, L, N, seed=2) if noisy else None
    gates = routed(patch.plan(c, noise)).gates
    assert torch.equal(gates, torch.tensor(slow_gates(patch, c, noise)))
    assert gates.argmax(-1).unique().numel() > 1


def test_a_hard_gate_learns_as_a_soft_one():
    """Straight through: the gradient of any function of the gates is what the softmax would hand on."""
    c, noise, weights = normal(B, D, seed=1), normal(B, L, N, seed=2), normal(L, B, N, seed=3)
    patches = made(Dmp(gate="hard")), made(Dmp())
    for patch in patches:
        (routed(patch.plan(c, noise)).gates * weights).sum().backward()
    hard, soft = patches
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(hard.gate, name).grad, getattr(soft.gate, name).grad)
    torch.testing.assert_close(hard.w_noise.grad, soft.w_noise.grad)
    assert hard.gate.weight.grad.any()


def test_only_the_best_prompt_of_a_hard_gate_is_felt_and_learns():
    patch = made(Dmp(gate="hard"))
    plan = patch.plan(normal(1, D))
    best = int(routed(plan).gates[1, 0].argmax())
    edited = plan.edit(1, torch.zeros(1, N, D))
    edited.sum().backward()
    others = torch.arange(N) != best
    assert torch.equal(edited[0, best], patch.prompt_embeddings[1, best])
    assert not edited[0, others].any()
    assert patch.prompt_embeddings.grad[1, best].all()
    assert not patch.prompt_embeddings.grad[1, others].any()


# ---- gates that are not trained

UNTRAINED = [Dmp(gate="uniform"), Dmp(gate="random"), Dmp(gate="uniform", prompt_sets=3), Dmp(gate="random", prompt_sets=3)]


@pytest.mark.parametrize("settings", UNTRAINED)
def test_a_gate_that_is_not_trained_draws_no_noise_and_is_not_balanced(settings):
    patch, c = made(settings), normal(B, D)
    plan = patch.plan(c, normal(B, L, patch.shape.choices))
    assert patch.noise_shape() is None
    assert "w_noise" not in patch.state_dict()
    assert torch.equal(routed(plan).gates, routed(patch.plan(c)).gates)
    assert routed(plan).load is None
    assert patch.penalty(routed(plan)) == {}
    assert [group["name"] for group in patch.param_groups()] == ["prompts"]
    plan.edit(0, torch.zeros(B, N, D)).square().sum().backward()
    assert {name for name, tensor in patch.named_parameters() if tensor.grad is not None} == {"prompt_embeddings"}


@pytest.mark.parametrize("settings", [Dmp(gate="uniform"), Dmp(gate="uniform", prompt_sets=3)])
def test_a_uniform_gate_has_no_numbers(settings):
    patch = made(settings)
    gates = routed(patch.plan(normal(B, D))).gates
    assert gates.shape == (L, B, patch.shape.choices)
    assert torch.equal(gates, torch.full_like(gates, 1 / patch.shape.choices))
    assert set(patch.state_dict()) == {"prompt_embeddings"}


@torch.no_grad()
@pytest.mark.parametrize("sets", [None, 3])
def test_a_uniform_gate_is_a_soft_gate_at_zero(sets):
    patch, soft = made(Dmp(gate="uniform", prompt_sets=sets)), fresh(Dmp(prompt_sets=sets))
    soft.prompt_embeddings.copy_(patch.prompt_embeddings)
    c, tokens = normal(B, D), normal(B, N, D, seed=5)
    torch.testing.assert_close(patch.plan(c).edit(1, tokens), soft.plan(c).edit(1, tokens), rtol=0, atol=1e-6)


def test_logits_of_a_random_gate_vary_by_one_with_the_conditioning():
    width = 256
    patch = fresh(Dmp(gate="random"), spec((64, width)))
    gates = routed(patch.plan(normal(500, width))).gates[0]
    logits = gates.log() - gates.log().mean(-1, keepdim=True)
    assert 0.9 < logits.std(0).mean() < 1.1
    assert patch.gate.weight[:, -1].any()
    assert not patch.gate.bias.any()


def test_a_random_gate_is_always_the_same_and_takes_nothing_from_the_seed():
    torch.manual_seed(0)
    first, state = fresh(Dmp(gate="random", prompt_init="random")), torch.get_rng_state()
    torch.manual_seed(1)
    second = fresh(Dmp(gate="random", prompt_init="random"))
    assert first.gate.weight.any()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_random_gate_is_saved_and_counted_but_not_trained():
    patch = fresh(Dmp(gate="random"))
    assert set(patch.state_dict()) == {"prompt_embeddings", "gate.weight", "gate.bias"}
    assert patch.added == fresh().added
    assert not any(tensor.requires_grad for tensor in patch.gate.parameters())
