"""`dmpctl import` and `dmpctl export`: from a run to other people's formats and back, by whole commands."""

import json
import os
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmpctl.files import read_tensors, sha256_of
from tests.helpers import copied, files, patch_run, tree

GOLDEN = Path(__file__).parents[1] / "golden"
IMAGES = ("--num-images", 3, "--sampler", "ddim", "--steps", 4, "--cpu")


def images(folder: Path) -> dict[str, str]:
    """The hash of each image of a folder."""
    return {path.name: sha256_of(path) for path in sorted(folder.glob("0*.png"))}


def ran(done) -> dict:
    assert done.code == 0, done.err
    value = json.loads(done.out)
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("given", [{}, {"gate": "topk", "topk": 3, "prompt_depth": 1}], ids=["soft", "topk"])
def test_there_and_back_by_every_form_gives_the_same_tensors_and_images(tmp_path, cli, given):
    """run -> dmp-pt -> import, run -> merged, run -> merged -> import, run -> patch: all sample the same images."""
    run = tmp_path / "run"
    patch_run(run, prompt_lr=0.05, gate_lr=0.05, ema=0.0, **given)
    ran(cli("export", run, "--to", "dmp-pt", "--out", tmp_path / "0000006.pt", "--json"))
    ran(cli("import", tmp_path / "0000006.pt", "--run", tmp_path / "back", "--json"))
    ran(cli("export", run, "--to", "merged", "--out", tmp_path / "merged.safetensors", "--json"))
    ran(cli("import", tmp_path / "merged.safetensors", "--run", tmp_path / "apart", "--json"))
    ran(cli("export", run, "--to", "patch", "--out", tmp_path / "alone", "--json"))
    expected = read_tensors(run / "patch.safetensors")[0]
    for name in ("back", "apart", "alone"):
        found = read_tensors(tmp_path / name / "patch.safetensors")[0]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    for number, what in enumerate(("run", "back", "merged.safetensors", "apart", "alone")):
        ran(cli("sample", tmp_path / what, *IMAGES, "--out", tmp_path / f"images-{number}", "--json"))
    first = images(tmp_path / "images-0")
    assert len(first) == 3
    assert all(images(tmp_path / f"images-{number}") == first for number in range(1, 5))
    ran(cli("sample", run, *IMAGES, "--unpatched", "--out", tmp_path / "plain", "--json"))
    assert images(tmp_path / "plain") != first


def test_a_merged_file_is_taken_as_a_run_and_keeps_what_is_made_of_it_beside_it(tmp_path, tmp_path_factory, cli, finished):
    path, finished = tmp_path / "merged.safetensors", copied(finished, tmp_path_factory.mktemp("run") / "run")
    ran(cli("export", finished, "--out", path, "--json"))
    ran(cli("sample", path, *IMAGES, "--json"))
    ran(cli("inspect-gates", path, "--timesteps", 3, "--no-plot", "--json"))
    measure = ("--extractor", "pixels", "--max-images", 80, "--sampler", "ddim", "--steps", 2, "--cpu", "--json")
    found, same = ran(cli("fid", path, *measure)), ran(cli("fid", finished, *measure))
    assert (found["value"], found["reference"]["name"]) == (same["value"], "digits")
    assert found["patch"] == same["patch"]
    made = {name.split("/")[1] for name in files(tmp_path) - {"merged.safetensors"}}
    assert made == {"samples", "gates", "metrics"}
    assert all(name.startswith("merged/") for name in files(tmp_path) - {"merged.safetensors"})
    refused = cli("patch", "--base", path, "--run", tmp_path / "on-top", "--iters", 1)
    assert (refused.code, refused.out) == (2, "")
    assert "a patch fits a backbone alone" in refused.err
    assert f"dmpctl import {path}" in refused.err
    assert not (tmp_path / "on-top").exists()


