"""Pretrain, patch, sample and fid with an autoencoder: what each command leaves on disk, and what it refuses."""

import json
import os
import shutil
import signal
from pathlib import Path

import datasets
import pytest
import torch

from dmpctl.batches import latents
from dmpctl.batches.shards import per_shard_of
from dmpctl.cli.app import main
from dmpctl.codecs.vae import Vae
from dmpctl.images import stored
from dmpctl.training.trainer import Trainer
from tests.helpers import colour_folder, copied, files, run_cli, same_but_time, tensors_of, tree
from tests.latent_helpers import TINY_SIDE, tiny_vae
from tests.standin import Repository, running
from tests.unit.data.made import write_parquet

IMAGES, PER_SHARD = 20, 8
PLACES = ("DMPCTL_CACHE_DIR", "HF_HUB_CACHE", "HF_DATASETS_CACHE")
SMALL = ("--iters", 4, "--batch-size", 8, "--log-every", 1, "--save-every", 2, "--cpu")
BACKBONE = ("--hidden-size", 16, "--depth", 2, "--num-heads", 2, "--class-conditional")
FAST = ("--sampler", "ddim", "--steps", 2, "--cpu")
OWN_ROWS = """
[assets.ffhq]
kind = "data"
repo = "owner/faces"
dataset = true
allow = ["*.parquet", "README.md"]
licence = "CC-BY-NC-SA-4.0"
non-commercial = true
[assets.vae-ema]
kind = "codec"
repo = "owner/vae"
file = "diffusion_pytorch_model.safetensors"
allow = ["config.json"]
"""
CARD = b"---\nlicense: cc-by-nc-sa-4.0\n---\nFaces.\n"
SHARDS = {f"shard-0000{shard}.safetensors" for shard in range(3)}
CACHED = SHARDS | {"manifest.json", ".manifest.lock", ".shards.lock"}


