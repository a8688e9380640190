"""A frozen layer in float8: torchao's numbers, gradients of the layer that it stands for, and nothing kept on the way."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from dmpctl.engine.backbone import load_backbone
from dmpctl.engine.build import build_patch
from dmpctl.engine.fp8 import from_fp8, keep_in_fp8, to_fp8
from dmpctl.engine.patched import predict_patched
from dmpctl.engine.speed import cast_frozen
from dmpctl.files import read_tensors
from dmpctl.settings.methods import Dmp
from dmpctl.settings.sections import Base
from tests.bench.timing import saved_bytes
from tests.helpers import patch_run, settings_for, tensors_of

pytestmark = pytest.mark.usefixtures("fresh_precision")

TORCHAO = Path(__file__).with_name("torchao-fp8.safetensors")
FORMAT = torch.finfo(torch.float8_e4m3fn)


def layer(rows: int = 48, columns: int = 32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(columns, rows, bias=bias).requires_grad_(False)
    made.weight[3] *= 1e4  # rows of other sizes, and one of zeros
    made.weight[4] *= 1e-6
    made.weight[5] = 0
    return made


def test_weights_are_those_of_torchao():
    """The file holds what torchao 0.18 makes of a layer's weight by `quantize_(layer, Float8WeightOnlyConfig())`."""
    theirs, _ = read_tensors(TORCHAO)
    weight, scale = to_fp8(theirs["weight"])
    zeros = ~theirs["weight"].any(1)
    assert zeros.sum() == 1
    assert not from_fp8(weight, scale, torch.float32)[zeros].any()
    assert theirs["dequantized"][zeros].isnan().all()  # a fresh DiT has such rows
    torch.testing.assert_close(scale[~zeros], theirs["scale"][~zeros], rtol=1e-6, atol=0)
    assert torch.equal(weight[~zeros].view(torch.uint8), theirs["qdata"][~zeros].view(torch.uint8))
    torch.testing.assert_close(from_fp8(weight, scale, torch.float32)[~zeros], theirs["dequantized"][~zeros], rtol=1e-6, atol=0)


def test_no_weight_is_further_off_than_half_a_step_of_the_format():
    weight = layer().weight
    found = from_fp8(*to_fp8(weight), torch.float32)
    largest = weight.abs().amax(1, keepdim=True)
    assert ((found - weight).abs() <= weight.abs() * FORMAT.eps / 2 + largest * FORMAT.smallest_normal / FORMAT.max).all()
    assert not torch.equal(found, weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_layer_and_its_gradient_are_those_of_its_weights(bias, autocast):
    """As nn.Linear computes with the same weights, under autocast too."""
    mine = layer(bias=bias)
    plain = copy.deepcopy(mine)
    plain.weight.copy_(from_fp8(*to_fp8(mine.weight), torch.float32))
    keep_in_fp8(mine)
    x = torch.randn(2, 7, 32)
    results = []
    for module in (mine, plain):
        entered = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(entered)
        out.float().square().sum().backward()
        results.append((out, entered.grad))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-2 if autocast else 1e-5, atol=1e-4)


def test_no_weight_is_kept_in_another_format_for_the_backward_pass():
    layers = nn.Sequential(*(layer(64, 64) for _ in range(8)))
    for one in layers:
        keep_in_fp8(one)
    x = torch.randn(2, 64, requires_grad=True)
    held = [*layers.parameters(), *layers.buffers()]
    assert saved_bytes(lambda: layers(x).sum().backward(), held) == 0


def test_a_block_of_such_layers_is_one_graph():
    loaded = load_backbone(Base())
    cast_frozen(loaded.model, settings_for("patch", backbone_dtype="fp8"))
    patch = build_patch(loaded.model, Dmp())
    x, t = torch.randn(4, *loaded.spec.latent_shape), torch.tensor([3, 100, 500, 900])
    plain = predict_patched(loaded.model, False, patch, x, t, None)[0]
    for block in loaded.model.blocks:
        block.compile(fullgraph=True, backend="eager")
    found = predict_patched(loaded.model, False, patch, x, t, None)[0]
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    found.square().mean().backward()
    assert patch.prompt_embeddings.grad.abs().max() > 0


@pytest.mark.parametrize("given", [{}, {"method": "lora", "lr": 1e-3}, {"precision": "bf16"}])
def test_a_patch_is_trained_on_it_and_resumed_to_the_bit(tmp_path, given):
    """Almost the patch of the backbone in float32, but another experiment."""
    run = {"backbone_dtype": "fp8", "iters": 6, "save_every": 3, **given}
    patch_run(tmp_path / "whole", **run)
    patch_run(tmp_path / "parts", **{**run, "iters": 3})
    patch_run(tmp_path / "parts", **run)
    whole, parts = (tensors_of(tmp_path / name / "patch.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    patch_run(tmp_path / "float32", **{**run, "backbone_dtype": "float32"})
    other = tensors_of(tmp_path / "float32" / "patch.safetensors")
    assert not all(torch.equal(value, other[name]) for name, value in whole.items())
