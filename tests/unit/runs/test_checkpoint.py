import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from dmpctl import files
from dmpctl.errors import IntegrityError, UsageError
from dmpctl.runs import checkpoint
from dmpctl.runs.records import Description
from tests.helpers import flip, largest_file

FILES = ("patch.safetensors", "patch.json", "trainer.safetensors", "trainer.json")


class Subject:
    """A small module, its optimizer and its average, trained a few steps."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.module[1].bias.requires_grad_(False)  # never trained, so without moments
        self.optimizer = torch.optim.AdamW([p for p in self.module.parameters() if p.requires_grad], lr=0.1)
        self.ema = {name: p.detach().clone() for name, p in self.module.named_parameters() if p.requires_grad}

    def train(self, steps: int) -> "Subject":
        for step in range(steps):
            self.module(torch.full((2, 3), float(step + 1))).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def state(self, step: int = 1) -> checkpoint.TrainerState:
        return checkpoint.capture(step, self.module, self.optimizer, self.ema, {"scale": 2.0})

    def save(self, folder: Path, step: int, keep: int = 9) -> Path:
        weights = dict(self.module.state_dict())
        return checkpoint.save(folder, "patch", weights, Description(schema_version=1), self.state(step), keep)


def test_a_state_comes_back_bit_for_bit(tmp_path):
    trained = Subject().train(3)
    path = trained.save(tmp_path, 3)
    other = Subject(1)
    state = checkpoint.load(path)
    checkpoint.restore(state, other.module, other.optimizer, other.ema)
    assert (state.step, state.scaler) == (3, {"scale": 2.0})
    for one, two in ((trained, other), (trained.train(2), other.train(2))):  # and it trains on in the same way
        assert all(torch.equal(a, b) for a, b in zip(one.module.parameters(), two.module.parameters(), strict=True))
        assert all(torch.equal(one.ema[name], two.ema[name]) for name in one.ema)


def test_a_checkpoint_is_four_files(tmp_path):
    path = Subject().train(1).save(tmp_path, 12)
    assert path == tmp_path / "step-0000012"
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)
    manifest = json.loads((path / "trainer.json").read_text())
    assert manifest["schema_version"] == 1
    assert manifest["sha256"] == {name: files.sha256_of(path / name) for name in FILES[:3]}


def test_only_finished_ones_count_and_in_numeric_order(tmp_path):
    subject = Subject()
    assert checkpoint.complete(tmp_path / "nowhere") == []
    for step in (9999999, 2, 10000000, 10):
        subject.save(tmp_path, step)
    (tmp_path / "step-0000050.tmp").mkdir()
    (tmp_path / "step-0000050.tmp" / "trainer.json").write_text("{}")
    (tmp_path / "step-0000060").mkdir()  # no trainer.json: not finished
    (tmp_path / "step-77").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert [path.name for path in checkpoint.complete(tmp_path)] == [
        "step-0000002",
        "step-0000010",
        "step-9999999",
        "step-10000000",
    ]


def test_the_oldest_go(tmp_path):
    subject = Subject()
    for step in range(1, 6):
        subject.save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000004", "step-0000005"]
    subject.save(tmp_path, 6, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000006"]


@pytest.mark.parametrize("name", FILES[:3])
def test_one_flipped_bit_is_named(tmp_path, name):
    path = Subject().train(1).save(tmp_path, 1)
    flip(path / name)
    with pytest.raises(IntegrityError, match=f"{name} is damaged: sha256 [0-9a-f]{{64}}, expected [0-9a-f]{{64}}") as failure:
        checkpoint.load(path)
    assert str(path) in failure.value.hint


def test_a_damaged_manifest_is_named(tmp_path):
    path = Subject().train(1).save(tmp_path, 1)
    whole = (path / "trainer.json").read_bytes()
    (path / "trainer.json").write_bytes(whole[:-10])
    with pytest.raises(IntegrityError, match=r"trainer\.json is not valid JSON"):
        checkpoint.load(path)
    digest = json.loads(whole)["sha256"]["patch.json"]
    (path / "trainer.json").write_bytes(whole.replace(digest.encode(), digest[::-1].encode()))
    with pytest.raises(IntegrityError, match=r"trainer\.json is damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "change", [(b'"step"', b'"stap"'), (b'"step": 1', b'"step": 3'), (b'"schema_version": 1', b'"schema_version": 0')]
)
def test_a_manifest_vouches_for_itself(tmp_path, change):
    path = Subject().train(1).save(tmp_path, 1)
    whole = (path / "trainer.json").read_bytes()
    assert change[0] in whole
    (path / "trainer.json").write_bytes(whole.replace(*change))
    with pytest.raises(IntegrityError, match=r"trainer\.json"):
        checkpoint.load(path)


def test_a_lost_file_and_a_newer_version_are_named(tmp_path):
    path = Subject().train(1).save(tmp_path, 1)
    manifest = json.loads((path / "trainer.json").read_text())
    (path / "trainer.json").write_text(json.dumps(manifest | {"schema_version": 2}))
    with pytest.raises(IntegrityError, match="schema_version 2"):
        checkpoint.load(path)
    (path / "trainer.json").write_text(json.dumps(manifest))
    (path / "trainer.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"trainer\.safetensors is damaged: sha256 no file"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda raw: raw.pop("0.weight"), "lacks 0.weight"),
        (lambda raw: raw.update(more=torch.zeros(1)), "has unexpected more"),
        (lambda raw: raw.update({"0.bias": torch.zeros(5)}), r"0.bias has shape \[5\], expected \[4\]"),
    ],
)
def test_a_state_of_another_module_is_refused(change, sentence):
    subject = Subject().train(1)
    state = subject.state()
    change(state.raw)
    with pytest.raises(IntegrityError, match=sentence):
        checkpoint.restore(state, subject.module, subject.optimizer, subject.ema)


@pytest.mark.parametrize("cleans", [True, False], ids=["exception", "kill"])
@pytest.mark.parametrize("number", range(5))
def test_a_save_that_is_cut_short_leaves_the_one_before(tmp_path, monkeypatch, number, cleans):
    """Stop at each of the four files, and at the rename; a kill leaves its rubbish, an exception does not."""
    first, second = Subject().train(1), Subject().train(2)
    first.save(tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write, rename, count = files.write_atomic, Path.rename, iter(range(9))

    def write_or_stop(path, data):
        if next(count) == number:
            path.write_bytes(data[: len(data) // 2])
            raise KeyboardInterrupt
        write(path, data)

    def rename_or_stop(self, to):
        if next(count) == number:
            raise KeyboardInterrupt
        return rename(self, to)

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_atomic", write_or_stop)
        patched.setattr(Path, "rename", rename_or_stop)
        if not cleans:
            patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            second.save(tmp_path, 2)
    assert (tmp_path / "step-0000002.tmp").exists() is not cleans
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-0000001"]
    assert all(path.read_bytes() == data for path, data in before.items())
    checkpoint.load(tmp_path / "step-0000001")
    checkpoint.load(second.save(tmp_path, 3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000001", "step-0000003"]  # the rubbish is gone too


def test_a_full_disk_is_a_sentence(tmp_path):
    subject = Subject().train(1)
    subject.save(tmp_path, 1)
    with largest_file(100), pytest.raises(UsageError, match="File too large"):
        subject.save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000001"]


def test_publish_writes_once(tmp_path):
    path = Subject().train(1).save(tmp_path / "checkpoints", 1)
    checkpoint.publish(path, "patch", tmp_path, {"about": "itself"})
    published = tmp_path / "patch.safetensors"
    assert json.loads((tmp_path / "patch.json").read_text())["sha256"] == files.sha256_of(published)
    found, metadata = files.read_tensors(published)
    assert metadata == {"about": "itself"}
    assert set(found) == set(files.read_tensors(path / "patch.safetensors")[0])
    before = [(tmp_path / name).stat().st_mtime_ns for name in ("patch.safetensors", "patch.json")]
    checkpoint.publish(path, "patch", tmp_path, {"about": "itself"})
    assert [(tmp_path / name).stat().st_mtime_ns for name in ("patch.safetensors", "patch.json")] == before


def test_publish_ends_what_was_cut_short(tmp_path):
    path = Subject().train(1).save(tmp_path / "checkpoints", 1)
    checkpoint.publish(path, "patch", tmp_path)
    expected = {name: (tmp_path / name).read_bytes() for name in ("patch.safetensors", "patch.json")}
    (tmp_path / "patch.json").unlink()  # killed between the two
    checkpoint.publish(path, "patch", tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in expected} == expected
