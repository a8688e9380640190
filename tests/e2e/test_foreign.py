"""Captions and other people's networks from end to end: pretrain, patch, sample, fid and inspect-gates on tiny random models."""

import json
import shutil

import datasets
import pytest
import torch

from dmpctl.runs import checkpoint
from dmpctl.sampling.pictures import read_png
from tests.foreign_helpers import pipeline, tiny_clip, tiny_clip_model, tiny_dit, tiny_pixart, tiny_unet
from tests.helpers import colour_folder, copied, files, run_cli, same_but_time, tensors_of
from tests.latent_helpers import tiny_vae
from tests.standin import Repository, running
from tests.unit.data.made import write_parquet

TRAIN = ("--iters", 4, "--batch-size", 8, "--log-every", 1, "--save-every", 2, "--cpu")
FAST = ("--sampler", "ddim", "--steps", 2, "--cpu")
KINDS = {"dit": (tiny_dit, "linear", False), "pixart": (tiny_pixart, None, True), "sd": (tiny_unet, "scaled_linear", True)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pipelines by kind, five classes of colour images, and an encoder of captions. Not to be written to."""
    root = tmp_path_factory.mktemp("foreign")
    for name, (model, schedule, text) in KINDS.items():
        tiny_vae(pipeline(root / name, model(), schedule, text) / "vae")
    colour_folder(root / "images", 60)
    for number in range(5, 10):
        shutil.rmtree(root / "images" / f"class{number}")
    tiny_clip(root / "encoder")
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def patched(cli, made, run, kind, *more):
    return cli("patch", "--base", made / kind, "--data", made / "images", "--run", run, *TRAIN, *more)


@pytest.mark.parametrize("kind", KINDS)
def test_patch_sample_fid_and_gates(cli, made, tmp_path, kind):
    run, base = tmp_path / "run", files(made / kind)
    done = patched(cli, made, run, kind, *FAST[:4], "--eval-images", 8)
    assert done.code == 0, done.err
    assert files(made / kind) == base  # nothing is written into what was given
    about = json.loads((run / "patch.json").read_text())
    assert about["backbone"]["base"] == str(made / kind)
    assert ("text" in about) == KINDS[kind][2]
    assert (run / "before-after.png").is_file()

    one = cli("sample", run, "--num-images", 4, *FAST, "--cfg", 2, "--out", tmp_path / "four")
    assert one.code == 0, one.err
    few = cli("sample", run, "--num-images", 2, *FAST, "--cfg", 2, "--sample-batch", 1, "--out", tmp_path / "two")
    assert few.code == 0, few.err
    for k in range(2):  # image k depends on (seed, k) alone
        name = f"{k:06d}.png"
        two, four = (read_png(tmp_path / out / name).int() for out in ("two", "four"))
        assert (two - four).abs().max() <= 1

    measured = cli("fid", run, "--max-images", 12, "--allow-small", *FAST, "--versus", "backbone", "--json")
    assert measured.code == 0, measured.err
    record = json.loads(measured.out)
    assert record["n"] == 12
    assert ("prompts" in record) == KINDS[kind][2]
    gates = cli("inspect-gates", run, "--timesteps", 5, "--json")
    assert gates.code == 0, gates.err
    found = json.loads(gates.out)
    assert [site["site"] for site in found["sites"]] == list(range(4 if kind == "sd" else 2))
    assert [site["prompts"] for site in found["sites"]] == ([64, 16, 64, 64] if kind == "sd" else [16, 16])
    assert "uniform: the gate has not learned" in found["judgement"][0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_patch_makes_the_images_of_its_backbone(cli, made, tmp_path, kind):
    """At a learning rate that is nothing the prompts stay zero: bit for bit the same pictures."""
    run = tmp_path / "run"
    assert patched(cli, made, run, kind, "--no-evaluate", "--prompt-lr", "1e-30", "--gate-lr", "1e-30").code == 0
    for out, more in (("patched", ()), ("plain", ("--unpatched",))):
        assert cli("sample", run, "--num-images", 3, *FAST, "--out", tmp_path / out, *more).code == 0
    pictures = [sorted((tmp_path / out).glob("0*.png")) for out in ("patched", "plain")]
    assert len(pictures[0]) == 3
    assert all(torch.equal(read_png(one), read_png(other)) for one, other in zip(*pictures, strict=True))


@pytest.mark.parametrize("kind", ["pixart", "sd"])
def test_resumed_is_uninterrupted(cli, made, tmp_path, kind):
    rates = ("--prompt-lr", "0.01", "--no-evaluate")
    assert patched(cli, made, tmp_path / "straight", kind, *rates).code == 0
    assert patched(cli, made, tmp_path / "run", kind, *rates).code == 0
    for path in (tmp_path / "run" / "patch.safetensors", tmp_path / "run" / "patch.json"):
        path.unlink()
    last = checkpoint.complete(tmp_path / "run" / "checkpoints")[-1]
    shutil.rmtree(last)
    assert patched(cli, made, tmp_path / "run", kind, *rates).code == 0
    one, two = (tensors_of(tmp_path / name / "patch.safetensors") for name in ("straight", "run"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("straight", "run")
    ]
    assert same_but_time(lines[0]) == same_but_time(lines[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pixart", "sd"])
def test_two_processes_are_one(made, tmp_path, kind):
    """Captions are encoded by both; balance is of the global batch, at every size of sites."""
    given = (
        "patch",
        "--base",
        made / kind,
        "--data",
        made / "images",
        *TRAIN,
        "--no-evaluate",
        "--prompt-lr",
        "0.1",
        "--gate-lr",
        "0.1",
    )
    for count in (1, 2):
        done = run_cli(*given, "--run", f"run{count}", "--num-processes", count, cwd=tmp_path)
        assert done.code == 0, done.err
    one, two = (tensors_of(tmp_path / f"run{count}" / "patch.safetensors") for count in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-4)
        assert value.any()


def test_another_backbone_or_encoder_is_refused(cli, made, tmp_path):
    own, run = copied(made / "sd", tmp_path / "sd"), tmp_path / "run"
    shutil.copytree(made / "images", tmp_path / "images")
    given = ("patch", "--base", own, "--data", tmp_path / "images", "--run", run, *TRAIN, "--no-evaluate")
    assert cli(*given).code == 0
    tiny_clip(own, seed=1)
    other = cli("sample", run, "--num-images", 1, *FAST)
    assert other.code == 4
    assert "the text encoder" in other.err
    assert "was trained with" in other.err
    shutil.rmtree(own)
    pipeline(own, tiny_unet(cross_attention_dim=16, layers_per_block=2), "scaled_linear", text=True)
    tiny_vae(own / "vae")
    refused = cli("sample", run, "--num-images", 1, *FAST)
    assert refused.code == 4
    assert "was trained on a backbone with sites 4, this one has" in refused.err


def test_prompts(cli, made, tmp_path):
    run = tmp_path / "run"
    assert patched(cli, made, run, "pixart", "--no-evaluate").code == 0
    lines = tmp_path / "prompts.txt"
    lines.write_text("a red nine\n\U0001f98a in snow\n\n" + "very " * 2000 + "long\n", "utf-8")
    several = cli("sample", run, "--num-images", 5, *FAST, "--prompts", lines, "--json")
    assert several.code == 0, several.err
    about = json.loads(several.out)["prompts"]
    assert (about["from"], about["captions"]) == (str(lines), 3)
    assert cli("sample", run, "--num-images", 5, *FAST, "--prompt", "a red nine", "--out", tmp_path / "same").code == 0
    [first] = (run / "samples").glob("*/000000.png")
    assert torch.equal(read_png(tmp_path / "same" / "000000.png"), read_png(first))  # its first line is that prompt
    for more, said in (
        (("--prompt", "a", "--prompts", lines), "both say what the images show"),
        (("--prompts", tmp_path / "nothing.txt"), "there is no"),
        (("--label", 1, "--prompt", "a"), "--label needs a class-conditional backbone"),
    ):
        refused = cli("sample", run, "--num-images", 1, *FAST, *more)
        assert refused.code in (2, 3)
        assert said in refused.err
    lines.write_bytes(b"\xff\xfe\x00")
    assert "is not text in UTF-8" in cli("sample", run, "--num-images", 1, *FAST, "--prompts", lines).err
    lines.write_text("")
    assert "holds no prompt" in cli("sample", run, "--num-images", 1, *FAST, "--prompts", lines).err


def test_a_prompt_for_a_backbone_without_captions_is_refused(cli, made, tmp_path):
    assert patched(cli, made, tmp_path / "run", "dit", "--no-evaluate").code == 0
    refused = cli("sample", tmp_path / "run", "--prompt", "a cat", "--num-images", 1, *FAST)
    assert refused.code == 2
    assert "--prompt needs a text-conditional backbone" in refused.err


def test_clip_score_of_a_run(cli, made, tmp_path):
    assert patched(cli, made, tmp_path / "run", "sd", "--no-evaluate").code == 0
    clip = tiny_clip_model(tmp_path / "clip")
    measure = (
        "fid",
        tmp_path / "run",
        "--max-images",
        6,
        "--allow-small",
        *FAST,
        "--metrics",
        "clip-score",
        "--clip",
        clip,
        "--json",
    )
    done = cli(*measure)
    assert done.code == 0, done.err
    score = json.loads(done.out)["metrics"]["clip-score-pixels-6"]
    assert 0 <= score["value"] <= 100
    assert score["n"] == 6
    missing = cli(*measure[:-3], "--clip", tmp_path / "none")
    assert missing.code == 3
    assert "there is no CLIP" in missing.err
    assert "Fréchet" not in missing.err  # before anything is measured
    assert missing.err.splitlines()[-2].startswith("error: there is no CLIP")
    refused = cli("fid", made / "images", "--reference", made / "images", "--metrics", "clip-score", "--allow-small")
    assert refused.code == 2
    assert "clip-score is of a text-conditional run" in refused.err


def test_classes_must_be_those_of_the_backbone(cli, made, tmp_path):
    colour_folder(tmp_path / "ten", 40)
    refused = cli("patch", "--base", made / "dit", "--data", tmp_path / "ten", "--run", tmp_path / "run", *TRAIN)
    assert refused.code == 2
    assert "this backbone has 5 classes" in refused.err
    assert not (tmp_path / "run").exists()


def test_parts_of_a_u_net(cli, made, tmp_path):
    up = cli(
        "patch",
        "--base",
        made / "sd",
        "--data",
        made / "images",
        "--run",
        tmp_path / "up",
        *TRAIN,
        "--no-evaluate",
        "--sites",
        "up",
    )
    assert up.code == 0, up.err
    found = json.loads(cli("inspect-gates", tmp_path / "up", "--json").out)
    assert [site["site"] for site in found["sites"]] == [2, 3]
    for more, said in (
        (("--sites", "up", "--prompt-depth", 1), "--sites up and --prompt-depth 1 both say which blocks are patched"),
        (("--position", "prepend"), "--position prepend needs sites of one size"),
    ):
        refused = patched(cli, made, tmp_path / "no", "sd", "--no-evaluate", *more)
        assert refused.code == 2
        assert said in refused.err
    assert "--sites up is for a U-Net" in patched(cli, made, tmp_path / "no", "pixart", "--no-evaluate", "--sites", "up").err


@pytest.mark.parametrize("method", ["prompt", "lora", "full"])
def test_other_methods_and_one_file_of_backbone_and_patch(cli, made, tmp_path, method):
    run = tmp_path / "run"
    rates = ("--prompt-lr", "0.1") if method == "prompt" else ("--lr", "0.01")
    done = patched(cli, made, run, "sd", "--no-evaluate", "--method", method, *rates)
    assert done.code == 0, done.err
    merged = tmp_path / "merged.safetensors"
    assert cli("export", run, "--to", "merged", "--out", merged).code == 0
    codec, words = ("--codec", made / "sd"), ("--text-encoder", made / "sd", "--prompt", "class1")
    for what, out in ((run, "one"), (merged, "two")):
        done = cli("sample", what, "--num-images", 2, *FAST, *codec, *words, "--out", tmp_path / out)
        assert done.code == 0, done.err
    assert torch.equal(read_png(tmp_path / "one" / "000001.png"), read_png(tmp_path / "two" / "000001.png"))
    assert cli("export", run, "--to", "dmp-pt").code == 2


def test_a_diffusers_dit_becomes_one_in_the_original_layout(cli, made, tmp_path):
    done = cli("import", made / "dit", "--run", tmp_path / "dit", "--data", made / "images")
    assert done.code == 0, done.err
    assert "time is embedded as in the original code" in done.err + done.out
    trained = cli(
        "patch", "--base", tmp_path / "dit", "--run", tmp_path / "run", *TRAIN, "--no-evaluate", "--codec", made / "dit"
    )
    assert trained.code == 0, trained.err
    refused = cli("import", made / "sd", "--run", tmp_path / "sd")
    assert refused.code == 2
    assert "holds no DiT" in refused.err


def test_from_the_hub(made, tmp_path):
    """A stand-in serves the pipeline; what was downloaded works offline, by its address."""
    content = {str(path.relative_to(made / "sd")): path.read_bytes() for path in (made / "sd").rglob("*") if path.is_file()}
    with running() as server:
        server.repositories["models/owner/sd"] = Repository(content)
        env = server.environment(tmp_path)
        missing = run_cli("patch", "--base", "hf://owner/sd", "--data", made / "images", *TRAIN, cwd=tmp_path, env=env)
        assert missing.code == 3
        assert "run dmpctl download hf://owner/sd" in missing.err
        fetched = run_cli("download", "hf://owner/sd", cwd=tmp_path, env=env)
        assert fetched.code == 0, fetched.err
    given = ("patch", "--base", "hf://owner/sd", "--data", made / "images", "--run", "run", *TRAIN, "--no-evaluate", "--offline")
    done = run_cli(*given, cwd=tmp_path, env=env)
    assert done.code == 0, done.err
    sampled = run_cli("sample", "run", "--prompt", "class2", "--num-images", 1, *FAST, "--offline", cwd=tmp_path, env=env)
    assert sampled.code == 0, sampled.err


def test_a_text_dit_is_pretrained_patched_and_sampled(cli, made, tmp_path):
    """On the digits, whose names are their captions; the finished file describes itself."""
    shape = ("--text-conditional", "--hidden-size", 16, "--depth", 2, "--num-heads", 2)
    base = tmp_path / "base"
    given = ("pretrain", "--data", "digits", *shape, *TRAIN, "--run", base)
    none = cli(*given)
    assert none.code == 2
    assert "nothing says which encoder" in none.err
    done = cli(*given, "--text-encoder", made / "encoder")
    assert done.code == 0, done.err
    assert cli(*given, "--text-encoder", made / "encoder").code == 0  # complete already
    moved = tmp_path / "elsewhere.safetensors"
    shutil.copy(base / "backbone.safetensors", moved)
    for backbone in (base, moved):
        run = tmp_path / f"patch-{backbone.stem}"
        done = cli("patch", "--base", backbone, "--run", run, *TRAIN, *FAST[:4], "--eval-images", 20)
        assert done.code == 0, done.err
    one, two = (tensors_of(tmp_path / f"patch-{name}" / "patch.safetensors") for name in ("base", "elsewhere"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    report = cli("patch", "--base", "DiT-B/2-text", "--dry-run", "--json")
    assert json.loads(report.out)["added_parameters"] == 12 * 256 * 768 + 256 * 770
    both = cli("pretrain", "--data", "digits", *shape, "--class-conditional", "--run", tmp_path / "no")
    assert both.code == 2
    assert "two kinds of condition" in both.err


def test_a_column_of_captions_that_was_named_is_used_again(cli, made, tmp_path):
    images = sorted((made / "images").rglob("*.png"))[:24]
    words = (datasets.Value("string"), [f"number {number}" for number in range(len(images))])
    write_parquet(tmp_path / "data.parquet", [path.read_bytes() for path in images], words=words)
    given = (
        "patch",
        "--base",
        made / "sd",
        "--data",
        tmp_path / "data.parquet",
        "--run",
        tmp_path / "run",
        *TRAIN,
        "--no-evaluate",
    )
    refused = cli(*given)
    assert refused.code == 2
    assert "has no captions" in refused.err
    assert cli(*given, "--caption-column", "words").code == 0
    sampled = cli("sample", tmp_path / "run", "--num-images", 3, *FAST, "--json")
    assert sampled.code == 0, sampled.err
    assert json.loads(sampled.out)["prompts"]["captions"] == 3


def test_images_without_captions_are_refused(cli, made, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted((made / "images").rglob("*.png"))):
        shutil.copy(path, flat / f"{number}.png")
    refused = cli("patch", "--base", made / "sd", "--data", flat, "--run", tmp_path / "run", *TRAIN)
    assert refused.code == 2
    assert "flat has no captions" in refused.err
    assert not (tmp_path / "run").exists()


def test_a_flow_from_end_to_end(cli, tmp_path):
    """SiT: the same blocks under the schedule flow."""
    shape = ("--schedule", "flow", "--hidden-size", 16, "--depth", 2, "--num-heads", 2, "--no-learned-sigma")
    assert cli("pretrain", "--data", "digits", *shape, *TRAIN, "--run", tmp_path / "base").code == 0
    refused = cli("patch", "--base", tmp_path / "base", "--run", tmp_path / "run", *TRAIN)
    assert refused.code == 2
    assert "use --sampler heun --steps 50" in refused.err
    more = ("--sampler", "heun", "--steps", 3)
    done = cli("patch", "--base", tmp_path / "base", "--run", tmp_path / "run", *TRAIN, *more, "--eval-images", 20)
    assert done.code == 0, done.err
    for sampler in ("euler", "heun", "euler-maruyama"):
        assert cli("sample", tmp_path / "run", "--num-images", 2, "--sampler", sampler, "--steps", 3, "--cpu").code == 0
    assert cli("fid", tmp_path / "run", "--max-images", 70, *more, "--cpu").code == 0
    assert cli("inspect-gates", tmp_path / "run").code == 0
    weighed = cli("patch", "--base", tmp_path / "base", "--run", tmp_path / "no", *TRAIN, *more, "--loss-weight", "p2")
    assert weighed.code == 2
    assert "is for a Gaussian diffusion, this is a flow" in weighed.err