def test_merged_lora_is_a_backbone_like_any_other(tmp_path, cli):
    run, path = tmp_path / "run", tmp_path / "merged.safetensors"
    patch_run(run, method="lora", rank=2, lr=0.02, ema=0.0)
    ran(cli("export", run, "--out", path, "--json"))
    data = ran(cli("patch", "--base", path, "--run", tmp_path / "on-top", "--iters", 1, "--no-evaluate", "--cpu", "--json"))
    assert data["step"] == 1
    ran(cli("sample", path, *IMAGES, "--json"))
    assert len(list((tmp_path / "merged" / "samples").glob("*-merged-lora/0*.png"))) == 3


def test_golden_weights_through_the_command(tmp_path, cli):
    """A published checkpoint becomes a run: gates, a patch of one's own on its backbone, images."""
    state = load_file(GOLDEN / "class-topk.weights.safetensors")
    config = Namespace(num_heads=4, num_classes=10, topk=0.5, vp_type="add", schedule_name="linear")
    torch.save({"model": state, "ema": state, "opt": {"state": {}}, "config": config}, tmp_path / "0000010.pt")
    data = ran(cli("import", tmp_path / "0000010.pt", "--run", tmp_path / "run", "--json"))
    assert (data["method"]["topk"], data["config"]["num_classes"], data["assumed"]) == (8, 10, [])
    gates = ran(cli("inspect-gates", tmp_path / "run", "--timesteps", 3, "--no-plot", "--json"))
    assert (gates["step"], [site["prompts"] for site in gates["sites"]]) == (10, [16, 16])
    people = cli("import", tmp_path / "0000010.pt", "--run", tmp_path / "run")
    assert people.code == 0
    for words in ("its 'ema' entry", "complete already", "64 wide, 3 blocks, 4 heads", "dmp ("):
        assert words in people.out


def test_a_malicious_checkpoint_ends_with_exit_code_4_and_has_run_nothing(tmp_path, cli):
    marker = tmp_path / "marker"

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch '{marker}'",)

    state = load_file(GOLDEN / "uncond-soft.weights.safetensors")
    torch.save({"model": state, "config": Namespace(topk=Malicious())}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"model": {}, "config": Malicious()}, protocol=2))
    before = tree(tmp_path)
    for name in ("a.pt", "b.pt"):
        done = cli("import", tmp_path / name, "--num-heads", 4, "--run", tmp_path / "run")
        assert (done.code, done.out) == (4, "")
        assert f"{name} holds more than tensors" in done.err or f"{name} is not a readable checkpoint" in done.err
    assert tree(tmp_path) == before
    assert not marker.exists()


@pytest.mark.parametrize(
    ("line", "code", "sentence"),
    [
        (("import", "no.pt"), 3, "there is no weights file"),
        (("import", "bad.pt"), 4, "is not a readable checkpoint"),
        (("import", "bad.safetensors"), 4, "is not a readable safetensors file"),
        (("import",), 2, "dmpctl import needs FILE"),
        (("import", "bad.pt", "--topk", "0"), 2, "--topk takes a whole number of 1 or more"),
        (("export", "nowhere"), 3, "there is no run"),
        (("export",), 2, "dmpctl export needs RUN"),
        (("export", "nowhere", "--to", "onnx"), 2, "--to takes one of patch, merged or dmp-pt, found 'onnx'"),
        (("sample", "bad.safetensors"), 4, "is not a readable safetensors file"),
        (("fid", "bad.safetensors"), 4, "is not a readable safetensors file"),
    ],
)
def test_what_does_not_work_is_one_sentence_and_its_exit_code(tmp_path, monkeypatch, cli, line, code, sentence):
    monkeypatch.chdir(tmp_path)
    for name in ("bad.pt", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
    before = tree(tmp_path)
    done = cli(*line)
    assert (done.code, done.out) == (code, ""), done.err
    assert sentence in done.err
    assert len(done.err.splitlines()) <= 2
    assert tree(tmp_path) == before
