"""Our own files of a DiT, the shape of other people's, which keys fit, and what identifies weights."""

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dmpctl.backbones.dit import DiT, DiTConfig, shape_config
from dmpctl.backbones.dit_weights import Weights, digest_of, dit_from, dit_metadata, read_weights
from dmpctl.backbones.told import infer_config
from dmpctl.errors import IntegrityError, UsageError
from dmpctl.store.shapes import PATCH_SIZES, SHAPES
from dmpctl.types import ScheduleSpec
from tests.unit.backbones.made import CONFIG, HEADS, Tensors, random_state, same, save_dit, saved


@pytest.fixture(scope="module")
def state() -> Tensors:
    return random_state()


# ---- our own files


@pytest.mark.parametrize(
    ("change", "schedule", "data"),
    [
        ({}, ScheduleSpec(), None),
        ({"null_class": False}, ScheduleSpec("cosine", 400), "digits"),
        ({"num_classes": 0}, ScheduleSpec("cosine", 400), None),
        ({"learned_sigma": False}, ScheduleSpec(), "digits"),
    ],
)
def test_a_file_of_ours_describes_itself(tmp_path, change, schedule, data):
    config = replace(CONFIG, **change)
    state, path = random_state(config), tmp_path / "backbone.safetensors"
    assert save_dit(path, state, config, schedule, data) == hashlib.sha256(path.read_bytes()).hexdigest()
    weights = read_weights(path)
    assert (weights.config, weights.schedule, weights.data) == (config, schedule, data)
    assert same(weights.tensors, state)
    model = dit_from(weights)
    assert (model.config, model.schedule) == (config, schedule)
    assert same(model.state_dict(), state)


def test_equal_models_give_equal_files(tmp_path, state):
    backwards = dict(reversed(state.items()))
    first, second = (
        save_dit(tmp_path / f"{i}.safetensors", s, CONFIG, ScheduleSpec(), None) for i, s in enumerate((state, backwards))
    )
    assert first == second


def test_what_a_file_says_of_its_schedule_goes_before_what_the_caller_says(state):
    ours = Weights(state, "the file", CONFIG, ScheduleSpec("cosine", 400))
    assert dit_from(ours, schedule=ScheduleSpec("linear", 10)).schedule == ScheduleSpec("cosine", 400)
    theirs = Weights(state, "the file")
    assert dit_from(theirs, HEADS, ScheduleSpec("cosine")).schedule == ScheduleSpec("cosine")
    assert dit_from(theirs, HEADS).schedule == ScheduleSpec()


def described(path: Path, state: Tensors, change: Callable[[dict[str, Any]], object]) -> Path:
    """One of our files, its description changed."""
    value = json.loads(dit_metadata(CONFIG, ScheduleSpec(), None)["dmpctl.dit"])
    change(value)
    save_file(state, path, {"dmpctl.dit": json.dumps(value)})
    return path


@pytest.mark.parametrize("version", [2, 10, 0, "1", None])
def test_another_schema_version_is_refused(tmp_path, state, version):
    path = described(tmp_path / "a.safetensors", state, lambda value: value.update(schema_version=version))
    with pytest.raises(IntegrityError, match=f"schema_version {version}") as caught:
        read_weights(path)
    assert caught.value.exit_code == 4
    assert caught.value.hint


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.pop("schema_version"),
        lambda value: value.pop("config"),
        lambda value: value.pop("schedule"),
        lambda value: value.pop("data"),
        lambda value: value.update(config=[1]),
        lambda value: value["config"].update(surprise=1),
        lambda value: value["config"].update(hidden_size="8"),
        lambda value: value["config"].update(num_heads=3),
        lambda value: value["config"].update(patch_size=0),
        lambda value: value["config"].update(depth=2.5),
        lambda value: value["schedule"].update(surprise=1),
    ],
)
def test_a_description_that_makes_no_model_is_refused(tmp_path, state, change):
    with pytest.raises(IntegrityError, match="describes itself"):
        read_weights(described(tmp_path / "a.safetensors", state, change))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_a_description_that_is_no_description_is_refused(tmp_path, state, text):
    save_file(state, tmp_path / "a.safetensors", {"dmpctl.dit": text})
    with pytest.raises(IntegrityError, match="describes itself"):
        read_weights(tmp_path / "a.safetensors")


