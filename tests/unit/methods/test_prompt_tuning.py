"""Prompt tuning: DMP without a gate, bit for bit."""

import pytest
import torch
from torch import Tensor, nn

from dmpctl.methods.dmp import DmpPatch, dmp_shape
from dmpctl.methods.prompt_tuning import PromptPatch
from dmpctl.methods.prompts import prompt_shape
from dmpctl.settings.methods import Dmp, PromptTuning
from dmpctl.types import BackboneSpec
from tests.unit.methods.made import SPEC, B, D, L, N, T, X, Y, backbone, normal, spec


def tuned(of: BackboneSpec = SPEC, **given: object) -> PromptPatch:
    settings = PromptTuning(**given)  # type: ignore[arg-type]
    return PromptPatch(prompt_shape(of, settings), settings)


def ungated(of: BackboneSpec, count: int, **given: object) -> DmpPatch:
    """DMP with all weights alike and a scale that undoes them."""
    settings = Dmp(gate="uniform", gate_scale=count, **given)  # type: ignore[arg-type]
    return DmpPatch(dmp_shape(of, settings), settings)


def randomise(patch: nn.Module) -> None:
    for tensor in patch.parameters():
        nn.init.normal_(tensor, std=0.5, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(("count", "position"), [(1, "prepend"), (6, "add"), (41, "add"), (49, "prepend"), (256, "add")])
def test_it_is_dmp_with_a_uniform_gate_of_scale_n(count, position):
    """Also for N whose float 1 / N times N is not 1, such as 41 and 49."""
    tokens, weights, sites = normal(B, count, D, seed=1), normal(B, 2 * count, D, seed=2), spec(*[(count, D)] * L)
    edited, gradients = list[list[Tensor]](), list[Tensor]()
    for patch in (tuned(sites, position=position), ungated(sites, count, position=position)):
        randomise(patch)
        plan = patch.plan(normal(B, D))
        found = [plan.edit(0, tokens), *(plan.edit(site, tokens) for site in range(1, L))]
        sum((one * weights[:, : one.shape[1]]).sum() for one in found).backward()
        edited.append(found)
        gradients.append(patch.prompt_embeddings.grad)
    assert all(torch.equal(one, other) for one, other in zip(*edited, strict=True))
    assert torch.equal(*gradients)
    assert gradients[0].all()


@pytest.mark.parametrize("given", [{}, {"position": "prepend", "prompts": 5}, {"prompt_sites": "0,2", "prompt_init": "random"}])
def test_training_it_is_training_dmp_with_a_uniform_gate(given):
    model, trained = backbone(), list[Tensor]()
    count = given.get("prompts", 16)
    for patch in (tuned(model.spec, **given), ungated(model.spec, count, **given)):
        optimizer = torch.optim.AdamW(patch.param_groups(), weight_decay=0.0)
        for step in range(3):
            plan = patch.plan(model.embed(T, Y))
            optimizer.zero_grad()
            (model.denoise(X, T, Y, plan.edit) - normal(3, 4, 8, 8, seed=step)).square().mean().backward()
            optimizer.step()
        trained.append(patch.prompt_embeddings.detach())
    assert torch.equal(*trained)
    assert trained[0].flatten(1).any(-1).all()


def test_prompts_pass_unchanged():
    patch = tuned()
    randomise(patch)
    edited = patch.plan(normal(B, D)).edit(1, torch.zeros(B, N, D))
    assert torch.equal(edited, patch.prompt_embeddings[1].expand(B, -1, -1))
    assert torch.equal(patch.prompts_of(1), patch.prompt_embeddings[1])


def test_a_zero_patch_is_its_backbone_bit_for_bit():
    model = backbone()
    plan = tuned(model.spec).plan(model.embed(T, Y))
    assert torch.equal(model.denoise(X, T, Y, plan.edit), model.denoise(X, T, Y))


def test_neither_conditioning_nor_noise_has_a_part():
    patch, tokens = tuned(prompt_init="random"), normal(B, N, D)
    found = [patch(c, noise).edit(0, tokens) for c, noise in ((normal(B, D), None), (normal(B, D, seed=1), normal(B, L, N)))]
    assert torch.equal(*found)
    assert not torch.equal(found[0], tokens)
    assert (patch.time_only, patch.noise_shape(), patch.merged(), patch.penalty(None)) == (False, None, None, {})
    assert patch.plan(normal(B, D)).routing is None


def test_under_bfloat16_tokens_stay_what_they_are():
    patch = tuned(prompt_init="random")
    with torch.autocast("cpu", torch.bfloat16):
        assert patch.plan(normal(B, D).bfloat16()).edit(0, normal(B, N, D).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("given", "added"), [({}, L * N * D), ({"prompt_depth": 2}, 2 * N * D), ({"prompt_sites": "2"}, N * D)])
def test_what_it_adds_and_trains(given, added):
    patch = tuned(**given, prompt_lr=3e-4)
    ((name, tensor),) = patch.named_parameters()
    (group,) = patch.param_groups()
    assert (name, tensor.numel()) == ("prompt_embeddings", added)
    assert patch.added == added
    assert (group["name"], group["lr"], len(group["params"])) == ("prompts", 3e-4, 1)
    assert group["params"][0] is tensor
