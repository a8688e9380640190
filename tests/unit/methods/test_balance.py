"""Shazeer's losses: importance and load."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmpctl.methods.dmp import DmpPatch, DmpShape
from dmpctl.methods.gate import expected_load, per_sample_importance, squared_cv
from dmpctl.settings.methods import Dmp
from dmpctl.types import Routing
from tests.unit.methods.made import B, D, L, N, made, normal, routed


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


@pytest.mark.parametrize(
    ("balance", "topk", "noisy", "names"),
    [
        ("shazeer", 2, True, {"importance", "load"}),
        ("per-sample", 2, True, {"importance", "load"}),
        ("shazeer", 2, False, {"importance"}),
        ("shazeer", N, True, {"importance"}),
        ("per-sample", None, True, {"importance"}),
    ],
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


def test_a_hard_gate_is_balanced_as_the_top_one():
    """Importance counts whom each prompt serves, load who would come under fresh noise; both reach the gate."""
    c, noise = normal(B, D), normal(B, L, N, seed=2)
    hard, top = made(Dmp(gate="hard")), made(Dmp(gate="topk", topk=1))
    found, expected = (patch.penalty(patch.plan(c, noise).routing) for patch in (hard, top))
    torch.testing.assert_close(found, expected)
    found["importance"].backward()
    assert hard.gate.weight.grad.any()


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
        clean = F.linear(seen, patch.gate.weight, patch.gate.bias)
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