def test_a_description_of_another_model_is_refused(tmp_path, state):
    path = described(tmp_path / "a.safetensors", state, lambda value: value["config"].update(depth=3))
    with pytest.raises(IntegrityError, match=r"blocks\.2\..* is missing"):
        dit_from(read_weights(path))


# ---- the shape of other people's


@pytest.mark.parametrize(
    ("name", "num_classes", "learned_sigma"),
    [
        (f"{shape}/{patch}", (0, 10, 1000)[(n + m) % 3], (n + m) % 2 == 0)
        for n, shape in enumerate(SHAPES)
        for m, patch in enumerate(PATCH_SIZES)
    ],
)
def test_every_published_shape_is_found_from_its_tensors(name, num_classes, learned_sigma):
    config = shape_config(name, 64, num_classes)
    assert config is not None
    config = replace(config, learned_sigma=learned_sigma)
    with torch.device("meta"):
        found = infer_config(DiT(config).state_dict())
    assert found == config


@pytest.mark.parametrize("learned_sigma", [True, False])
@pytest.mark.parametrize(("channels", "patch"), [(1, 1), (1, 2), (2, 2), (4, 1), (4, 2), (3, 4)])
def test_a_learned_variance_shows_in_the_outputs_per_input_channel(channels, patch, learned_sigma):
    """2 channels with a variance and 4 without have the same head; the patch kernel tells them apart."""
    config = DiTConfig(8, channels, patch, 8, 1, HEADS, 0, learned_sigma=learned_sigma)
    assert infer_config(DiT(config).state_dict(), HEADS) == config


def test_a_head_of_another_width_is_refused(state):
    outputs = 3 * CONFIG.channels * CONFIG.patch_size**2
    head = {"final_layer.linear.weight": torch.zeros(outputs, 8), "final_layer.linear.bias": torch.zeros(outputs)}
    with pytest.raises(IntegrityError, match=r"final_layer\.linear"):
        dit_from(Weights(state | head, "the file"), HEADS)


def test_heads_of_an_unknown_width_must_be_named(state):
    with pytest.raises(UsageError, match="width 8") as caught:
        infer_config(state)
    assert caught.value.exit_code == 2
    assert infer_config(state, 4) == replace(CONFIG, num_heads=4)
    with pytest.raises(UsageError, match="multiple of 3"):
        infer_config(state, 3)


def test_named_heads_go_before_those_of_the_published_width():
    with torch.device("meta"):
        wide = DiT(DiTConfig(8, 4, 2, 384, 1, 12, 0)).state_dict()
    assert infer_config(wide).num_heads == 6
    assert infer_config(wide, 12).num_heads == 12


@pytest.mark.parametrize(
    "key", ["x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight", "final_layer.linear.bias", "blocks.0"]
)
def test_what_lacks_a_part_of_a_dit_is_no_dit(state, key):
    less = {name: value for name, value in state.items() if not name.startswith("blocks." if key == "blocks.0" else key)}
    with pytest.raises(IntegrityError, match=key):
        infer_config(less, HEADS)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("x_embedder.proj.weight", (8, 4)),
        ("pos_embed", (4,)),
        ("final_layer.linear.bias", ()),
        ("y_embedder.embedding_table.weight", ()),
    ],
)
def test_tensors_of_other_dimensions_are_no_dit(state, key, shape):
    with pytest.raises(IntegrityError):
        dit_from(Weights(state | {key: torch.zeros(shape)}, "the file"), HEADS)


@pytest.mark.parametrize("name", ["blocks.999999999.norm", "blocks.x.norm", "blocks."])
def test_odd_block_names_are_unexpected_keys_not_more_blocks(state, name):
    with pytest.raises(IntegrityError, match=r"is unexpected \(1 in all\)"):
        dit_from(Weights(state | {name: torch.zeros(1)}, "the file"), HEADS)


def test_a_text_encoder_is_no_dit():
    with pytest.raises(IntegrityError, match="no DiT"):
        dit_from(Weights({"embeddings.weight": torch.zeros(3, 3)}, "the file"))


