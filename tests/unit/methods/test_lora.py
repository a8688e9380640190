"""LoRA against peft's own wrapping, merging, saving and loading, and against W + B·A written out."""

import copy

import peft
import pytest
import torch
from torch import Tensor, nn

from dmpctl.backbones.dit import DiT
from dmpctl.errors import UsageError
from dmpctl.methods.lora import LoraPatch
from dmpctl.settings.methods import Lora
from tests.unit.methods.made import T, X, Y, backbone, normal

ENDS = {"qkv": ["attn.qkv"], "proj": ["attn.proj"], "mlp": ["mlp.fc1", "mlp.fc2"]}
TARGETS = ["qkv", "proj", "mlp", "qkv,proj", "mlp,qkv", "qkv,proj,mlp", "qkv,qkv"]


def ends(settings: Lora) -> list[str]:
    return sorted({end for target in settings.targets.split(",") for end in ENDS[target]})


def targeted(model: DiT, settings: Lora) -> dict[str, nn.Linear]:
    """Target layers by name: those of the blocks, none of the embedders and none of the output layer."""
    names = [f"blocks.{block}.{end}" for block in range(model.config.depth) for end in ends(settings)]
    return {name: model.get_submodule(name) for name in names}


def made(model: DiT, settings: Lora, std: float = 0.3) -> LoraPatch:
    """A patch whose every A and B is random."""
    patch, draw = LoraPatch(model, settings), torch.Generator().manual_seed(7)
    for tensor in patch.parameters():
        nn.init.normal_(tensor, std=std, generator=draw)
    return patch


def wrapped(model: DiT, settings: Lora) -> peft.PeftModel:
    """peft's own way, on a copy of its own."""
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha or settings.rank, target_modules=ends(settings))
    return peft.get_peft_model(copy.deepcopy(model), config)


def run(model: DiT, patch: LoraPatch) -> Tensor:
    return patch.plan(model.embed(T, Y)).backbone.denoise(X, T, Y)


def plain(weights: dict[str, Tensor], like: DiT) -> DiT:
    model = DiT(like.config, like.schedule)
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize(
    ("targets", "rank", "alpha"),
    [("qkv", 4, None), ("proj", 1, 0.5), ("mlp", 8, 16.0), ("qkv,proj,mlp", 4, 16.0), ("qkv,qkv", 4, None)],
)
def test_merged_weights_are_w_plus_b_a_and_predict_the_same(targets, rank, alpha):
    model, settings = backbone(), Lora(rank=rank, alpha=alpha, targets=targets)
    patch = made(model, settings)
    merged, tensors, layers = patch.merged(), patch.state_dict(), targeted(model, settings)
    assert list(merged) == list(model.state_dict())
    for name, value in model.state_dict().items():
        layer = name.removesuffix(".weight")
        expected = value.clone()
        if layer in layers:
            scale = 1.0 if alpha is None else alpha / rank
            expected += scale * tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
            assert not torch.equal(merged[name], value)
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6)
        assert not merged[name].requires_grad
    torch.testing.assert_close(plain(merged, model).denoise(X, T, Y), run(model, patch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [Lora(rank=4), Lora(rank=2, alpha=5.0, targets="mlp"), Lora(targets="qkv,proj,mlp")])
def test_it_is_what_peft_itself_makes_of_the_same_adapters(settings):
    model = backbone()
    patch, theirs = made(model, settings), wrapped(model, settings)
    saved = {f"base_model.model.{name}": value for name, value in patch.state_dict().items()}
    assert set(peft.get_peft_model_state_dict(theirs)) == set(saved)
    found = peft.set_peft_model_state_dict(theirs, saved)
    assert not found.unexpected_keys
    assert not [name for name in found.missing_keys if "lora_" in name]
    with torch.no_grad():
        assert torch.equal(run(model, patch), theirs.get_base_model().denoise(X, T, Y))
    unloaded = theirs.merge_and_unload()
    assert list(unloaded.state_dict()) == list(patch.merged())
    for name, value in unloaded.state_dict().items():
        torch.testing.assert_close(patch.merged()[name], value, rtol=0, atol=1e-6)
    torch.testing.assert_close(run(model, patch).detach(), unloaded.denoise(X, T, Y).detach(), rtol=0, atol=1e-5)


def test_names_are_those_that_peft_saves_for_an_injected_model():
    model = backbone()
    patch = made(model, Lora(rank=4))
    inside = patch.plan(model.embed(T, Y)).backbone
    saved, tensors = peft.get_peft_model_state_dict(inside), patch.state_dict()
    assert list(saved) == list(tensors) == [name for name, _ in patch.named_parameters()]
    assert all(torch.equal(value, tensors[name]) for name, value in saved.items())
    assert tensors["blocks.0.attn.qkv.lora_A.weight"].shape == (4, 16)
    assert tensors["blocks.2.attn.qkv.lora_B.weight"].shape == (48, 4)
    other = LoraPatch(model, Lora(rank=4))
    found = peft.set_peft_model_state_dict(other.plan(model.embed(T, Y)).backbone, tensors)
    assert not found.unexpected_keys
    assert torch.equal(run(model, other), run(model, patch))


@pytest.mark.parametrize("targets", TARGETS)
def test_the_layers_asked_for_are_adapted_and_no_others(targets):
    model, settings = backbone(), Lora(rank=3, targets=targets)
    patch, layers = LoraPatch(model, settings), targeted(model, settings)
    parts = {f"{name}.{part}.weight" for name in layers for part in ("lora_A", "lora_B")}
    assert set(patch.state_dict()) == parts
    assert patch.added == sum(3 * (layer.in_features + layer.out_features) for layer in layers.values())
    assert patch.added == sum(tensor.numel() for tensor in patch.state_dict().values())


def test_putting_adapters_in_leaves_the_backbone_as_it_was():
    model = backbone()
    kinds, before = {name: type(module) for name, module in model.named_modules()}, model.state_dict()
    values, holders = {name: value.clone() for name, value in before.items()}, dict(model.named_parameters())
    prediction, attributes = model.denoise(X, T, Y), set(vars(model))
    patch = made(model, Lora(targets="qkv,proj,mlp"))
    run(model, patch).square().mean().backward()
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert list(model.state_dict()) == list(values)
    assert set(vars(model)) == attributes
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(holders[name] is tensor for name, tensor in model.named_parameters())
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in model.parameters())
    assert all(tensor.grad is not None for tensor in patch.parameters())
    assert torch.equal(model.denoise(X, T, Y), prediction)


