"""`dmpctl push` to a stand-in of the Hub, and what was published used by its address."""

import json

import pytest
from huggingface_hub import ModelCard

from tests.helpers import copied, patch_run, run_cli
from tests.standin import COMMIT, running

FAST = ("--sampler", "ddim", "--steps", 2, "--cpu")


@pytest.fixture
def server():
    with running() as standin:
        yield standin


@pytest.fixture
def env(server, tmp_path):
    return server.environment(tmp_path) | {"HF_TOKEN": "hf_none"}


@pytest.fixture
def here(env, tmp_path, monkeypatch):
    """The same for this process."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path, finished):
    return copied(finished, tmp_path / "mine")


def test_published_and_used(server, env, run, tmp_path):
    measured = ("fid", run, "--max-images", 70, *FAST)
    assert run_cli(*measured, cwd=tmp_path, env=env).code == 0
    done = run_cli("push", run, "hf://owner/digits-dmp", "--json", cwd=tmp_path, env=env)
    assert done.code == 0, done.err
    assert json.loads(done.out)["commit"] == COMMIT
    sent = server.repositories["models/owner/digits-dmp"].files
    assert set(sent) == {"patch.safetensors", "patch.json", "README.md"}
    assert sent["patch.safetensors"] == (run / "patch.safetensors").read_bytes()
    assert all(str(tmp_path).encode() not in content for content in sent.values())  # no path of this machine

    card = ModelCard(sent["README.md"].decode())
    assert card.data.library_name == "dmpctl"
    assert {"dmp", "diffusion"} <= set(card.data.tags)
    assert "fd-pixels-70: " in card.text
    assert "against digits (protocol pixels, ddim 2, cfg 1, seed 0)" in card.text
    assert "dmpctl sample hf://owner/digits-dmp" in card.text

    address = f"hf://owner/digits-dmp@{COMMIT}"
    missing = run_cli("sample", address, "--num-images", 1, *FAST, cwd=tmp_path, env=env)
    assert missing.code == 3
    assert f"run dmpctl download {address}" in missing.err
    assert run_cli("download", address, cwd=tmp_path, env=env).code == 0
    for what, out in ((run, "one"), (address, "two")):
        done = run_cli("sample", what, "--num-images", 2, *FAST, "--out", out, "--offline", cwd=tmp_path, env=env)
        assert done.code == 0, done.err
    assert (tmp_path / "one" / "000001.png").read_bytes() == (tmp_path / "two" / "000001.png").read_bytes()
    done = run_cli("fid", address, "--max-images", 70, *FAST, cwd=tmp_path, env=env)
    assert done.code == 0, done.err
    assert list((tmp_path / "runs" / "digits-dmp" / "metrics").glob("*.json"))  # into a run of its name
    assert run_cli("inspect-gates", address, cwd=tmp_path, env=env).code == 0


def test_a_backbone_of_ones_own_goes_along(server, env, tmp_path, conditional):
    patch_run(tmp_path / "mine", base=str(conditional))
    refused = run_cli("push", "mine", "hf://owner/own", cwd=tmp_path, env=env)
    assert refused.code == 2
    assert "which others do not have" in refused.err
    assert not server.repositories
    done = run_cli("push", "mine", "hf://owner/own", "--with-backbone", cwd=tmp_path, env=env)
    assert done.code == 0, done.err
    sent = server.repositories["models/owner/own"].files
    assert "backbone.safetensors" in sent
    assert all(str(tmp_path).encode() not in content for content in sent.values())
    assert run_cli("download", "hf://owner/own", cwd=tmp_path, env=env).code == 0
    done = run_cli("sample", "hf://owner/own", "--num-images", 1, *FAST, cwd=tmp_path, env=env)
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (("mine",), 2, "push takes a run and where it goes"),
        (("mine", "owner/name"), 2, "is no address on the Hub"),
        (("mine", "hf://owner/name/file.pt"), 2, "is no place for a patch on the Hub"),
        (("mine", "hf://datasets/owner/name"), 2, "is no place for a patch on the Hub"),
        (("nothing", "hf://owner/name"), 3, "there is no run"),
        (("mine", "hf://owner/name", "--offline"), 2, "--offline forbids sending"),
    ],
)
def test_what_cannot_be_published(cli, here, run, given, code, said):
    done = cli("push", *given)
    assert (done.code, done.out) == (code, "")
    assert said in done.err
    assert len(done.err.splitlines()) <= 2


def test_without_a_token(cli, here, server, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    done = cli("push", run, "hf://owner/name")
    assert done.code == 3
    assert "HF_TOKEN" in done.err
    assert not server.repositories


def test_a_dry_run_sends_nothing(cli, here, server, run):
    done = cli("push", run, "hf://owner/name", "--dry-run", "--json")
    assert done.code == 0, done.err
    assert set(json.loads(done.out)["files"]) == {"patch.safetensors", "patch.json", "README.md"}
    assert not server.asked
