"""DiT: counts, layout, shapes, the edit, the position table and the published initialisation."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dmpctl.backbones.dit import DiT, DiTConfig, shape_config, sincos_table, timestep_features
from dmpctl.errors import UsageError
from dmpctl.store.shapes import PATCH_SIZES, SHAPES
from dmpctl.types import ScheduleSpec

NAMES = [f"{shape}/{patch}" for shape in SHAPES for patch in PATCH_SIZES]
TINY = {
    "pixels": DiTConfig(6, 1, 1, 8, 1, 1, 0),
    "one-token": DiTConfig(4, 3, 4, 16, 2, 4, 0),
    "classes": DiTConfig(8, 4, 2, 16, 3, 2, 10),
    "odd-side": DiTConfig(9, 2, 3, 24, 2, 3, 4),
    "no-null-class": DiTConfig(4, 1, 2, 8, 2, 2, 5, null_class=False),
    "epsilon-only": DiTConfig(8, 3, 2, 12, 2, 3, 0, learned_sigma=False),
    "epsilon-only-classes": DiTConfig(4, 4, 1, 8, 1, 2, 3, learned_sigma=False),
}


def on_meta(config: DiTConfig) -> DiT:
    with torch.device("meta"):
        return DiT(config)


def made(config: DiTConfig, seed: int = 0) -> DiT:
    """A model whose every weight is random, so that no path is dead."""
    model, draw = DiT(config), torch.Generator().manual_seed(seed)
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, std=0.15, generator=draw)
    return model.eval().requires_grad_(False)


def inputs(config: DiTConfig, batch: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.channels, config.input_size, config.input_size, generator=draw)
    cond = torch.arange(batch) % config.label_rows if config.num_classes else None
    return x, torch.tensor([0, 500, 999] * batch)[:batch], cond


@pytest.fixture(params=TINY)
def config(request) -> DiTConfig:
    return TINY[request.param]


# ---- counts and names


@pytest.mark.parametrize(("name", "num_classes"), [(name, (0, 1, 1000)[n % 3]) for n, name in enumerate(NAMES)])
def test_published_shapes_count_the_parameters_of_the_published_layout(name, num_classes):
    config = shape_config(name, 32, num_classes)
    assert config is not None
    model = on_meta(config)
    assert model.spec.parameters == sum(math.prod(shape) for shape in published_layout(config).values()) - model.pos_embed.numel()
    assert model.pos_embed.numel() == config.tokens * config.hidden_size


def test_the_published_675_million_include_the_position_table():
    """Peebles & Xie 2023, table 4: DiT-XL/2 has 675 M parameters; theirs hold the fixed table, and 1000 classes and a null."""
    config = shape_config("DiT-XL/2", 32, 1000)
    assert config is not None
    model, table = on_meta(config), 256 * 1152
    assert model.spec.parameters + table == sum(v.numel() for v in model.state_dict().values()) == 675_129_632
    assert round(model.spec.parameters / 1e6) == 675


@pytest.mark.parametrize(("name", "millions"), [("DiT-S/2", 33), ("DiT-B/2", 130), ("DiT-L/2", 458)])
def test_the_other_published_sizes(name, millions):
    """Peebles & Xie 2023, table 1, class-conditional."""
    config = shape_config(name, 32, 1000)
    assert config is not None
    assert round(on_meta(config).spec.parameters / 1e6) == millions


@pytest.mark.parametrize(("name", "size"), [(name, (32, 64)[n % 2]) for n, name in enumerate(NAMES)])
def test_names_give_the_published_shapes(name, size):
    config = shape_config(name, size, 7)
    assert config is not None
    shape, patch = name.split("/")
    assert (config.hidden_size, config.depth, config.num_heads) == SHAPES[shape]
    assert (config.input_size, config.channels, config.num_classes, config.learned_sigma) == (size, 4, 7, True)
    assert config.tokens == (size // int(patch)) ** 2
    assert math.prod(on_meta(config).pos_embed.shape) == config.tokens * config.hidden_size


@pytest.mark.parametrize(
    "name", ["", "DiT", "DiT-B", "DiT-B/", "DiT-B/3", "DiT-M/2", "dit-b/2", "DiT-B/2/2", " DiT-B/2", "DiT-B/02"]
)
def test_other_names_are_no_shape(name):
    assert shape_config(name) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_size": 9},
        {"hidden_size": 18},
        {"num_heads": 3},
        {"patch_size": 0},
        {"depth": 0},
        {"channels": -1},
        {"num_classes": -1},
        {"hidden_size": "16"},
        {"input_size": 8.0},
    ],
)
def test_sizes_that_make_no_model_are_refused(wrong):
    with pytest.raises(UsageError, match=r"DiT|patches"):
        replace(TINY["classes"], **wrong)


# ---- layout

LAYOUT = {  # of one block, [out, in] in units of D
    "attn.qkv": (3, 1),
    "attn.proj": (1, 1),
    "mlp.fc1": (4, 1),
    "mlp.fc2": (1, 4),
    "adaLN_modulation.1": (6, 1),
}


def published_layout(c: DiTConfig) -> dict[str, tuple[int, ...]]:
    d, p, out = c.hidden_size, c.patch_size, c.channels * (1 + c.learned_sigma) * c.patch_size**2
    layers: dict[str, tuple[int, ...]] = {"x_embedder.proj": (d, c.channels, p, p)}
    layers |= {"t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d)}
    layers |= {f"blocks.{i}.{name}": (rows * d, columns * d) for i in range(c.depth) for name, (rows, columns) in LAYOUT.items()}
    layers |= {"final_layer.linear": (out, d), "final_layer.adaLN_modulation.1": (2 * d, d)}
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    rows = c.num_classes + 1 if c.num_classes and c.null_class else max(c.num_classes, 1)
    return shapes | {"pos_embed": (1, (c.input_size // p) ** 2, d), "y_embedder.embedding_table.weight": (rows, d)}


def test_the_state_dict_is_exactly_the_published_layout(config):
    assert {name: tuple(value.shape) for name, value in DiT(config).state_dict().items()} == published_layout(config)


def test_only_the_position_table_is_a_buffer(config):
    assert [name for name, _ in DiT(config).named_buffers()] == ["pos_embed"]


def test_the_spec_says_what_the_config_does(config):
    spec = DiT(config, ScheduleSpec("cosine", 500)).spec
    assert spec.latent_shape == (config.channels, config.input_size, config.input_size)
    assert [(site.tokens, site.width) for site in spec.sites] == [(config.tokens, config.hidden_size)] * config.depth
    assert (spec.num_classes, spec.learned_sigma) == (config.num_classes, config.learned_sigma)
    assert (spec.schedule.kind, spec.schedule.steps) == ("cosine", 500)
    assert DiT(config).spec.schedule == ScheduleSpec("linear", 1000)


# ---- forward


@pytest.mark.parametrize("batch", [1, 3])
def test_forward_shapes(config, batch):
    model = made(config)
    x, t, cond = inputs(config, batch)
    prediction = model(x, t, cond)
    assert prediction.shape == (batch, config.channels * (1 + config.learned_sigma), config.input_size, config.input_size)
    assert prediction.dtype == torch.float32
    assert prediction.isfinite().all()
    assert model.embed(t, cond).shape == (batch, config.hidden_size)


def test_each_pixel_of_the_prediction_comes_from_its_own_square():
    """A head that copies its token shows how squares are put back: token (row, column), inside row, column, channel."""
    config = DiTConfig(4, 1, 2, 8, 1, 1, 0)
    model = DiT(config).requires_grad_(False)
    squares = torch.arange(4 * 8.0).reshape(1, 4, 8)
    found = model._unpatchify(squares)
    for channel, row, column in np.ndindex(2, 4, 4):
        token, inside = (row // 2) * 2 + column // 2, ((row % 2) * 2 + column % 2) * 2 + channel
        assert found[0, channel, row, column] == squares[0, token, inside]


def test_the_condition_reaches_the_prediction():
    model, (x, t, cond) = made(TINY["classes"]), inputs(TINY["classes"])
    assert cond is not None
    there = model(x, t, cond)
    assert not torch.allclose(there, model(x, t, cond + 1), atol=1e-4)
    assert not torch.allclose(there, model(x, (t + 300) % 1000, cond), atol=1e-4)


def test_the_null_class_is_the_last_row_of_the_label_table():
    model = made(TINY["classes"])
    assert model.spec.null_class == 10
    t, null = torch.tensor([3]), torch.tensor([10])
    torch.testing.assert_close(model.embed(t, null) - model.embed_time(t), model.y_embedder.embedding_table.weight[10:])


def test_an_unconditional_model_adds_its_one_row():
    model, t = made(TINY["pixels"]), torch.tensor([3, 900])
    row = model.y_embedder.embedding_table.weight[0]
    torch.testing.assert_close(model.embed(t, None), model.embed_time(t) + row)
    assert torch.equal(model.embed(t, None), model.embed(t, torch.zeros(2, dtype=torch.int64)))
    assert model.spec.null_class is None


def test_timestep_features_are_cosines_then_sines_of_falling_rates():
    t = torch.tensor([0, 1, 37, 999])
    found = timestep_features(t).double()
    for row, step in enumerate(t.tolist()):
        for i in range(128):
            angle = step * 10000 ** (-i / 128)
            assert abs(found[row, i].item() - math.cos(angle)) < 2e-4  # float32 angles up to 999
            assert abs(found[row, 128 + i].item() - math.sin(angle)) < 2e-4


# ---- the edit


def test_edit_is_called_once_per_block_in_order_with_its_tokens(config):
    model, (x, t, cond) = made(config), inputs(config)
    calls: list[tuple[int, tuple[int, ...]]] = []

    def edit(site: int, tokens: Tensor) -> Tensor:
        calls.append((site, tuple(tokens.shape)))
        return tokens

    edited = model.denoise(x, t, cond, edit)
    assert calls == [(site, (3, config.tokens, config.hidden_size)) for site in range(config.depth)]
    assert torch.equal(edited, model.denoise(x, t, cond))


def test_the_first_edit_sees_patches_and_positions():
    config = TINY["classes"]
    model, (x, t, cond) = made(config), inputs(config)
    seen: list[Tensor] = []
    model.denoise(x, t, cond, lambda site, tokens: (seen.append(tokens), tokens)[1])
    weight = model.x_embedder.proj.weight.flatten(1)  # one matmul per square instead of a convolution
    squares = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(3, 16, -1)
    torch.testing.assert_close(seen[0], squares @ weight.T + model.x_embedder.proj.bias + model.pos_embed)


@pytest.mark.parametrize("edited", [0, 1, 2])
def test_an_edit_of_any_block_changes_the_prediction(edited):
    config = TINY["classes"]
    model, (x, t, cond) = made(config), inputs(config)
    shift = torch.randn(config.tokens, config.hidden_size, generator=torch.Generator().manual_seed(2))
    changed = model.denoise(x, t, cond, lambda site, tokens: tokens + shift if site == edited else tokens)
    assert not torch.allclose(changed, model.denoise(x, t, cond), atol=1e-3)


def test_what_an_edit_returns_is_what_the_block_gets():
    """Editing the input of block l by hand, block after block, is the same as `denoise` with an edit."""
    config = TINY["classes"]
    model, (x, t, cond) = made(config), inputs(config)
    c, tokens = model.embed(t, cond), model.x_embedder(x) + model.pos_embed
    for site, block in enumerate(model.blocks):
        tokens = block(tokens * (1 + site) - 0.5, c)
    by_hand = model._unpatchify(model.final_layer(tokens, c))
    assert torch.equal(by_hand, model.denoise(x, t, cond, lambda site, tokens: tokens * (1 + site) - 0.5))


@pytest.mark.parametrize("count", [1, 5])
def test_prepended_tokens_fall_away(config, count):
    model, (x, t, cond) = made(config), inputs(config)
    widths: list[int] = []

    def prepend(site: int, tokens: Tensor) -> Tensor:
        widths.append(tokens.shape[1])
        return torch.cat([torch.ones(3, count, config.hidden_size), tokens], 1) if site == 0 else tokens

    found, plain = model.denoise(x, t, cond, prepend), model.denoise(x, t, cond)
    assert found.shape == plain.shape
    assert not torch.equal(found, plain)
    assert widths == [config.tokens] + [config.tokens + count] * (config.depth - 1)


def test_tokens_that_are_not_looked_at_change_nothing():
    """With attention switched off, prepended tokens cannot be felt: what comes back are the image's own squares."""
    config = TINY["classes"]
    model, (x, t, cond) = made(config), inputs(config)
    for block in model.blocks:
        block.attn.proj.weight.zero_()
    extra = torch.randn(3, 2, config.hidden_size, generator=torch.Generator().manual_seed(2))
    found = model.denoise(x, t, cond, lambda site, tokens: torch.cat([extra, tokens], 1) if site == 0 else tokens)
    torch.testing.assert_close(found, model.denoise(x, t, cond))


