"""Whole commands on tiny sizes: the exact files, the numbers that are known beforehand, and the way from one to the next."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmpctl.files import sha256_of
from tests.helpers import BUNDLED_PATCH, BUNDLED_SPEC, colour_folder, files, run_cli, same_but_time, tree

SHARE = f"(+{100 * BUNDLED_PATCH / BUNDLED_SPEC.parameters:.2f} %)"

PATCH = ("--iters", 6, "--batch-size", 8, "--save-every", 3, "--log-every", 2, "--eval-images", 80, "--steps", 4, "--cpu")
SHAPE = ("--hidden-size", 16, "--depth", 2, "--num-heads", 2, "--batch-size", 8, "--log-every", 2, "--cpu")
CHECKPOINT = {"patch.safetensors", "patch.json", "trainer.safetensors", "trainer.json"}
GATES = {f"gates/0000006{end}" for end in (".json", ".png", "-timesteps.png", ".html")}
RUN = {
    ".lock",
    "config.json",
    "provenance.json",
    "metrics.jsonl",
    "patch.safetensors",
    "patch.json",
    "before-after.png",
    "metrics/comparison-0000006.json",
} | {f"checkpoints/step-000000{step}/{name}" for step in (3, 6) for name in CHECKPOINT}
PNGS = {f"{k:06d}.png" for k in range(64)} | {"samples.json", "contact-sheet.png"}


@pytest.fixture(autouse=True)
def _few_images(most_loss_images):
    most_loss_images(40)


def listed(out: str) -> dict:
    """The one JSON object that --json prints."""
    value = json.loads(out)
    assert isinstance(value, dict)
    return value


def test_from_nothing_to_gates_in_processes_of_their_own(tmp_path):
    """`patch` in an empty folder, then the rest with the run's path alone, from another folder and as a user without a home."""
    for name in ("first", "second", "home", "cache"):
        (tmp_path / name).mkdir()
    env = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    first = run_cli("patch", *PATCH, cwd=tmp_path / "first", env=env)
    assert first.code == 0, first.err
    run = tmp_path / "first" / "runs" / "digits"
    assert files(run) == RUN
    assert "trained 6 steps in" in first.out
    for words in ("backbone", "patched", "difference (paired)", "noise floor", "paired loss", "Fréchet distance: ", SHARE):
        assert words in first.out
    assert "no verdict: a difference takes more than 2 images per feature" in first.out
    assert any(word in first.out for word in ("improved", "no significant change", "worse", "too small a change to name"))
    assert f"patch: {run / 'patch.safetensors'}" in first.out
    assert "\r" not in first.err
    assert "\x1b" not in first.out + first.err

    again = run_cli("patch", *PATCH, "--json", cwd=tmp_path / "first", env=env)
    assert again.code == 0, again.err
    assert listed(again.out)["step"] == 6
    assert files(run) == RUN

    gates = run_cli("inspect-gates", "../first/runs/digits", cwd=tmp_path / "second", env=env)
    assert gates.code == 0, gates.err
    assert files(run) == RUN | GATES
    assert files(tmp_path / "second") == files(tmp_path / "home") == set()
    assert all(name.startswith("dmpctl/") for name in files(tmp_path / "cache"))