@pytest.fixture(autouse=True, scope="module")
def _small_shards():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(latents, "per_shard_of", lambda item_bytes: PER_SHARD)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the images, two autoencoders of one scale, and a backbone pretrained with the first; the cache is in it."""
    root = tmp_path_factory.mktemp("place")
    colour_folder(root / "images", IMAGES, TINY_SIDE)
    tiny_vae(root / "vae")
    tiny_vae(root / "other", seed=1)
    with pytest.MonkeyPatch.context() as patched:
        for name in PLACES:
            patched.setenv(name, str(root / "cache"))
        line = ["pretrain", "--data", root / "images", "--codec", root / "vae", "--run", root / "backbone", *BACKBONE, *SMALL]
        assert main([str(arg) for arg in line]) == 0
    return root


@pytest.fixture
def lazily(monkeypatch):
    """Images are decoded as they are used, as those of a large set are."""
    monkeypatch.setattr(stored, "HELD_BYTES", 0)


@pytest.fixture
def here(place, cli, monkeypatch):
    """Run a command with the cache of `place`."""
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(place / "cache"))
    return cli


@pytest.fixture(scope="module")
def patched_run(place):
    """A run of `dmpctl patch` on that backbone, without its comparison."""
    with pytest.MonkeyPatch.context() as patched:
        for name in PLACES:
            patched.setenv(name, str(place / "cache"))
        assert main([str(arg) for arg in patch_line(place, place / "patched")]) == 0
    return place / "patched"


def patch_line(place, run, *more):
    return ["patch", "--base", place / "backbone", "--run", run, "--no-evaluate", "--prompt-lr", 0.05, *SMALL, *more]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def counted(monkeypatch, happens=None, at=0):
    """How many images are encoded from now on; something may happen at one of the batches."""
    encoded, real = [], Vae.encode

    def encode(self, images):
        encoded.append(len(images))
        if len(encoded) == at:
            happens()
        return real(self, images)

    monkeypatch.setattr(Vae, "encode", encode)
    return encoded


def test_a_backbone_on_latents_carries_its_codec(place):
    vae = Vae(place / "vae", str(place / "vae"))
    record = {"name": str(place / "vae"), "fingerprint": vae.fingerprint, "scale": vae.scale}
    about = json.loads((place / "backbone" / "backbone.json").read_text())
    assert about["codec"] == record
    [session] = json.loads((place / "backbone" / "provenance.json").read_text())["sessions"]
    assert session["codec_fingerprint"] == vae.fingerprint
    for folder in (place / "backbone" / "checkpoints").iterdir():
        assert json.loads((folder / "backbone.json").read_text())["codec"] == record


def test_the_cache_holds_these_files_and_no_other(place, patched_run):
    [folder] = (place / "cache" / "latents").iterdir()
    assert {path.name for path in (place / "cache").iterdir()} == {"latents"}
    assert {path.name for path in folder.iterdir()} == CACHED
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["key"]["codec"] == Vae(place / "vae", "vae").fingerprint
    assert (manifest["key"]["flip"], manifest["key"]["count"], manifest["key"]["size"]) == (True, IMAGES, TINY_SIDE)


def test_a_patch_on_latents(place, patched_run, here, tmp_path, monkeypatch):
    """The cache that pretrain built is hit: nothing is encoded; without it, nearly the same is trained."""
    about = json.loads((patched_run / "patch.json").read_text())
    assert about["codec"]["fingerprint"] == Vae(place / "vae", "vae").fingerprint
    assert about["data"]["name"] == str(place / "images")
    encoded, before = counted(monkeypatch), tree(place / "cache")
    assert here(*patch_line(place, tmp_path / "again")).code == 0
    assert (encoded, tree(place / "cache")) == ([], before)
    assert same_but_time(metrics(tmp_path / "again")) == same_but_time(metrics(patched_run))
    assert here(*patch_line(place, tmp_path / "online", "--no-latents")).code == 0
    assert sum(encoded) == 4 * 8
    assert tree(place / "cache") == before
    losses = [[line["loss"] for line in metrics(run)] for run in (patched_run, tmp_path / "online")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    one, two = (tensors_of(run / "patch.safetensors") for run in (patched_run, tmp_path / "online"))
    assert all(torch.allclose(one[name], two[name], atol=0.05) for name in one)


def test_the_comparison_at_the_end_is_made_on_decoded_images(place, here, tmp_path):
    line = [*patch_line(place, tmp_path / "run"), *FAST, "--eval-images", 800, "--json"]  # more than the features
    done = here(*[arg for arg in line if arg != "--no-evaluate"])
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["metric"] == "Fréchet distance in pixels"
    assert found["paired_loss"]["images"] == IMAGES
    assert (tmp_path / "run" / "before-after.png").is_file()


def test_sampling_and_another_autoencoder(place, patched_run, here, tmp_path):
    run = copied(patched_run, tmp_path / "run")
    sample = ("sample", run, "--num-images", 4, *FAST)
    assert here(*sample).code == 0
    [own] = (run / "samples").iterdir()
    assert files(own) == {*(f"{k:06d}.png" for k in range(4)), "samples.json", "contact-sheet.png"}
    from PIL import Image

    assert Image.open(own / "000000.png").size == (TINY_SIDE, TINY_SIDE)
    refused = here(*sample, "--codec", place / "other")
    assert refused.code == 2
    assert "holds images made with another codec" in refused.err
    assert here(*sample, "--codec", place / "other", "--out", tmp_path / "other").code == 0
    assert (tmp_path / "other" / "000000.png").read_bytes() != (own / "000000.png").read_bytes()
    tiny_vae(tmp_path / "scaled", scaling_factor=0.5)
    wrong = here(*sample, "--codec", tmp_path / "scaled", "--out", tmp_path / "scaled-out")
    assert (wrong.code, wrong.out) == (2, "")
    assert "scales latents by 0.5, the backbone's by 0.18215" in wrong.err
    grey = here(*sample, "--codec", "identity", "--out", tmp_path / "grey")
    assert (grey.code, grey.out) == (2, "")


def test_fid_of_decoded_images(place, patched_run, here, tmp_path):
    run = copied(patched_run, tmp_path / "run")
    done = here("fid", run, "--extractor", "pixels", "--max-images", 12, "--allow-small", *FAST, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["n"], found["protocol"]["shape"]) == (12, [3, TINY_SIDE, TINY_SIDE])
    assert found["reference"]["n"] == IMAGES
    assert found["codec"]["fingerprint"] == Vae(place / "vae", "vae").fingerprint


def test_an_autoencoder_that_has_changed_is_refused(place, patched_run, here, tmp_path):
    """Exit 4, wherever it is used; the folder is moved back afterwards."""
    (place / "vae").rename(place / "kept")
    shutil.copytree(place / "other", place / "vae")
    try:
        for line in (patch_line(place, tmp_path / "run"), ["sample", patched_run, "--out", tmp_path / "images", *FAST]):
            done = here(*line)
            assert (done.code, done.out) == (4, ""), done.err
            assert "the backbone was trained with" in done.err
            assert not (tmp_path / "run").exists()
            assert not (tmp_path / "images").exists()
        shutil.rmtree(place / "vae")
        gone = here("sample", patched_run, "--out", tmp_path / "images", *FAST)
        assert (gone.code, gone.out) == (3, "")
    finally:
        shutil.rmtree(place / "vae", ignore_errors=True)
        (place / "kept").rename(place / "vae")


def test_interrupted_while_encoding_then_while_training_equals_uninterrupted(place, patched_run, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path / "cache"))
    line = patch_line(place, tmp_path / "run", "--codec-batch", 4)
    with monkeypatch.context() as once:
        encoded = counted(once, lambda: os.kill(os.getpid(), signal.SIGTERM), at=5)  # the first batch of the second shard
        stopped = cli(*line)
    assert (stopped.code, sum(encoded)) == (143, 6 * 4)
    assert f"8 of {IMAGES} are kept" in stopped.err
    assert "go on with: dmpctl" in stopped.err
    [folder] = (tmp_path / "cache" / "latents").iterdir()
    assert SHARDS & {path.name for path in folder.iterdir()} == {"shard-00000.safetensors"}
    with monkeypatch.context() as once:
        encoded, real = counted(once), Trainer._one_step

        def step(self, inputs, stop):
            if self.step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return real(self, inputs, stop)

        once.setattr(Trainer, "_one_step", step)
        stopped = cli(*line)
    assert (stopped.code, sum(encoded)) == (130, 2 * (IMAGES - PER_SHARD))
    assert "saved at step 3" in stopped.err
    encoded = counted(monkeypatch)
    assert cli(*line).code == 0
    assert encoded == []
    assert {path.name for path in folder.iterdir()} == CACHED
    assert same_but_time(metrics(tmp_path / "run")) == same_but_time(metrics(patched_run))


def test_a_checkpoint_and_an_exported_model_carry_the_codec(place, patched_run, here, tmp_path):
    step = place / "backbone" / "checkpoints" / "step-0000004"
    line = [step if arg == place / "backbone" else arg for arg in patch_line(place, tmp_path / "run")]
    done = here(*line, "--data", place / "images")
    assert done.code == 0, done.err
    assert same_but_time(metrics(tmp_path / "run")) == same_but_time(metrics(patched_run))
    merged = tmp_path / "merged.safetensors"
    assert here("export", patched_run, "--out", merged).code == 0
    for what, out in ((patched_run, "a"), (merged, "b")):
        assert here("sample", what, "--num-images", 2, "--out", tmp_path / out, *FAST).code == 0
    assert (tmp_path / "a" / "000001.png").read_bytes() == (tmp_path / "b" / "000001.png").read_bytes()
    refused = here("patch", "--base", merged, "--data", place / "images", "--run", tmp_path / "other")
    assert (refused.code, refused.out) == (2, "")
    assert "holds a backbone with a patch on it" in refused.err


def test_download_encodes_ahead(place, patched_run, cli, tmp_path, monkeypatch):
    """A folder, as after --data: patch then encodes nothing."""
    cache = tmp_path / "cache"
    ahead = ("download", place / "images", "--latents", place / "vae", "--size", TINY_SIDE, "--cache-dir", cache, "--cpu")
    plan = cli(*ahead, "--dry-run", "--json")
    assert plan.code == 0, plan.err
    assert json.loads(plan.out)["latents"][0]["images"] == IMAGES
    assert not cache.exists()
    done = cli(*ahead, "--json")
    assert done.code == 0, done.err
    [made] = json.loads(done.out)["latents"]
    assert {path.name for path in Path(made["folder"]).iterdir()} == CACHED
    assert made["bytes"] == IMAGES * 2 * 2 * 4 * 8 * 8 * 2  # images, views, mean and logvar, C, h, w, bytes
    encoded = counted(monkeypatch)
    assert cli(*patch_line(place, tmp_path / "run", "--cache-dir", cache)).code == 0
    assert encoded == []
    assert os.environ["HF_DATASETS_CACHE"] == str(cache / "datasets")


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        ((), 2, "--latents needs the images to encode"),
        (("images", "--latents", "identity"), 2, "names no codec whose latents can be kept"),
        (("images", "--latents", "vae-mse"), 3, "vae-mse"),
        (("inception", "--latents", "vae"), 2, "inception holds no images to encode"),
        (("nowhere/", "--latents", "vae"), 3, "there is no folder nowhere/"),
        (("images", "--latents", "vae", "--size", 15), 2, "multiple of 2, found 15"),
        (("images", "--latents", "vae", "--verify"), 2, "--verify and --latents vae are two different things"),
        (("images", "--latents", "true"), 2, "--latents true names no codec"),
    ],
)
def test_what_cannot_be_encoded_ahead(place, here, monkeypatch, args, code, sentence):
    monkeypatch.chdir(place)
    before = tree(place / "cache")
    done = here("download", *(args or ("--latents", "vae")), "--offline")
    assert (done.code, done.out) == (code, ""), done.err
    assert sentence in done.err
    assert len(done.err.splitlines()) <= 2
    assert tree(place / "cache") == before


def test_registry_names_are_fetched_encoded_and_found_again_offline(place, cli, tmp_path, monkeypatch):
    """ffhq and vae-ema in miniature; what the Hub's libraries keep lies in the one cache, too."""
    images = [path.read_bytes() for path in sorted((place / "images").rglob("*.png"))]
    rows = write_parquet(tmp_path / "rows.parquet", images).read_bytes()
    vae = {path.name: path.read_bytes() for path in (place / "vae").iterdir()}
    (tmp_path / "x.toml").write_text(OWN_ROWS)
    monkeypatch.setattr(latents, "per_shard_of", per_shard_of)  # as in the other process
    cache, more = tmp_path / "cache", ("--config", tmp_path / "x.toml", "--cache-dir", tmp_path / "cache")
    with running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        server.repositories["datasets/owner/faces"] = Repository({"data/train-00000-of-00001.parquet": rows, "README.md": CARD})
        server.repositories["models/owner/vae"] = Repository(vae)
        ahead = ("download", "ffhq", "--latents", "vae-ema", "--size", TINY_SIDE, "--json", "--cpu")
        refused = cli(*ahead, *more)
        assert (refused.code, refused.out) == (2, "")
        assert "for non-commercial use only: ffhq" in refused.err
        done = run_cli(*ahead, *more, "--accept-license", cwd=tmp_path, env={"HF_ENDPOINT": server.url, "HOME": str(tmp_path)})
        assert done.code == 0, done.err
    found = json.loads(done.out)
    assert {row["name"] for row in found["files"]} == {"ffhq", "vae-ema"}
    assert (found["latents"][0]["data"], found["latents"][0]["images"]) == ("ffhq", IMAGES)
    assert {path.name for path in cache.iterdir()} == {"hub", "datasets", "latents", "locks", "index.json"}
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache / "datasets"))
    line = ("pretrain", "--data", "ffhq", "--codec", "vae-ema", "--size", TINY_SIDE, "--run", tmp_path / "run", "--offline")
    encoded = counted(monkeypatch)
    trained = cli(*line, *BACKBONE[:-1], *SMALL, *more)
    assert trained.code == 0, trained.err
    assert encoded == []
    absent = cli(*line, "--cache-dir", tmp_path / "none")
    assert (absent.code, absent.out) == (3, "")
    assert "hint: run dmpctl download" in absent.err


