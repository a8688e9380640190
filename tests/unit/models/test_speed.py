"""What makes it faster changes nothing: not a bit (weights in bf16), nor by a graph that breaks (compiled blocks)."""

import copy

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks.bench.timing import saved_bytes
from dmpctl.backbones.pixart import PixArt
from dmpctl.backbones.sd_unet import SdUnet
from dmpctl.errors import UsageError
from dmpctl.files import sha256_of
from dmpctl.models.backbone import freeze, load_backbone
from dmpctl.models.build import build_patch
from dmpctl.models.patch_files import backbone_digest
from dmpctl.models.patched import predict_patched
from dmpctl.models.speed import cast_frozen, compile_blocks, frozen_linears, state_as_cast
from dmpctl.processes.accelerator import allow_tf32
from dmpctl.settings.methods import Dmp
from dmpctl.settings.sections import Base
from tests.foreign_helpers import TOKENS, WIDTH, tiny_pixart, tiny_unet
from tests.helpers import patch_run, settings_for

pytestmark = pytest.mark.usefixtures("fresh_precision")


@pytest.mark.parametrize("given", [{}, {"method": "prompt", "position": "prepend", "prompts": 3}, {"method": "lora", "lr": 1e-2}])
def test_weights_in_bf16_train_the_very_same_patch(tmp_path, given):
    for name, dtype in (("one", "float32"), ("two", "bf16")):
        patch_run(tmp_path / name, precision="bf16", backbone_dtype=dtype, **given)
    assert sha256_of(tmp_path / "one" / "patch.safetensors") == sha256_of(tmp_path / "two" / "patch.safetensors")
    AcceleratorState._reset_state(reset_partial_state=True)
    patch_run(tmp_path / "float32", **given)
    assert sha256_of(tmp_path / "one" / "patch.safetensors") != sha256_of(tmp_path / "float32" / "patch.safetensors")


def test_most_of_a_backbone_is_in_those_layers():
    model = load_backbone(Base()).model
    layers = frozen_linears(model)
    assert {"blocks.0.attn.qkv", "blocks.2.adaLN_modulation.1"} <= set(layers)
    assert not [name for name in layers if not name.startswith("blocks.")]
    held = sum(tensor.numel() for layer in layers.values() for tensor in layer.parameters())
    assert held == sum(p.numel() for name, p in model.named_parameters() if name.startswith("blocks."))


def test_what_becomes_of_the_weights_is_known_before():
    settings = settings_for("patch", backbone_dtype="bf16", precision="bf16")
    model = load_backbone(Base()).model
    before, expected = model.state_dict(), state_as_cast(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    cast_frozen(model, settings)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(value.dtype == found[name].dtype and torch.equal(value, found[name]) for name, value in expected.items())
    assert found["blocks.0.attn.qkv.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "bf16 goes with --precision bf16"),
        ({"precision": "bf16", "method": "full", "lr": 1e-4}, "bf16 is for a frozen backbone, and here it is trained"),
    ],
)
def test_where_it_would_change_something_else_it_is_refused(tmp_path, given, sentence):
    with pytest.raises(UsageError, match=sentence):
        patch_run(tmp_path / "run", **{"backbone_dtype": "bf16", **given})


def test_a_patched_block_is_one_graph():
    """fullgraph=True raises at the first break; nothing of what stands between blocks is compiled."""
    loaded = load_backbone(Base())
    patch = build_patch(loaded.model, Dmp())
    x, t = torch.randn(4, *loaded.spec.latent_shape), torch.tensor([3, 100, 500, 900])
    plain = predict_patched(loaded.model, False, patch, x, t, None)[0]
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in loaded.model.blocks:
        block.compile(fullgraph=True, backend=counting)
    assert torch.equal(predict_patched(loaded.model, False, patch, x, t, None)[0], plain)
    assert len(graphs) == 1  # the blocks are alike


@pytest.mark.parametrize("kind", [PixArt, SdUnet])
def test_a_block_with_a_hook_is_one_graph(kind, monkeypatch):
    """The edit enters by a hook, which stays outside of the graph: another edit compiles nothing anew."""
    model = freeze(kind(tiny_pixart() if kind is PixArt else tiny_unet()))
    patch, text = build_patch(model, Dmp()), torch.rand(3, TOKENS, WIDTH + 1, generator=torch.Generator().manual_seed(0))
    x, t = torch.randn(3, *model.spec.latent_shape), torch.tensor([3, 500, 900])
    for tensor in patch.parameters():
        torch.nn.init.normal_(tensor, std=0.1)
    plain = predict_patched(model, patch.time_only, patch, x, t, text)[0]
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled(function, backend=counting, **options))
    compile_blocks(model, settings_for("patch", compile=True).launch)
    for _ in range(2):
        torch.testing.assert_close(predict_patched(model, patch.time_only, patch, x, t, text)[0], plain, rtol=0, atol=1e-5)
    count = len(graphs)
    assert 1 <= count <= len(model.spec.sites)  # one for each size, and for tokens that lie otherwise in memory
    predict_patched(model, patch.time_only, build_patch(model, Dmp()), x, t, text)
    assert len(graphs) == count


def test_blocks_are_compiled_only_where_that_was_asked_for(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(options))
    model = load_backbone(Base()).model
    compile_blocks(model, settings_for("patch").launch)
    assert compiled == []
    compile_blocks(model, settings_for("patch", compile=True).launch)
    assert compiled == [{"fullgraph": True}] * 3
    assert backbone_digest(load_backbone(Base())) == load_backbone(Base()).digest


def test_tf32_is_a_choice_and_never_deterministic():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for given, expected in (({}, "high"), ({"tf32": False}, "highest"), ({"deterministic": True}, "highest")):
            allow_tf32(settings_for("patch", **given).launch)
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_a_frozen_step_keeps_little_for_its_backward_pass():
    """No input of a frozen linear layer is kept, as its weight has no gradient: at most 0.6 of what a trained backbone keeps."""
    loaded = load_backbone(Base())
    patch = build_patch(loaded.model, Dmp())
    trained = copy.deepcopy(loaded.model).requires_grad_(True)
    x, t = torch.randn(64, *loaded.spec.latent_shape), torch.arange(64) * 15
    noise = torch.randn(64, *patch.noise_shape())
    held = [*loaded.model.parameters(), *loaded.model.buffers(), *trained.parameters(), *trained.buffers(), *patch.parameters()]
    frozen, full = (
        saved_bytes(lambda model=model: predict_patched(model, False, patch, x, t, None, noise), held)
        for model in (loaded.model, trained)
    )
    assert 0 < frozen < 0.6 * full