# ---- the position table


@pytest.mark.parametrize(("width", "side"), [(8, 1), (8, 3), (64, 4), (1152, 16)])
def test_position_table_is_written_from_its_definition(width, side):
    """Token (row, column): sin and cos of its column at width / 4 rates, then of its row (He et al. 2022)."""
    quarter = width // 4
    expected = np.zeros((side * side, width))
    for row, column in np.ndindex(side, side):
        for part, at in enumerate((column, row)):
            for i in range(quarter):
                angle = at / 10000 ** (i / quarter)
                expected[row * side + column, (2 * part) * quarter + i] = math.sin(angle)
                expected[row * side + column, (2 * part + 1) * quarter + i] = math.cos(angle)
    np.testing.assert_allclose(sincos_table(width, side).numpy(), expected, rtol=0, atol=1e-7)


def test_position_table_is_diffusers():
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    theirs = get_2d_sincos_pos_embed(32, 6, base_size=6, output_type="pt")
    torch.testing.assert_close(sincos_table(32, 6).double(), theirs.double(), rtol=0, atol=1e-6)


# ---- initialisation


def test_a_fresh_model_predicts_zero_and_every_block_is_the_identity(config):
    model = DiT(config)
    model.initialise(torch.Generator().manual_seed(0))
    x, t, cond = inputs(config)
    assert not model(x, t, cond).any()
    tokens = torch.randn(3, config.tokens, config.hidden_size, generator=torch.Generator().manual_seed(1))
    for block in model.blocks:
        assert torch.equal(block(tokens, model.embed(t, cond)), tokens)


