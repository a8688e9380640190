"""Whole commands on tiny sizes: what they print, the exact files they leave, and how they follow one another."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmpctl.data.bundled import Digits
from tests.helpers import Done, tree

Cli = Callable[..., Done]
TINY = ("--cpu", "--iters", 6, "--save-every", 3, "--batch-size", 8, "--log-every", 2)
QUICK = ("--eval-images", 80, "--steps", 3, "--sampler", "ddim")
RUN_FILES = {".lock", "config.json", "provenance.json", "metrics.jsonl", "patch.json", "patch.safetensors", "before-after.png"}
CHECKPOINT_FILES = {"patch.json", "patch.safetensors", "trainer.json", "trainer.safetensors"}


def files(root: Path) -> set[str]:
    """Files under a folder, folders left out."""
    return {name for name, kind in tree(root).items() if kind != "folder"}


def colour_digits(folder: Path, count: int = 40) -> Path:
    """Real digits of another size and in colour: 16x16 PNGs, one sub-folder a class."""
    source = Digits()
    for index in range(count):
        image, label = source.item(index)
        grey = Image.fromarray(image[0].numpy()).resize((16, 16), Image.Resampling.BICUBIC)
        tinted = np.stack([np.asarray(grey), np.asarray(grey) // 2, 255 - np.asarray(grey)], axis=2)
        (folder / f"digit-{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(tinted).save(folder / f"digit-{label}" / f"{index:04d}.png")
    return folder


def test_the_main_job_and_what_can_be_asked_of_it_from_another_folder(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    done = cli("patch", *TINY, *QUICK)
    assert done.code == 0, done.err
    run = home / "runs" / "digits"
    checkpoints = {f"checkpoints/step-000000{step}/{name}" for step in (3, 6) for name in CHECKPOINT_FILES}
    assert files(run) == RUN_FILES | checkpoints | {"metrics/comparison-0000006.json"}
    for word in ("backbone", "patched", "difference (paired)", "noise floor", "paired loss", "parameters (+", "before-after.png"):
        assert word in done.out
    assert any(word in done.out for word in ("improved", "no significant change", "worse"))

    monkeypatch.chdir(tmp_path)
    sampled = cli("sample", run, "--num-images", 5)
    assert sampled.code == 0, sampled.err
    (folder,) = (run / "samples").iterdir()
    assert folder.name == "0000006-ddim-3-cfg1"  # the run's own sampler, with no further argument
    assert files(folder) == {*(f"{k:06d}.png" for k in range(5)), "samples.json", "contact-sheet.png"}

    measured = cli("fid", run, "--json")
    assert measured.code == 0, measured.err
    figures = json.loads(measured.out)
    comparison = json.loads((run / "metrics" / "comparison-0000006.json").read_text())
    assert figures["metric"] == "fd-pixels-80"
    assert figures["value"] == pytest.approx(comparison["patched"]["value"], rel=1e-6)

    gates = cli("inspect-gates", run)
    assert gates.code == 0, gates.err
    assert files(run / "gates") == {"0000006.json", "0000006.png"}
    assert [path.name for path in tmp_path.iterdir()] == ["home"]  # nothing was written where we stood


def test_patch_again_says_that_it_is_complete_and_changes_nothing(tmp_path: Path, cli: Cli) -> None:
    run = tmp_path / "run"
    first = cli("patch", "--run", run, *TINY, *QUICK, "--json")
    before = tree(run)
    again = cli("patch", "--run", run, *TINY, *QUICK)
    assert "complete already, at step 6" in again.out
    after = tree(run)
    assert {name for name in before | after if before.get(name) != after.get(name)} <= {".lock"}
    assert json.loads(first.out)["verdict"] in again.out


def test_more_iterations_take_a_run_further(tmp_path: Path, cli: Cli) -> None:
    run = tmp_path / "run"
    assert cli("patch", "--run", run, *TINY, "--no-evaluate").code == 0
    done = cli("patch", "--run", run, *TINY, "--iters", 9, "--no-evaluate")
    assert done.code == 0, done.err
    assert "trained 3 steps" in done.out


@pytest.mark.parametrize("conditional", [False, True], ids=["unconditional", "class-conditional"])
def test_a_folder_of_colour_images_end_to_end(tmp_path: Path, cli: Cli, conditional: bool) -> None:
    data, backbone, run = colour_digits(tmp_path / "images"), tmp_path / "backbone", tmp_path / "patched"
    shape = ("--hidden-size", 16, "--depth", 2, "--num-heads", 2, "--patch-size", 4, "--ema", 0.9)
    labels = ("--class-conditional",) if conditional else ()
    guidance = ("--cfg", 1.5, "--cfg-channels", "all") if conditional else ()
    done = cli("pretrain", "--data", data, "--run", backbone, *shape, *labels, *TINY)
    assert done.code == 0, done.err
    assert {"backbone.safetensors", "backbone.json"} <= files(backbone)

    done = cli("patch", "--base", backbone, "--run", run, *TINY, *guidance, "--eval-images", 20, "--steps", 3)
    assert done.code == 0, done.err  # --data: what the backbone was trained on
    done = cli("sample", run, "--num-images", 3, "--format", "npz")
    assert done.code == 0, done.err
    (npz,) = (run / "samples").rglob("*.npz")
    images = np.load(npz, allow_pickle=False)["arr_0"]
    assert images.dtype == np.uint8
    assert images.shape == (3, 16, 16, 3)
    done = cli("fid", run, "--max-images", 20, "--allow-small", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["reference"]["n"] == 40
    done = cli("fid", npz, "--reference", data, "--extractor", "pixels", "--allow-small", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["n"] == 3
    assert cli("inspect-gates", run).code == 0


def test_dry_run_writes_nothing(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("patch", "--dry-run")
    assert done.code == 0, done.err
    assert "nothing was written" in done.out
    assert not list(tmp_path.iterdir())


def test_dry_run_prints_the_share_that_a_patch_adds_to_a_published_shape(cli: Cli) -> None:
    done = cli("patch", "--base", "DiT-L/2", "--dry-run")
    assert done.code == 0, done.err
    assert "+1.43 %" in done.out
    assert "6,554,112" in done.out


def test_results_alone_go_to_stdout_and_progress_stays_plain(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    done = cli("patch", "--run", tmp_path / "run", *TINY, "--no-evaluate", "--json")
    assert json.loads(done.out)["step"] == 6
    assert "training the patch 6/6" in done.err
    assert "\x1b" not in done.err + done.out
    assert "\r" not in done.err
