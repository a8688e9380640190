"""What users do wrong, and what befalls them: one sentence, a hint, the documented exit code, and nothing half-written."""

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from dmpctl.files import read_tensors
from dmpctl.runs import checkpoint
from tests.helpers import Done, colour_folder, copied, digit_folder, files, flip, largest_file, pretrain_run, run_cli, tree

FEW = ("--iters", 4, "--batch-size", 8, "--no-evaluate", "--cpu")


def failed(done: Done, code: int, *parts: str, hint: str | None = "") -> None:
    """One sentence and a hint on stderr, nothing on stdout, no traceback; `hint` None: there is none."""
    assert done.code == code, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    lines = [line for line in done.err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert len(lines) == (1 if hint is None else 2), done.err
    assert done.err.splitlines()[-len(lines) :] == lines
    assert "internal" not in lines[0]
    for part in parts:
        assert part in lines[0]
    if hint is not None:
        assert hint in lines[1]


@pytest.fixture
def run(tmp_path, finished):
    return copied(finished, tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", place], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


# What is named


def test_an_unknown_backbone(tmp_path, cli):
    failed(
        cli("patch", "--base", "digit", "--run", tmp_path / "run", *FEW),
        2,
        "--base digit is no known",
        hint="did you mean digits?",
    )
    assert not (tmp_path / "run").exists()


def test_a_shape_without_weights(tmp_path, cli):
    failed(cli("patch", "--base", "DiT-L/2", "--run", tmp_path / "run", *FEW), 3, "no weights for DiT-L/2", hint="--weights FILE")


def test_a_run_that_is_not_there(tmp_path, cli):
    for command in ("sample", "inspect-gates"):
        failed(cli(command, tmp_path / "nowhere"), 3, "there is no run", hint="dmpctl patch")
    failed(cli("fid", tmp_path / "nowhere"), 3, "is no run, no folder of images and no .npz", hint="runs/digits")


def test_a_run_that_has_not_ended(run, cli):
    (run / "patch.json").unlink()
    for command in ("sample", "inspect-gates", "fid"):
        failed(cli(command, run), 3, "holds no finished patch", hint="end its training")


def test_a_value_out_of_range(tmp_path, cli):
    failed(cli("patch", "--iters", 0, "--run", tmp_path / "run"), 2, "--iters", "1 or more", "0", hint="--iters 1")
    assert not (tmp_path / "run").exists()


def test_an_option_that_is_none(cli):
    failed(cli("patch", "--itres", 5), 2, "--itres", hint="--iters")


# What is read


def test_a_missing_folder(tmp_path, cli):
    failed(cli("patch", "--data", tmp_path / "photos", "--run", tmp_path / "run", *FEW), 3, "there is no folder", hint="--data")
    failed(cli("pretrain", "--data", "./photos", "--run", tmp_path / "run"), 3, "there is no folder", hint="--data")


def test_an_empty_folder(tmp_path, cli):
    (tmp_path / "photos").mkdir()
    failed(cli("patch", "--data", tmp_path / "photos", "--run", tmp_path / "run", *FEW), 2, "no images in", hint="--data")
    assert not (tmp_path / "run").exists()


def test_a_broken_image(tmp_path, cli):
    data = digit_folder(tmp_path / "photos", 3)
    (data / "000001.png").write_bytes((data / "000001.png").read_bytes()[:60])
    failed(cli("patch", "--data", data, "--run", tmp_path / "run", *FEW), 4, "1 of 3 images", "000001.png", hint="--on-bad skip")
    assert cli("patch", "--data", data, "--run", tmp_path / "run", "--on-bad", "skip", *FEW).code == 0


def test_images_of_another_size(tmp_path, cli):
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    Image.new("L", (3, 3)).save(tiny / "a.png")
    failed(cli("patch", "--data", tiny, "--run", tmp_path / "run", *FEW), 4, "too small: 3x3 for size 8")
    failed(
        cli("patch", "--size", 16, "--run", tmp_path / "run", *FEW),
        2,
        "takes 8x8 images, --size says 16",
        hint="leave --size out",
    )
    failed(cli("pretrain", "--data", "digits", "--size", 16), 2, "8x8 pixels only", hint="--size")
    failed(cli("pretrain", "--data", "digits", "--patch-size", 3), 2, "3", hint="divisor")
    assert not (tmp_path / "run").exists()


def test_classes_where_there_are_none(tmp_path, cli):
    data = digit_folder(tmp_path / "photos", 3)
    failed(cli("pretrain", "--data", data, "--class-conditional"), 2, "needs labels", hint="one folder per class")


def test_a_truncated_backbone(tmp_path, cli, conditional):
    base = copied(conditional, tmp_path / "base")
    whole = (base / "backbone.safetensors").read_bytes()
    for damaged in (whole[:-5], whole[:100], b""):
        (base / "backbone.safetensors").write_bytes(damaged)
        failed(
            cli("patch", "--base", base, "--run", tmp_path / "run", *FEW),
            4,
            "not a readable safetensors file",
            hint="copy it again",
        )
    assert not (tmp_path / "run").exists()


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("how", ["torch", "pickle", "wrapped"])
def test_a_malicious_pickle_is_not_run(tmp_path, cli, how):
    mark, path = tmp_path / "ran", tmp_path / "weights.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"x": Bomb(mark)}, protocol=2))
    else:
        bomb = {"ema": {"w": torch.zeros(1), "x": Bomb(mark)}} if how == "wrapped" else {"x": Bomb(mark)}
        torch.save(bomb, path)
    for command in (("patch", "--base", path, "--run", tmp_path / "run"), ("patch", "--base", "DiT-S/2", "--weights", path)):
        failed(cli(*command, *FEW), 4, str(path), "holds more than tensors", hint="safetensors")
    assert not mark.exists()
    assert not (tmp_path / "run").exists()


def test_a_damaged_patch(run, cli):
    flip(run / "patch.safetensors")
    for command in ("sample", "fid", "inspect-gates"):
        failed(cli(command, run), 4, "patch.safetensors is damaged: sha256", "expected", hint="copy the patch again")


def test_a_description_that_is_no_json(run, cli):
    (run / "patch.json").write_text("{")
    failed(cli("sample", run), 4, "patch.json is not valid JSON", hint="bring it back from a copy")


def test_a_damaged_checkpoint(run, cli):
    line = ("patch", "--run", run, *FEW, "--iters", 9, "--prompt-lr", 0.05, "--gate-lr", 0.05, "--ema", 0)
    for path in (run / "checkpoints").iterdir():
        flip(path / "trainer.safetensors")
    failed(cli(*line), 4, "no checkpoint in", "trainer.safetensors is damaged", hint="to begin anew")
    flip(run / "checkpoints" / "step-0000003" / "trainer.safetensors")  # whole again
    again = cli(*line)
    assert again.code == 0
    assert "trainer.safetensors is damaged" in again.err
    assert "going on from step 3" in again.err


def test_a_patch_on_another_backbone(tmp_path, cli, conditional, run):
    base = copied(conditional, tmp_path / "base")
    assert cli("patch", "--base", base, "--run", tmp_path / "other", *FEW).code == 0
    pretrain_run(tmp_path / "new", class_conditional=True, seed=1)  # the same shape, other weights
    for name in ("backbone.safetensors", "backbone.json"):
        shutil.copy(tmp_path / "new" / name, base / name)
    for command in ("sample", "fid", "inspect-gates"):
        failed(cli(command, tmp_path / "other"), 4, "was trained on another backbone: sha256", hint=str(base))
    shutil.rmtree(base)
    failed(cli("sample", tmp_path / "other"), 2, "is no known backbone, no file and no run")


def test_one_of_several_processes_of_a_command_for_one(cli, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for line in (("doctor",), ("compare", "x.toml"), ("download", "--list")):
        failed(cli(*line), 2, "works in one process, 2 were started", hint="start it by itself")


# Where it is written


def test_a_run_of_another_experiment(run, cli):
    before = tree(run)
    other = cli("patch", "--run", run, *FEW, "--prompt-lr", 0.5)
    failed(other, 2, "already uses different settings", "prompt_lr: 0.05 there, 0.5 now", hint="--run")
    failed(cli("pretrain", "--data", "digits", "--run", run), 2, "was made by dmpctl patch, not pretrain", hint="--run")
    assert {name: digest for name, digest in tree(run).items() if name != ".lock"} == {
        n: d for n, d in before.items() if n != ".lock"
    }


def test_a_folder_of_something_else(tmp_path, cli):
    data = digit_folder(tmp_path / "photos", 2)
    before = tree(data)
    failed(cli("patch", "--run", data, *FEW), 2, "is not empty and is no run of dmpctl", hint="--run")
    assert tree(data) == before


def test_a_place_that_cannot_be_written(tmp_path, cli, run):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "run", "/proc/run"):
        failed(cli("patch", "--run", place, *FEW), 2, "cannot write to", hint="name another")
        failed(cli("sample", run, "--out", place, "--steps", 2), 2, "cannot write to", hint="name another")
        failed(cli("inspect-gates", run, "--out", place), 2, "cannot write to", hint="name another")
    failed(cli("patch", "--run", tmp_path / "file", *FEW), 2, "is a file, a run is a folder", hint="--run")


def test_a_read_only_file_system(small_disk, cli, finished):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    failed(cli("patch", "--run", small_disk / "run", *FEW), 2, "cannot write to", "Read-only file system", hint="name another")


def just_too_small(finished, name):
    """A file size in bytes that ends the writing of this file of a checkpoint, and not of the smaller ones before it."""
    return checkpoint.complete(finished / "checkpoints")[-1].joinpath(name).stat().st_size - 1


@pytest.mark.parametrize("name", ["config.json", "patch.safetensors", "trainer.safetensors"])
def test_a_full_disk_in_training(tmp_path, cli, finished, name):
    """At the first file, in a patch, in the trainer's state."""
    with largest_file(100 if name == "config.json" else just_too_small(finished, name)):
        done = cli("patch", "--run", tmp_path / "run", *FEW)
    failed(done, 2, "cannot write to", "File too large", hint="free some space")
    assert not any(name.startswith("checkpoints") for name in files(tmp_path / "run"))
    assert cli("patch", "--run", tmp_path / "run", *FEW).code == 0


def test_a_full_disk_leaves_the_last_checkpoint_good(tmp_path, cli, finished):
    few = ("--batch-size", 8, "--no-evaluate", "--cpu", "--save-every", 2)
    assert cli("patch", "--run", tmp_path / "run", *few, "--iters", 2).code == 0
    before = tree(tmp_path / "run" / "checkpoints")
    with largest_file(just_too_small(finished, "trainer.safetensors")):
        failed(
            cli("patch", "--run", tmp_path / "run", *few, "--iters", 6), 2, "cannot write to", "step-0000004", hint="still good"
        )
    assert tree(tmp_path / "run" / "checkpoints") == before
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "step-0000002").step == 2
    assert cli("sample", tmp_path / "run", "--num-images", 2, "--steps", 2).code == 0
    assert cli("patch", "--run", tmp_path / "run", *few, "--iters", 6).code == 0
    assert cli("patch", "--run", tmp_path / "straight", *few, "--iters", 6).code == 0
    found, expected = (read_tensors(tmp_path / name / "patch.safetensors")[0] for name in ("run", "straight"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_disk_that_is_really_full(small_disk, cli):
    few = ("--run", small_disk / "run", "--batch-size", 8, "--no-evaluate", "--cpu", "--save-every", 1, "--iters", 20)
    done = cli("patch", *few, "--keep-last", 20)
    failed(done, 2, "cannot write to", "No space left on device", hint="free some space")
    kept = checkpoint.complete(small_disk / "run" / "checkpoints")
    assert [checkpoint.load(path).step for path in kept] == list(range(1, len(kept) + 1))
    assert len(kept) > 2
    assert not list(small_disk.rglob("*.tmp"))
    for path in kept[:-1]:  # some space is freed
        shutil.rmtree(path)
    assert cli("patch", *few, "--keep-last", 1).code == 0


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_a_full_disk_while_sampling(run, cli, kind, tmp_path):
    out = tmp_path / "images"
    few = ("--steps", 2, "--num-images", 20, "--format", kind, "--out", out, "--cpu")
    with largest_file(1_000):
        done = cli("sample", run, *few)
    failed(done, 2, "cannot write to", "File too large", hint="free some space")
    assert f"20.{kind}" not in files(out)
    assert cli("sample", run, *few).code == 0


def test_a_process_of_its_own_says_it_in_the_same_way(tmp_path):
    """The sentence, the code and no traceback survive the real entry point."""
    (tmp_path / "photos").mkdir()
    done = run_cli("patch", "--data", tmp_path / "photos", cwd=tmp_path)
    failed(done, 2, "no images in", hint="check --data")
    debugged = run_cli("patch", "--data", tmp_path / "photos", "--debug", cwd=tmp_path)
    assert debugged.code == 2
    assert "Traceback" in debugged.err


def test_a_config_of_the_future(run, cli):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"schema_version": 99}))
    failed(cli("patch", "--run", run, *FEW), 4, "schema_version 99", hint="upgrade dmpctl")


def test_a_config_that_is_none(run, cli):
    (run / "config.json").write_text("{}")
    failed(cli("patch", "--run", run, *FEW), 4, "schema_version None", hint="bring it back from a copy")
    for command in ("sample", "fid"):
        failed(cli(command, run, "--cpu"), 4, "config.json")


def test_numbers_that_are_not_finite(tmp_path, cli):
    done = cli("patch", "--run", tmp_path / "run", *FEW, "--iters", 40, "--prompt-lr", 1e30, "--gate-lr", 1e30)
    failed(done, 5, "not finite 10 steps in a row", "last at step ", hint="lower the learning rates")


def test_offline(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failed(cli("download", "inception", "--offline"), 3, "--offline forbids", hint="online: dmpctl download inception")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    failed(cli("download", "inception"), 3, "--offline forbids", hint="online: dmpctl download inception")
    failed(cli("fid", colour_folder(tmp_path / "big", 2, 32), "--reference", "digits", "--extractor", "pixels"), 2, "8x8")