def test_patch_sample_fid_and_gates_with_a_path_alone(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    first = cli("patch", *PATCH, "--json")
    assert first.code == 0, first.err
    found = listed(first.out)
    run = Path(found["run"])
    assert run == tmp_path / "runs" / "digits"
    assert (found["step"], found["added_parameters"]) == (6, BUNDLED_PATCH)
    assert found["protocol"]["images"] == 80
    assert found["patch_sha256"] == sha256_of(run / "patch.safetensors")
    assert [line["step"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())] == [2, 4, 6]

    before = tree(run)
    again = cli("patch", *PATCH)
    assert "the run was complete already, at step 6" in again.out
    assert {name: digest for name, digest in tree(run).items() if name != ".lock"} == {
        n: d for n, d in before.items() if n != ".lock"
    }

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli("sample", "../runs/digits").code == 0
    folder = "samples/0000006-ddim-4-cfg1/"  # sampled as the run compared itself
    assert files(run) == RUN | {folder + name for name in PNGS}
    measured = cli("fid", "../runs/digits", "--json")
    assert measured.code == 0, measured.err
    metric = listed(measured.out)
    assert metric["metric"] == "fd-pixels-80"
    recorded = json.loads((run / "metrics" / "comparison-0000006.json").read_text())
    assert metric["value"] == pytest.approx(recorded["patched"]["value"], rel=1e-6)  # the same images, the same number
    assert cli("inspect-gates", "../runs/digits").code == 0
    made = {*GATES, *(f"{folder}{k:06d}.png" for k in range(80))}
    new = files(run) - RUN - {folder + name for name in PNGS} - made
    (record,) = {name for name in new if not name.startswith("metrics/features/")}
    assert re.fullmatch(r"metrics/fd-pixels-80-0000006-ddim-4-cfg1-seed0-[0-9a-f]{8}\.json", record)
    assert {Path(name).name for name in new - {record}} == {"key.json", "seals.npy", "hashes.npy", "features.npy"}
    assert made < files(run)
    assert files(tmp_path / "elsewhere") == set()


def test_a_checkpoint_and_a_moved_run_are_used_like_a_run(tmp_path, cli):
    assert cli("patch", "--run", tmp_path / "run", *PATCH, "--no-evaluate").code == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    for what in ("moved", "moved/checkpoints/step-0000003"):
        assert cli("sample", tmp_path / what, "--num-images", 2, "--steps", 2, "--out", tmp_path / what / "here").code == 0
        assert {"000000.png", "000001.png"} < files(tmp_path / what / "here")
        assert cli("inspect-gates", tmp_path / what, "--no-plot").code == 0


def test_more_steps_go_on_with_the_same_run(tmp_path, cli):
    few = ("--batch-size", 8, "--log-every", 1, "--no-evaluate", "--cpu")
    assert cli("patch", "--run", tmp_path / "run", "--iters", 3, *few).code == 0
    longer = cli("patch", "--run", tmp_path / "run", "--iters", 5, *few, "--json")
    assert listed(longer.out)["step"] == 5
    assert cli("patch", "--run", tmp_path / "whole", "--iters", 5, *few).code == 0
    assert sha256_of(tmp_path / "run" / "patch.safetensors") == sha256_of(tmp_path / "whole" / "patch.safetensors")
    lines = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("run", "whole")
    ]
    assert same_but_time(lines[0]) == same_but_time(lines[1])
    sessions = json.loads((tmp_path / "run" / "provenance.json").read_text())["sessions"]
    assert [session["start_step"] for session in sessions] == [0, 3]