def test_one_settings_file_for_download_and_patch(place, here, tmp_path):
    config = tmp_path / "x.toml"
    config.write_text("latents = false\n")
    clash = here("download", place / "images", "--config", config)
    assert (clash.code, clash.out) == (2, "")
    assert "latents = false names no codec" in clash.err
    config.write_text(f"[patch]\nlatents = false\n[download]\nlatents = '{place / 'vae'}'\nsize = {TINY_SIDE}\n")
    assert here("download", place / "images", "--config", config, "--json").code == 0
    printed = here("patch", "--config", config, "--print-config", "--json")
    assert printed.code == 0, printed.err


def test_what_is_left_out_is_said_and_recorded(place, here, tmp_path, lazily):
    """Bad at once (a text), and broken behind its header, which the encoding finds."""
    images = Path(shutil.copytree(place / "images", tmp_path / "images"))
    (images / "class0" / "text.png").write_text("no image")
    whole = sorted(images.rglob("*.png"))[5]
    whole.write_bytes(whole.read_bytes()[:-60])
    line = ["pretrain", "--data", images, "--codec", place / "vae", "--run", tmp_path / "run", *BACKBONE, *SMALL]
    refused = here(*line)
    assert (refused.code, refused.out) == (4, "")
    done = here(*line, "--on-bad", "skip")
    assert done.code == 0, done.err
    assert (
        f"images: 1 of {IMAGES + 1} images left out: class0/text.png (not a PNG, JPEG, TIFF or another image that is read)\n"
        in done.err
    )
    broken = str(whole.relative_to(images))
    assert f"images: 1 of {IMAGES + 1} images broken, others stand in for them: {broken}\n" in done.err
    [session] = json.loads((tmp_path / "run" / "provenance.json").read_text())["sessions"]
    assert session["left_out"] == {
        "bad": [["class0/text.png", "not a PNG, JPEG, TIFF or another image that is read"]],
        "replaced": [broken],
    }
    [session] = json.loads((place / "backbone" / "provenance.json").read_text())["sessions"]
    assert "left_out" not in session


def test_what_breaks_while_training_is_recorded_at_its_end(place, here, tmp_path, lazily):
    """Pixels, nothing encoded before: a broken image behind a good header is found by the step that uses it."""
    images = Path(shutil.copytree(place / "images", tmp_path / "images"))
    whole = sorted(images.rglob("*.png"))[5]
    whole.write_bytes(whole.read_bytes()[:-60])
    done = here("pretrain", "--data", images, "--run", tmp_path / "run", *BACKBONE, *SMALL, "--iters", 12, "--on-bad", "skip")
    assert done.code == 0, done.err
    [session] = json.loads((tmp_path / "run" / "provenance.json").read_text())["sessions"]
    assert session["left_out"] == {"bad": [], "replaced": [str(whole.relative_to(images))]}
