"""PyTorch checkpoints of other people: wrapped, damaged and hostile ones."""

import io
import os
import random
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dmpctl.backbones.dit_weights import dit_from, read_weights
from dmpctl.errors import DmpError, IntegrityError, MissingError
from dmpctl.types import ScheduleSpec
from tests.unit.backbones.made import CONFIG, HEADS, Tensors, random_state, same, save_dit, saved


@pytest.fixture(scope="module")
def state() -> Tensors:
    return random_state()


# ---- PyTorch checkpoints


@pytest.mark.parametrize(("suffix", "zipped"), [("pt", True), ("pth", False), ("bin", True), ("ckpt", False)])
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


@pytest.mark.parametrize(
    ("prefix", "wrapper", "suffix"),
    [
        ("module.", None, "safetensors"),
        ("module.", "ema", "pt"),
        ("_orig_mod.", None, "pt"),
        ("module._orig_mod.", None, "safetensors"),
        ("_orig_mod.module.", "ema", "pt"),
    ],
)
def test_prefixes_of_wrapped_modules_are_taken_off(tmp_path, state, prefix, wrapper, suffix):
    prefixed = {prefix + name: value for name, value in state.items()}
    path = tmp_path / f"a.{suffix}"
    if suffix == "safetensors":
        save_file(prefixed, path)
    else:
        saved(path, {wrapper: prefixed} if wrapper else prefixed)
    assert same(read_weights(path).tensors, state)


def test_a_wrapper_around_some_modules_is_taken_off_inside_of_names(tmp_path, state):
    mixed = {("module." if name.startswith("blocks.") else "") + name: value for name, value in state.items()}
    assert same(read_weights(saved(tmp_path / "a.pt", mixed)).tensors, state)


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


@pytest.mark.parametrize(
    ("call", "place", "zipped"),
    [
        (call, place, (n + m) % 2 == 0)
        for n, call in enumerate(CALLS)
        for m, place in enumerate(PLACES)
        if n == 0 or (n + m) % 4 == 0
    ],
)
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
