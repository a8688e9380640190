"""Full fine-tuning: really everything is trained, and nothing of the original."""

from dataclasses import asdict

import pytest
import torch

from dmpctl.backbones.dit import DiT
from dmpctl.backbones.dit_weights import Weights, digest_of, dit_from
from dmpctl.methods.full import FullPatch
from dmpctl.settings.methods import Full
from tests.unit.methods.made import T, X, Y, backbone, normal

MODELS = {"classes": {}, "classes-without-null": {"null_class": False}, "unconditional": {"num_classes": 0}}


@pytest.fixture(params=MODELS)
def model(request) -> DiT:
    return backbone(**MODELS[request.param])


def labels(model: DiT) -> torch.Tensor | None:
    return None if not model.config.num_classes else Y.clamp(max=model.config.label_rows - 1)


def trained(model: DiT, lr: float = 1e-3) -> FullPatch:
    """After one step on random data."""
    patch = FullPatch(model, Full(lr=lr)).train()
    optimizer = torch.optim.AdamW(patch.param_groups(), weight_decay=0.0)
    made = patch(model.embed(T, labels(model)))
    (made.backbone.denoise(X, T, labels(model), made.edit) - normal(3, 4, 8, 8, seed=9)).square().mean().backward()
    optimizer.step()
    return patch


def test_one_step_changes_every_tensor_and_none_of_the_original(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    patch = trained(model)
    names = {name for name, _ in model.named_parameters()}
    assert {name for name, _ in patch.named_parameters()} == names
    for name, tensor in patch.named_parameters():
        assert tensor.grad is not None, name
        assert not torch.equal(tensor, before[name]), name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in model.parameters())


def test_a_saved_patch_is_a_backbone(model):
    patch = trained(model)
    assert list(patch.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, patch.state_dict()[name]) for name, value in patch.merged().items())
    assert not any(value.requires_grad for value in patch.merged().values())
    plain = dit_from(Weights(patch.state_dict(), "here", model.config, model.schedule), None)
    assert asdict(plain.config) == asdict(model.config)
    y = labels(model)
    assert torch.equal(plain.denoise(X, T, y), patch.plan(model.embed(T, y)).backbone.denoise(X, T, y))


def test_a_fresh_one_has_the_identity_of_its_backbone(model):
    assert digest_of(FullPatch(model, Full()).merged()) == digest_of(model.state_dict())


def test_its_weights_are_in_eval_mode_whatever_the_patch_is():
    """With a layer that training mode would change: a label drop, a dropout."""
    model = backbone()
    model.blocks[1].mlp.add_module("fc2", torch.nn.Sequential(model.blocks[1].mlp.fc2, torch.nn.Dropout(0.5)).eval())
    patch = FullPatch(model.train(), Full())
    model.eval()
    for mode in (True, False):
        assert patch.train(mode) is patch
        assert patch.training is mode
        assert not any(module.training for module in patch.children())
        assert torch.equal(patch.plan(model.embed(T, Y)).backbone.denoise(X, T, Y), model.denoise(X, T, Y))


def test_what_it_adds_is_all_there_is(model):
    assert FullPatch(model, Full()).added == model.spec.parameters == sum(tensor.numel() for tensor in model.parameters())


def test_it_moves_with_its_buffers_and_loads_by_name():
    model = backbone()
    patch, other = FullPatch(model, Full()), backbone()
    patch.to(torch.float64)
    run = patch.plan(model.embed(T, Y)).backbone
    assert {value.dtype for value in run.state_dict().values()} == {torch.float64}
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    with torch.no_grad():
        other.blocks[0].attn.qkv.weight.mul_(2)
    patch.float().load_state_dict(other.state_dict())
    assert torch.equal(run.denoise(X, T, Y), other.denoise(X, T, Y))


def test_its_one_group_has_its_rate():
    (group,) = FullPatch(backbone(), Full(lr=3e-5)).param_groups()
    assert (group["name"], group["lr"]) == ("backbone", 3e-5)