def test_initialisation_is_the_generators_alone(config):
    def fresh(seed: int, state: int) -> dict[str, Tensor]:
        torch.manual_seed(state)
        model = DiT(config)
        model.initialise(torch.Generator().manual_seed(seed))
        return model.state_dict()

    with torch.random.fork_rng(devices=[]):
        one, two, other = fresh(1, 0), fresh(1, 9), fresh(2, 0)
    assert all(torch.equal(one[name], two[name]) for name in one)
    random = {name for name in one if not torch.equal(one[name], other[name])}
    weights = {name for name in one if name.endswith(".weight")}
    assert random == {name for name in weights if "adaLN" not in name and name != "final_layer.linear.weight"}


def test_initialisation_has_the_published_spread():
    """Xavier-uniform linear layers (the patch kernel as one), normal 0.02 label table and timestep layers, zero biases."""
    config = DiTConfig(8, 4, 2, 64, 1, 4, 200)
    model = DiT(config)
    model.initialise(torch.Generator().manual_seed(0))
    state = model.state_dict()
    assert not any(value.any() for name, value in state.items() if name.endswith(".bias"))
    for name, fans in {"blocks.0.attn.qkv": 64 + 192, "blocks.0.mlp.fc1": 64 + 256, "x_embedder.proj": 64 + 16}.items():
        weight, bound = state[f"{name}.weight"], math.sqrt(6 / fans)
        assert weight.abs().max() <= bound
        assert abs(weight.std().item() / (bound / math.sqrt(3)) - 1) < 0.05
    for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
        assert abs(state[f"{name}.weight"].std().item() / 0.02 - 1) < 0.05