def test_a_backbone_on_colour_images_and_its_patch(tmp_path, monkeypatch, cli):
    """No class, 16x16 in colour: pretrain, patch, sample and fid, with the data named once."""
    data = colour_folder(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    made = cli("pretrain", "--data", "photos", "--iters", 4, "--save-every", 2, "--ema", 0.9, *SHAPE, "--json")
    assert made.code == 0, made.err
    base = tmp_path / "runs" / "pretrain-photos"
    names = {"backbone.safetensors", "backbone.json", "trainer.safetensors", "trainer.json"}
    rest = {".lock", "config.json", "provenance.json", "metrics.jsonl", "backbone.safetensors", "backbone.json"}
    assert files(base) == rest | {f"checkpoints/step-000000{step}/{name}" for step in (2, 4) for name in names}
    found = listed(made.out)
    assert (found["step"], found["images"]) == (4, 60)
    again = cli("pretrain", "--data", "photos", "--iters", 4, "--save-every", 2, "--ema", 0.9, *SHAPE)
    assert "the run was complete already" in again.out

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    few = ("--iters", 4, "--batch-size", 8, "--eval-images", 40, "--sampler", "ddim", "--steps", 3, "--cpu")
    patched = cli("patch", "--base", base, "--run", tmp_path / "run", *few, "--json")  # --data: what the backbone was trained on
    assert patched.code == 0, patched.err
    assert listed(patched.out)["added_parameters"] == 2 * 64 * 16 + 17 * 64 + 64
    assert listed(patched.out)["verdict"] is None  # 768 features, 40 images: too few for a distance, as for `dmpctl fid`
    assert "40 images are too few for 768 features" in listed(patched.out)["no_distance"]
    named = cli("patch", "--base", base, "--data", data, "--run", tmp_path / "named", *few, "--json")
    assert listed(named.out)["patch_sha256"] == listed(patched.out)["patch_sha256"]

    assert cli("sample", tmp_path / "run", "--num-images", 3).code == 0
    with Image.open(tmp_path / "run" / "samples" / "0000004-ddim-3-cfg1" / "000002.png") as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")
    refused = cli("fid", tmp_path / "run")
    assert refused.code == 2
    assert "40 images are too few for 768 features" in refused.err
    for what in (tmp_path / "run", base):
        measured = cli("fid", what, "--allow-small", "--max-images", 40, "--steps", 3, "--json")
        assert measured.code == 0, measured.err
        assert listed(measured.out)["metric"] == "fd-pixels-40"


def test_a_class_conditional_backbone_and_its_patch(tmp_path, cli):
    data = colour_folder(tmp_path / "photos", 80)
    few = ("--iters", 4, "--batch-size", 8, "--steps", 3, "--sampler", "ddim", "--cpu")
    made = cli("pretrain", "--data", data, "--run", tmp_path / "base", "--class-conditional", "--iters", 4, *SHAPE, "--json")
    assert made.code == 0, made.err
    assert listed(made.out)["config"]["num_classes"] == 10
    guided = ("--cfg", 1.5, "--cfg-channels", "all", "--eval-images", 20)
    patched = cli("patch", "--base", tmp_path / "base", "--run", tmp_path / "run", *few, *guided, "--json")
    assert patched.code == 0, patched.err
    assert cli("sample", tmp_path / "run", "--cfg", 1.5, "--num-images", 2).code == 0
    assert files(tmp_path / "run" / "samples" / "0000004-ddim-3-cfg1.5") > {"000000.png", "000001.png"}
    assert cli("sample", tmp_path / "run", "--label", 3, "--num-images", 2, "--out", tmp_path / "threes").code == 0
    images = [np.asarray(Image.open(tmp_path / "threes" / f"00000{k}.png")) for k in range(2)]
    assert not np.array_equal(*images)
    wrong = cli("sample", tmp_path / "run", "--label", 10, "--out", tmp_path / "tens")
    assert (wrong.code, "classes 0 to 9" in wrong.err) == (2, True)
    assert not (tmp_path / "tens").exists()
    assert cli("fid", tmp_path / "run", "--allow-small", "--max-images", 20).code == 0
    assert cli("inspect-gates", tmp_path / "run", "--timesteps", 5).code == 0
    assert cli("sample", tmp_path / "run", "--format", "npz", "--num-images", 30, "--out", tmp_path / "adm").code == 0
    measured = cli("fid", tmp_path / "adm" / "30.npz", "--reference", data, "--allow-small", "--json")
    assert (listed(measured.out)["n"], listed(measured.out)["reference"]["n"]) == (30, 80)


@pytest.mark.parametrize(
    "method", [("--gate", "topk", "--topk", 4), ("--position", "prepend", "--prompts", 3), ("--prompt-depth", 2)]
)
def test_other_shapes_of_the_method(tmp_path, cli, method):
    run = tmp_path / "run"
    assert cli("patch", "--run", run, *PATCH, "--no-evaluate", *method).code == 0
    assert cli("sample", run, "--num-images", 2, "--steps", 2).code == 0
    assert cli("inspect-gates", run, "--timesteps", 5, "--no-plot").code == 0


def test_other_formats_and_samplers(tmp_path, cli):
    run = tmp_path / "run"
    assert cli("patch", "--run", run, *PATCH, "--no-evaluate", "--preset", "dmp", "--iters", 2).code == 0
    assert cli("sample", run, "--format", "npz", "--num-images", 70, "--sampler", "dpm-solver++", "--steps", 3).code == 0
    npz = run / "samples" / "0000002-dpm-solver++-3-cfg1" / "70.npz"
    assert np.load(npz, allow_pickle=False)["arr_0"].shape == (70, 8, 8, 3)
    measured = cli("fid", npz, "--reference", "digits", "--allow-small", "--json")
    assert listed(measured.out)["n"] == 70
    assert cli("sample", run, "--unpatched", "--num-images", 2, "--steps", 2, "--out", tmp_path / "plain").code == 0
    assert "000001.png" in files(tmp_path / "plain")


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    planned = cli("patch", "--dry-run", "--json")
    assert planned.code == 0
    found = listed(planned.out)
    assert (found["ready"], found["images"], found["added_parameters"]) == (True, 1797, BUNDLED_PATCH)
    assert found["run"] == str(tmp_path / "runs" / "digits")
    assert cli("pretrain", "--data", "digits", "--dry-run").code == 0
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        ("DiT-B/2", "(+1.97 %)"),
        ("DiT-L/2", "patch 6,554,112 (+1.43 %)"),
        ("DiT-XL/2", "(+1.27 %)"),
    ],
)
def test_the_published_sizes_by_name(tmp_path, monkeypatch, cli, base, sentence):
    """Ham et al. 2025: what a patch adds to each shape, without any weights."""
    monkeypatch.chdir(tmp_path)
    planned = cli("patch", "--base", base, "--dry-run")
    assert planned.code == 0
    assert sentence in planned.out
    assert "--weights FILE" in planned.out
    assert tree(tmp_path) == {}


def test_results_go_to_stdout_and_talk_to_stderr(tmp_path, cli):
    done = cli("patch", "--run", tmp_path / "run", *PATCH)
    assert "training the patch" in done.err
    assert "training the patch" not in done.out
    quiet = cli("patch", "--run", tmp_path / "quiet", *PATCH, "--quiet", "--no-evaluate")
    assert (quiet.code, quiet.err) == (0, "")
    assert "patch.safetensors" in quiet.out
