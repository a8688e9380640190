"""Reading weights: our files, other people's, damaged ones and hostile ones."""

import hashlib
import io
import json
import os
import random
import struct
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dmpctl.backbones.dit import PATCH_SIZES, SHAPES, DiT, DiTConfig, shape_config
from dmpctl.backbones.dit_weights import Weights, digest_of, dit_from, dit_metadata, infer_config, read_weights
from dmpctl.errors import DmpError, IntegrityError, MissingError, UsageError
from dmpctl.files import write_tensors
from dmpctl.types import ScheduleSpec

CONFIG = DiTConfig(4, 1, 2, 8, 2, 2, 3)
HEADS = 2
Tensors = dict[str, Tensor]


def random_state(config: DiTConfig = CONFIG, seed: int = 0) -> Tensors:
    """A state dict with random weights and the right position table."""
    model, draw = DiT(config), torch.Generator().manual_seed(seed)
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, generator=draw)
    return model.state_dict()


def save_dit(path: Path, tensors: Tensors, config: DiTConfig, schedule: ScheduleSpec, data: str | None) -> str:
    """Write a backbone that describes itself; returns the file's sha256."""
    return write_tensors(path, tensors, dit_metadata(config, schedule, data))


@pytest.fixture(scope="module")
def state() -> Tensors:
    return random_state()


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def saved(path: Path, value: Any, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


# ---- our own files


@pytest.mark.parametrize("data", [None, "digits"])
@pytest.mark.parametrize("schedule", [ScheduleSpec(), ScheduleSpec("cosine", 400)])
@pytest.mark.parametrize("change", [{}, {"null_class": False}, {"num_classes": 0}, {"learned_sigma": False}])
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


@pytest.mark.parametrize("learned_sigma", [True, False])
@pytest.mark.parametrize("num_classes", [0, 10, 1000])
@pytest.mark.parametrize("name", [f"{shape}/{patch}" for shape in SHAPES for patch in PATCH_SIZES])
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


# ---- PyTorch checkpoints


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt"])
def test_a_bare_state_dict(tmp_path, state, suffix, zipped):
    weights = read_weights(saved(tmp_path / f"a.{suffix}", state, zipped))
    assert same(weights.tensors, state)
    assert (weights.taken, weights.config, weights.schedule, weights.data) == ("the file", None, None, None)
    assert same(dit_from(weights, HEADS).state_dict(), state)


@pytest.mark.parametrize(
    ("wrappers", "expected"),
    [
        (["ema"], "ema"),
        (["model"], "model"),
        (["state_dict"], "state_dict"),
        (["model", "ema"], "ema"),
        (["state_dict", "model"], "model"),
        (["state_dict", "model", "ema"], "ema"),
    ],
)
def test_wrappers_and_which_one_was_taken(tmp_path, wrappers, expected):
    states = {name: random_state(seed=seed) for seed, name in enumerate(wrappers)}
    weights = read_weights(saved(tmp_path / "a.pt", {**states, "step": 7}))
    assert same(weights.tensors, states[expected])
    assert f"'{expected}'" in weights.taken


def test_a_checkpoint_of_the_published_training_script(tmp_path, state):
    """It stores model, average, optimizer and the script's arguments, an argparse.Namespace."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    value = {
        "model": random_state(seed=1),
        "ema": state,
        "opt": optimizer.state_dict(),
        "args": Namespace(model="DiT-B/2", seed=0),
    }
    assert same(read_weights(saved(tmp_path / "a.pt", value)).tensors, state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapper", [None, "ema"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_prefixes_of_wrapped_modules_are_taken_off(tmp_path, state, prefix, wrapper, suffix):
    prefixed = {prefix + name: value for name, value in state.items()}
    path = tmp_path / f"a.{suffix}"
    if suffix == "safetensors":
        save_file(prefixed, path)
    else:
        saved(path, {wrapper: prefixed} if wrapper else prefixed)
    assert same(read_weights(path).tensors, state)


def test_a_prefix_of_some_keys_stays_and_is_refused(tmp_path, state):
    mixed = {("module." if name.startswith("blocks.") else "") + name: value for name, value in state.items()}
    weights = read_weights(saved(tmp_path / "a.pt", mixed))
    assert set(weights.tensors) == set(mixed)
    with pytest.raises(IntegrityError):
        dit_from(weights, HEADS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_precision_make_a_float32_model(tmp_path, state, dtype):
    rounded = {name: value.to(dtype) for name, value in state.items()}
    model = dit_from(read_weights(saved(tmp_path / "a.pt", rounded)), HEADS)
    assert same(model.state_dict(), {name: value.float() for name, value in rounded.items()})


@pytest.mark.parametrize("value", [[], {}, 3, None, torch.ones(2), {"a": 1}, {1: torch.ones(1)}, {"ema": {"decay": 0.9}}, "text"])
def test_what_holds_no_state_dict_is_refused(tmp_path, value):
    with pytest.raises(IntegrityError, match="no state dict"):
        read_weights(saved(tmp_path / "a.pt", value))


# ---- damaged files


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_that_is_not_there(tmp_path, suffix):
    for path in (tmp_path / f"a.{suffix}", tmp_path):
        with pytest.raises(MissingError) as caught:
            read_weights(path)
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("content", [b"", b"not found", b"<html>404</html>\n" * 50, bytes(1000), b"PK\x03\x04", b"\xff" * 64])
def test_what_is_no_weights_file_at_all(tmp_path, suffix, content):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=path.name) as caught:
        read_weights(path)
    assert caught.value.exit_code == 4
    assert "\n" not in caught.value.message


def safetensors_bytes(path: Path, state: Tensors) -> bytes:
    save_dit(path, state, CONFIG, ScheduleSpec(), None)
    return path.read_bytes()


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.2, 0.6, 0.9, 0.999])
def test_truncated_safetensors(tmp_path, state, kept):
    path = tmp_path / "a.safetensors"
    whole = safetensors_bytes(path, state)
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(IntegrityError):
        read_weights(path)


def test_one_flipped_bit_of_the_header_is_refused_or_harmless(tmp_path, state):
    """No flip crashes, and none is taken for another model: what still loads is these very tensors.

    A flip inside the name of the data, or of a default, can go unnoticed here; the sha256 kept with a patch notices it.
    """
    path = tmp_path / "a.safetensors"
    whole = safetensors_bytes(path, state)
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for at in [*range(8), *range(8, header, 23)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            model = dit_from(read_weights(path), HEADS)
        except DmpError:
            refused += 1
        else:
            assert same(model.state_dict(), state)
    assert refused > 100


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_checkpoints_never_crash(tmp_path, state, zipped):
    path, draw = tmp_path / "a.pt", random.Random(0)
    whole = saved(path, state, zipped).read_bytes()
    refused = 0
    for _ in range(150):
        bent = bytearray(whole)
        if draw.random() < 0.3:
            del bent[draw.randrange(len(bent)) :]
        for at in draw.choices(range(min(len(bent), 3000)), k=2) if bent else ():
            bent[at] = draw.randrange(256)
        path.write_bytes(bent)
        try:
            read_weights(path)
        except IntegrityError:
            refused += 1
    assert refused > 50


# ---- hostile files


class Malicious:
    """Unpickling this would create `marker`."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.arguments


CALLS = {
    "open": lambda marker: Malicious(open, marker, "w"),
    "mkdir": lambda marker: Malicious(os.mkdir, marker),
    "system": lambda marker: Malicious(os.system, f"touch '{marker}'"),
    "eval": lambda marker: Malicious(eval, f"open({marker!r}, 'w')"),
    "namespace": lambda marker: Namespace(model="DiT-B/2", hidden=Malicious(os.mkdir, marker)),
}
PLACES = {
    "bare": lambda state, bad: bad,
    "beside": lambda state, bad: {**state, "extra": bad},
    "wrapped": lambda state, bad: {"ema": state, "args": bad},
    "in-ema": lambda state, bad: {"ema": {**state, "extra": bad}},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", CALLS)
def test_a_pickle_runs_no_code(tmp_path, state, call, place, zipped):
    marker = tmp_path / "marker"
    path = saved(tmp_path / "a.pt", PLACES[place](state, CALLS[call](str(marker))), zipped)
    with pytest.raises(IntegrityError, match="holds more than tensors") as caught:
        read_weights(path)
    assert caught.value.exit_code == 4
    assert "safetensors" in str(caught.value.hint)
    assert "\n" not in caught.value.message
    assert not marker.exists()


def test_a_pickle_named_safetensors_runs_no_code(tmp_path):
    marker = tmp_path / "marker"
    with pytest.raises(IntegrityError):
        read_weights(saved(tmp_path / "a.safetensors", CALLS["mkdir"](str(marker))))
    assert not marker.exists()


def test_the_hostile_pickles_are_hostile(tmp_path):
    """Where code may run, each of them does what it threatens: so the tests above can fail."""
    for name, make in CALLS.items():
        marker = tmp_path / name
        buffer = io.BytesIO()
        torch.save(make(str(marker)), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=False)
        assert marker.exists(), name


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