# ---- keys


@pytest.mark.parametrize("known", [True, False])
def test_missing_unexpected_and_misshapen_keys_are_named(state, known):
    config = CONFIG if known else None

    def refusal(tensors: Tensors) -> str:
        with pytest.raises(IntegrityError) as caught:
            dit_from(Weights(tensors, "the file", config), HEADS)
        assert caught.value.exit_code == 4
        return caught.value.message

    less = {name: value for name, value in state.items() if name != "blocks.1.mlp.fc2.bias"}
    assert "blocks.1.mlp.fc2.bias is missing" in refusal(less)
    assert "(1 in all)" in refusal(less)
    assert "gate.weight is unexpected" in refusal(state | {"gate.weight": torch.zeros(1)})
    bent = state | {"blocks.0.attn.proj.bias": torch.zeros(7)}
    assert "blocks.0.attn.proj.bias has shape [7], expected [8]" in refusal(bent)
    assert "(11 in all)" in refusal({n: v for n, v in state.items() if not n.startswith("blocks.0.")} | {"a": torch.zeros(1)})


# ---- identity


def test_the_digest_is_a_sha256_over_names_types_shapes_and_bytes():
    """Written out once: a patch names its backbone by this, so it may never change."""
    tensors = {"b": torch.tensor([[1.5, -2.0]]), "a": torch.tensor(7), "c": torch.ones(2, dtype=torch.bfloat16)}
    whole = b"a torch.int64 []\n" + struct.pack("<q", 7)
    whole += b"b torch.float32 [1, 2]\n" + struct.pack("<2f", 1.5, -2.0)
    whole += b"c torch.bfloat16 [2]\n" + bytes.fromhex("803f803f")
    assert digest_of(tensors) == hashlib.sha256(whole).hexdigest()


def test_the_digest_changes_with_one_bit_a_name_a_type_or_a_shape(state):
    key = "blocks.1.mlp.fc1.weight"
    flipped = state[key].clone()
    flipped.view(torch.int32).view(-1)[5] ^= 1
    zeros = {"w": torch.zeros(4)}
    others = [
        state | {key: flipped},
        {name + "_" * (name == key): value for name, value in state.items()},
        state | {key: state[key].view(torch.int32)},
        state | {key: state[key].t().contiguous().reshape(state[key].shape)},
        state | {key: state[key].reshape(1, *state[key].shape)},
        {name: value for name, value in state.items() if name != key},
        zeros,
        {"w": torch.zeros(2, 2)},
        {"w": torch.zeros(4, dtype=torch.int32)},
        {"w": torch.tensor([0.0, 0.0, 0.0, -0.0])},
        {},
    ]
    digests = [digest_of(state), *map(digest_of, others)]
    assert len(set(digests)) == len(digests)


def test_the_digest_does_not_change_with_file_or_order(tmp_path, state):
    expected = digest_of(state)
    save_dit(tmp_path / "ours.safetensors", state, CONFIG, ScheduleSpec(), "digits")
    save_file(state, tmp_path / "theirs.safetensors")
    saved(tmp_path / "zip.pt", state)
    saved(tmp_path / "legacy.pt", state, zipped=False)
    saved(tmp_path / "wrapped.pt", {"ema": {f"module.{name}": value for name, value in state.items()}})
    saved(tmp_path / "backwards.pt", dict(reversed(state.items())))
    for path in sorted(tmp_path.iterdir()):
        assert digest_of(read_weights(path).tensors) == expected, path.name
    strided = {name: value.t().contiguous().t() if value.ndim == 2 else value for name, value in state.items()}
    assert digest_of(strided) == expected
    assert digest_of(dit_from(Weights(state, "the file"), HEADS).state_dict()) == expected


def test_the_description_is_stable_json():
    """Sorted, so that equal backbones give equal files."""
    text = dit_metadata(CONFIG, ScheduleSpec(), "digits")["dmpctl.dit"]
    value = json.loads(text)
    assert value == {"schema_version": 1, "config": asdict(CONFIG), "schedule": asdict(ScheduleSpec()), "data": "digits"}
    assert text == json.dumps(value, sort_keys=True)
