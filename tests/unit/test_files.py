import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from dmpctl import files
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import read_json, read_tensors, tensors_to_bytes, write_atomic, write_json, write_tensors

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor(7, dtype=torch.int64),
    "c.weight": torch.full((5,), 0.1, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
}
METADATA = {"z": "1", "a": 'text with " and é', "m": ""}


def turned(mapping):
    return dict(reversed(list(mapping.items())))


def test_equal_content_gives_equal_bytes_whatever_the_order():
    first = tensors_to_bytes(TENSORS, METADATA)
    assert tensors_to_bytes(turned(TENSORS), turned(METADATA)) == first
    assert tensors_to_bytes({name: value.clone() for name, value in TENSORS.items()}, METADATA) == first
    transposed = {**TENSORS, "b": TENSORS["b"].T.contiguous().T}  # same values, another layout in memory
    assert tensors_to_bytes(transposed, METADATA) == first


def test_other_content_gives_other_bytes():
    first = tensors_to_bytes(TENSORS, METADATA)
    assert tensors_to_bytes({**TENSORS, "a": torch.tensor(8)}, METADATA) != first
    assert tensors_to_bytes(TENSORS, {**METADATA, "z": "2"}) != first


@pytest.mark.parametrize("metadata", [METADATA, {}, None])
def test_the_format_is_that_of_safetensors(tmp_path, metadata):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, metadata)
    found = safetensors.torch.load(path.read_bytes())
    assert set(found) == set(TENSORS)
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    with safetensors.safe_open(path, "np") as file:
        assert {key: value for key, value in (file.metadata() or {}).items() if key != files.SEAL} == (metadata or {})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length % 8 == 0  # tensors stay aligned for readers that map the file
    json.loads(path.read_bytes()[8 : 8 + length])


def test_tensors_come_back_with_their_hash(tmp_path):
    path = tmp_path / "x.safetensors"
    digest = write_tensors(path, TENSORS, METADATA)
    assert digest == files.sha256_of(path)
    found, metadata = read_tensors(path)
    assert metadata == METADATA
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())


def test_files_of_others_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"x": np.arange(3.0)}, path, {"made": "elsewhere"})
    found, metadata = read_tensors(path)
    assert found["x"].tolist() == [0, 1, 2]
    assert metadata == {"made": "elsewhere"}


def test_damaged_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(MissingError, match=r"x\.safetensors is not there"):
        read_tensors(path)
    whole = tensors_to_bytes(TENSORS)
    for damaged in (b"", b"\0" * 7, whole[:-1], whole[:20], b"\xff" * len(whole), whole + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="not a readable safetensors file"):
            read_tensors(path)


def raising(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
@pytest.mark.parametrize(("number", "hint"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "another place")])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, step, number, hint):
    path = tmp_path / "x"
    write_atomic(path, b"old")
    owner = {"open": Path, "fsync": os, "replace": Path}[step]
    with monkeypatch.context() as patched:
        patched.setattr(owner, step, raising(number))
        with pytest.raises(UsageError, match=f"cannot write to .*/x: {os.strerror(number)}") as failure:
            write_atomic(path, b"new")
    assert hint in failure.value.hint
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_write_that_is_interrupted_leaves_the_old_file(tmp_path, monkeypatch, stop):
    path = tmp_path / "x"
    write_atomic(path, b"old")

    def interrupt(*_):
        raise stop

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(stop):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write to"):
        write_atomic(tmp_path / "file" / "x", b"new")
    with pytest.raises(UsageError, match="cannot write to"):
        files.make_folder(tmp_path / "file" / "folder")


def test_the_data_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (order.append("replace"), replace(self, to))[1])
    write_atomic(tmp_path / "x", b"new")
    assert order == ["fsync", "replace", "fsync"]


def test_json_comes_back(tmp_path):
    value = {"b": 1, "a": [1.5, None, "é"], "schema_version": 2}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json", 2) == value
    assert list(read_json(tmp_path / "x.json")) == list(value)


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[1]", "should hold a JSON object, found list"),
        (b'{"schema_version": 3}', "has schema_version 3, this dmpctl reads up to 2"),
        (b'{"schema_version": 0}', "has schema_version 0"),
        (b'{"schema_version": "new"}', "has schema_version new"),
        (b"{}", "has schema_version None"),
    ],
)
def test_json_that_cannot_be_used(tmp_path, content, sentence):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=sentence):
        read_json(path, 2)


def test_json_that_is_not_there(tmp_path):
    with pytest.raises(MissingError, match="is not there"):
        read_json(tmp_path / "x.json")
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_json(tmp_path)