def test_no_weight_is_held_twice():
    model = backbone()
    inside = LoraPatch(model, Lora()).plan(model.embed(T, Y)).backbone
    frozen = {name.replace(".base_layer", ""): tensor for name, tensor in inside.named_parameters() if "lora_" not in name}
    assert list(frozen) == [name for name, _ in model.named_parameters()]
    assert all(tensor is frozen[name] for name, tensor in model.named_parameters())


def test_what_moves_or_replaces_a_tensor_of_the_backbone_does_so_under_the_adapters():
    model = backbone()
    patch = made(model, Lora())
    inside = patch.plan(model.embed(T, Y)).backbone
    model.double()
    assert inside.pos_embed is model.pos_embed
    assert inside.pos_embed.dtype == torch.float64
    model.float()
    other = backbone()
    for tensor in other.parameters():
        tensor.mul_(0.5)
    model.load_state_dict(other.state_dict(), assign=True)
    there = LoraPatch(other, Lora())
    there.load_state_dict(patch.state_dict())
    assert torch.equal(run(model, patch), run(other, there))


def test_moving_the_patch_moves_its_adapters_and_no_frozen_weight():
    model = backbone()
    patch = made(model, Lora())
    expected = run(model, patch)
    patch.double()
    assert {value.dtype for value in patch.state_dict().values()} == {torch.float64}
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(run(model, patch), expected, rtol=0, atol=1e-5)


def test_adapters_are_float32_over_any_backbone():
    model = backbone().bfloat16()
    patch = made(model, Lora())
    assert {value.dtype for value in patch.state_dict().values()} == {torch.float32}
    assert {value.dtype for value in patch.merged().values()} == {torch.bfloat16}


def test_every_fresh_one_is_alike_and_global_randomness_goes_on():
    model = backbone()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = LoraPatch(model, Lora()).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    two = LoraPatch(model, Lora()).state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    firsts = [value for name, value in one.items() if "lora_A" in name]
    assert all(value.any() == ("lora_A" in name) for name, value in one.items())
    assert not torch.equal(firsts[0], firsts[2])


def test_gradients_are_those_of_w_plus_b_a():
    """Gradients of A and B against those through one matrix W + B·A."""
    model, settings = backbone(), Lora(rank=2, alpha=3.0, targets="qkv")
    patch, target = made(model, settings), normal(3, 4, 8, 8, seed=9)
    (run(model, patch) - target).square().mean().backward()
    dense = backbone()
    parts = {name: value.detach().clone().requires_grad_() for name, value in patch.named_parameters()}
    weights = dense.state_dict() | {
        f"{name}.weight": layer.weight + 1.5 * parts[f"{name}.lora_B.weight"] @ parts[f"{name}.lora_A.weight"]
        for name, layer in targeted(dense, settings).items()
    }
    (torch.func.functional_call(dense, weights, (X, T, Y)) - target).square().mean().backward()
    for name, tensor in patch.named_parameters():
        torch.testing.assert_close(tensor.grad, parts[name].grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("targets", "most"), [("qkv", 16), ("proj", 16), ("qkv,proj,mlp", 16)])
def test_a_rank_over_the_smaller_side_of_a_layer_is_refused(targets, most):
    LoraPatch(backbone(), Lora(rank=most, targets=targets))
    with pytest.raises(UsageError, match=rf"--rank {most + 1} is more than blocks\.0\.") as failure:
        LoraPatch(backbone(), Lora(rank=most + 1, targets=targets))
    assert failure.value.hint == f"use --rank {most} or less"


def test_its_one_group_has_its_rate():
    (group,) = LoraPatch(backbone(), Lora(lr=3e-5)).param_groups()
    assert (group["name"], group["lr"]) == ("lora", 3e-5)
