"""What --base may be, on the command line: shapes with weights from anywhere, rows of the registry, and what is refused."""

import json
import shlex
import tarfile

import pytest
import torch

from dmpctl.backbones import dit_weights, told
from dmpctl.backbones.dit import DiT
from dmpctl.backbones.dit_weights import digest_of
from dmpctl.backbones.told import HEADS
from dmpctl.errors import MissingError
from dmpctl.models import backbone
from dmpctl.models.backbone import load_backbone
from dmpctl.settings.options import options_of
from dmpctl.settings.sections import Base
from tests.helpers import BUNDLED, digit_folder, flip
from tests.standin import COMMIT, Repository, running

SHORT = ("--run", "run", "--no-evaluate", "--iters", 1, "--batch-size", 2, "--cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The bundled backbone as other people would publish it, a bare .pt."""
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    torch.save(load_backbone(Base()).model.state_dict(), path)
    return path.read_bytes()


@pytest.fixture
def server(weights, monkeypatch, tmp_path):
    with running() as standin:
        standin.files["/small.pt"] = weights
        standin.repositories["models/owner/name"] = Repository({"small.pt": weights, "config.json": b"{}"})
        for name, value in (
            ("HF_ENDPOINT", standin.url),
            ("NO_PROXY", "127.0.0.1"),
            ("DMPCTL_CACHE_DIR", str(tmp_path / "cache")),
        ):
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        yield standin


@pytest.fixture
def small_shape(monkeypatch):
    """DiT-S/2 is as small as the bundled backbone."""
    real = backbone.shape_config
    for module in (backbone, dit_weights, told):
        monkeypatch.setattr(module, "shape_config", lambda name: BUNDLED if name == "DiT-S/2" else real(name))


DIGEST = digest_of(load_backbone(Base()).model.state_dict())


@pytest.mark.parametrize(
    "given", ["{url}/small.pt", "hf://owner/name", "hf://owner/name@main/small.pt", "hf://owner/name@{commit}/small.pt"]
)
def test_a_shape_with_weights_from_anywhere(server, small_shape, cli, tmp_path, monkeypatch, given):
    """Fetched once, used from the cache afterwards, offline too; and damage is seen."""
    given = given.format(url=server.url, commit=COMMIT)
    line = ("patch", "--base", "DiT-S/2", "--weights", given, "--data", "digits", *SHORT)
    offline = cli(*line, "--offline")
    assert (offline.code, offline.out) == (3, "")
    assert f"{given} is not in the cache and --offline forbids fetching it" in offline.err
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    with pytest.raises(MissingError, match=r"is not in the cache") as caught:  # as a stage of compare finds it
        load_backbone(Base(base="DiT-S/2", weights=given))
    assert caught.value.hint == f"run dmpctl download {given}"
    done = cli(*line)
    assert done.code == 0, done.err
    about = json.loads((tmp_path / "run" / "patch.json").read_text())["backbone"]
    assert (about["base"], about["sha256"]) == ("DiT-S/2", DIGEST)
    asked = len(server.asked)
    assert cli(*line, "--offline").code == 0
    assert len(server.asked) == asked
    assert load_backbone(Base(base="DiT-S/2", weights=given)).digest == DIGEST
    assert cli("sample", "run", "--num-images", 1, "--sampler", "ddim", "--steps", 1, "--cpu").code == 0
    flip(tmp_path.joinpath(about["weights"]).resolve())
    damaged = cli(*line)
    assert (damaged.code, damaged.out) == (4, "")
    assert "is damaged" in damaged.err


@pytest.fixture
def known_width(monkeypatch):
    """As if the width of the bundled backbone were one of the published."""
    monkeypatch.setitem(HEADS, BUNDLED.hidden_size, BUNDLED.num_heads)


def test_a_row_of_the_settings_file(server, known_width, cli, tmp_path):
    """Absent: the command that fetches it. The patch can be used without the settings file."""
    (tmp_path / "x.toml").write_text(f"[assets.mine]\nurl = '{server.url}/small.pt'\nlicence = 'MIT'\n")
    line = ("patch", "--base", "mine", "--data", "digits", *SHORT, "--config", "x.toml")
    absent = cli(*line)
    assert (absent.code, absent.out) == (3, "")
    assert absent.err == "error: mine is not in the cache\nhint: run dmpctl download mine\n"
    assert cli("download", "mine", "--config", "x.toml").code == 0
    assert cli(*line).code == 0
    about = json.loads((tmp_path / "run" / "patch.json").read_text())["backbone"]
    assert (about["base"], about["sha256"]) == (str(tmp_path / "cache/files/mine/small.pt"), DIGEST)
    assert cli("sample", "run", "--num-images", 1, "--sampler", "ddim", "--steps", 1, "--cpu").code == 0


def test_data_of_a_row_of_the_settings_file(cli, tmp_path, monkeypatch):
    """Put into the cache by hand, as data too large to be fetched is: used by its name, recorded by its path."""
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.toml").write_text("[assets.mine]\nkind = 'data'\nfile = 'mine.tar'\nlicence = 'MIT'\n")
    line = ("patch", "--data", "mine", *SHORT, "--config", "x.toml")
    absent = cli(*line)
    assert (absent.code, absent.out) == (3, "")
    place = tmp_path / "cache/files/mine/mine.tar"
    place.parent.mkdir(parents=True)
    with tarfile.open(place, "w") as archive:
        for path in sorted(digit_folder(tmp_path / "digits", 5).iterdir()):
            archive.add(path, path.name)
    done = cli(*line)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run" / "patch.json").read_text())["data"]["name"] == str(place)
    assert cli("fid", "run", "--max-images", 70, "--sampler", "ddim", "--steps", 1, "--stream", "--cpu").code == 0
    (tmp_path / "y.toml").write_text("[assets.mine]\nfile = 'mine.tar'\nlicence = 'MIT'\n")
    wrong = cli(*line[:-1], "y.toml")
    assert (wrong.code, "kind backbone" in wrong.err) == (2, True)


def test_a_published_backbone(known_width, cli, tmp_path, monkeypatch, weights):
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    line = ("patch", "--base", "dit-xl2-256", "--data", "digits", *SHORT)
    absent = cli(*line)
    assert (absent.code, absent.out) == (3, "")
    assert "dit-xl2-256 (DiT-XL/2, ImageNet 256, original) is not in the cache" in absent.err
    assert "hint: run dmpctl download dit-xl2-256 --accept-license\n" in absent.err
    place = tmp_path / "cache/files/dit-xl2-256/DiT-XL-2-256x256.pt"  # put there by hand
    place.parent.mkdir(parents=True)
    place.write_bytes(weights)
    assert cli(*line).code == 0
    about = json.loads((tmp_path / "run" / "patch.json").read_text())["backbone"]
    assert (about["base"], about["sha256"]) == ("dit-xl2-256", DIGEST)
    assert cli("sample", "run", "--num-images", 1, "--sampler", "ddim", "--steps", 1, "--cpu").code == 0
    place.write_bytes(weights + b"\0")
    assert cli(*line).code == 4


@pytest.mark.parametrize(
    ("base", "code", "sentence"),
    [
        ("vae-ema", 2, "--base vae-ema is no backbone but SD VAE"),
        ("dit-xl2-256-diffusers", 3, "run dmpctl download dit-xl2-256-diffusers"),
        ("sd15", 3, "run dmpctl download sd15"),
        ("hf://owner/name/file.pt", 2, "is no model of the Hub"),
        ("dit-xl-256", 2, "did you mean dit-xl2-256?"),
        ("DiT-XL/2", 3, "the published ones: dmpctl patch --base dit-xl2-256 --data ffhq"),
    ],
)
def test_what_is_no_backbone(cli, tmp_path, monkeypatch, base, code, sentence):
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path))
    done = cli("patch", "--base", base, "--data", "ffhq")
    assert (done.code, done.out) == (code, "")
    assert sentence in done.err
    assert len(done.err.splitlines()) == 2


def test_a_shape_without_weights_says_both_ways_out(cli, tmp_path, monkeypatch):
    """Commands to be pasted: each has only options that its command has, and they describe the shape."""
    monkeypatch.chdir(tmp_path)
    done = cli("patch", "--base", "DiT-L/2", "--data", "ffhq")
    assert (done.code, done.out) == (3, "")
    error, hint = done.err.splitlines()
    assert error == "error: no weights for DiT-L/2: no public checkpoint of this shape exists"
    first, second = (f"dmpctl {part}" for part in hint.split("dmpctl ")[1:])
    assert first.split("; ")[0] == "dmpctl patch --base DiT-L/2 --data ffhq --weights FILE"
    assert second == (
        "dmpctl pretrain --data ffhq --codec vae-ema --size 256 --hidden-size 1024 --depth 24 --num-heads 16 --patch-size 2"
    )
    known = {option.flag for option in options_of("pretrain").values()}
    assert {word for word in shlex.split(second) if word.startswith("--")} <= known
    assert not list(tmp_path.iterdir())
    with torch.device("meta"):
        assert DiT(backbone.shape_config("DiT-L/2")).config.hidden_size == 1024
