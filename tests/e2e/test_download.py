"""`dmpctl download` in processes of its own: killed, stopped, two at once, offline with no way out, and from a settings file."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.helpers import environment, files, flip, run_cli
from tests.standin import COMMIT, Answer, Repository, running

CONTENT = os.urandom(3_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
# Put into every process of a test: whoever opens a connection or asks for an address is found out.
GUARD = """
import os, socket
def refuse(*a, **k):
    os.write(2, b"a connection was attempted")
    os._exit(99)
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


@pytest.fixture
def server():
    with running() as standin:
        standin.files["/big.bin"] = CONTENT
        standin.repositories["models/owner/name"] = Repository({"model.safetensors": CONTENT, "config.json": b"{}"})
        yield standin


@pytest.fixture
def env(server, tmp_path):
    return server.environment(tmp_path)


@pytest.fixture
def config(server, tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(
        f"""
        [assets.big]
        what = "a big file"
        url = "{server.url}/big.bin"
        licence = "MIT"
        [assets.model]
        repo = "owner/name"
        allow = ["*.safetensors", "*.json"]
        licence = "CC-BY-NC-4.0"
        non-commercial = true
        """
    )
    return path


@pytest.fixture
def start(env, tmp_path):
    """Start `dmpctl args` and go on; ended with the test."""
    started = []

    def begin(*args: object) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "dmpctl", *map(str, args)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        options["preexec_fn"] = hear_ctrl_c  # what a shell starts in the background would not
        process = subprocess.Popen(line, cwd=tmp_path, env=environment() | env, **options)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def until(condition, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_kill_9_and_ctrl_c_in_the_middle_then_the_same_command_again(server, env, config, start, tmp_path):
    place = tmp_path / "cache/dmpctl/files/big/big.bin"
    part = place.with_name("big.bin.part")
    command = ("download", "big", "--config", config)
    server.always["/big.bin"] = Answer(gate=threading.Event())

    killed = start(*command)
    until(lambda: size(part) > 200_000)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(240) == -signal.SIGKILL
    first = size(part)
    assert not place.exists()

    stopped = start(*command)
    until(lambda: size(part) > first + 200_000)
    stopped.send_signal(signal.SIGINT)
    out, err = stopped.communicate(timeout=240)
    assert (stopped.returncode, out) == (130, "")
    assert "are kept for the next time" in err
    assert "Traceback" not in err
    second = size(part)
    assert not place.exists()

    del server.always["/big.bin"]
    done = run_cli(*command, "--json", cwd=tmp_path, env=env)
    assert done.code == 0, done.err
    assert json.loads(done.out)["files"][0]["sha256"] == DIGEST
    assert place.read_bytes() == CONTENT
    assert files(place.parent) == {"big.bin"}
    assert server.ranges("/big.bin") == [None, f"bytes={first}-", f"bytes={second}-"]


def test_two_at_once_fetch_it_once(server, env, config, start, tmp_path):
    gate = threading.Event()
    server.always["/big.bin"] = Answer(gate=gate)
    command = ("download", "big", "--config", config, "--json")
    first = start(*command)
    until(lambda: server.ranges("/big.bin"))
    second = start(*command)
    for line in second.stderr:
        if "another process is fetching big, waiting for it" in line:
            break
    gate.set()  # it does wait
    ended = [process.communicate(timeout=240) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert json.loads(ended[0][0]) == json.loads(ended[1][0])
    assert server.ranges("/big.bin") == [None]


def test_a_repository_of_the_hub_after_kill_9(server, env, config, start, tmp_path):
    """In the Hub's own cache, as no other was named; then offline without any way out."""
    path = f"/owner/name/resolve/{COMMIT}/model.safetensors"
    command = ("download", "model", "--config", config)
    refused = run_cli(*command, cwd=tmp_path, env=env)
    assert (refused.code, refused.out) == (2, "")
    assert "for non-commercial use only: model (CC-BY-NC-4.0)" in refused.err
    assert "dmpctl download model --accept-license" in refused.err

    server.script[path] += [Answer(gate=threading.Event())]
    killed = start(*command, "--accept-license")
    until(lambda: server.ranges(path))
    time.sleep(0.2)
    killed.kill()
    killed.wait(240)
    done = run_cli(*command, "--json", cwd=tmp_path, env=env)
    assert done.code == 0, done.err
    [found] = json.loads(done.out)["files"]
    folder = tmp_path / "hf/hub/models--owner--name/snapshots" / COMMIT
    assert (found["path"], found["revision"], bool(found["accepted"])) == (str(folder), COMMIT, True)
    assert (folder / "model.safetensors").read_bytes() == CONTENT

    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    offline = env | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "guard"), environment()["PYTHONPATH"]])}
    again = run_cli(*command, "--offline", "--json", cwd=tmp_path, env=offline)
    assert again.code == 0, again.err
    assert json.loads(again.out)["files"] == [found]
    missing = run_cli("download", "big", "model", "--config", config, "--offline", cwd=tmp_path, env=offline)
    assert missing.code == 3
    assert "error: not in the cache: big, and --offline forbids fetching\nhint: online: dmpctl download big\n" in missing.err
    guarded = run_cli("download", "big", "--config", config, cwd=tmp_path, env=offline)
    assert (guarded.code, "a connection was attempted" in guarded.err) == (99, True)  # the guard works

    flip((folder / "model.safetensors").resolve(), 5)
    damaged = run_cli("download", "--verify", "--config", config, "--offline", cwd=tmp_path, env=offline)
    assert damaged.code == 4
    assert "model.safetensors is damaged: it has sha256" in damaged.err
    assert f"expected {DIGEST}" in damaged.err


def test_one_cache_for_files_and_repositories(server, config, tmp_path, monkeypatch, cli):
    """--cache-dir, DMPCTL_CACHE_DIR and a key of the settings file mean the same, for downloads and for what uses them."""
    for name, value in (("HF_ENDPOINT", server.url), ("NO_PROXY", "127.0.0.1"), ("HOME", str(tmp_path))):
        monkeypatch.setenv(name, value)
    place = tmp_path / "place"
    done = cli("download", "big", "model", "--accept-license", "--config", config, "--cache-dir", place, "--json")
    assert done.code == 0, done.err
    assert all(row["path"].startswith(str(place)) for row in json.loads(done.out)["files"])
    assert {path.name for path in place.iterdir()} == {"files", "hub", "index.json", "locks"}

    def present(*args):
        listed = cli("download", "--list", "--json", *args)
        assert listed.code == 0, listed.err
        return {row["name"] for row in json.loads(listed.out)["assets"] if row["present"] == "yes"}

    assert present("--config", config, "--cache-dir", place) == {"big", "model"}
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(place))
    assert present("--config", config) == {"big", "model"}
    monkeypatch.delenv("DMPCTL_CACHE_DIR")
    config.write_text(f"cache-dir = '{place}'\n" + config.read_text())
    assert present("--config", config) == {"big", "model"}
    config.write_text(config.read_text() + "\n[patch]\nbase = 'model'\nevaluate = false\n")
    needed = cli("download", "--for", config, "--config", config, "--json")
    assert [row["name"] for row in json.loads(needed.out)["files"]] == ["model"]

    before = files(place)
    plan = cli("download", "--prune", "--dry-run", "--json", "--cache-dir", place)
    assert (plan.code, files(place)) == (0, before)
    assert json.loads(plan.out)["bytes"] > len(CONTENT)
    assert cli("download", "--prune", "--cache-dir", place).code == 0
    assert {name for name in files(place) if not name.startswith(("locks/", "hub/.locks/"))} == {"index.json", "hub/CACHEDIR.TAG"}


def test_what_is_wrong_is_one_sentence(config, tmp_path, cli, monkeypatch):
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path / "cache"))
    for args, code, sentence in (
        (("incption",), 2, "incption is no known download"),
        (("dit-xl2-256",), 2, "for non-commercial use only: dit-xl2-256 (CC-BY-NC-4.0)"),
        (("--verify", "--prune"), 2, "--verify and --prune are two different things"),
        (("--for", tmp_path / "no.toml"), 3, "is not there"),
        (("fid-stats-coco",), 3, "has no address to fetch it from"),
        (("hf://nothing",), 2, "is no address on the Hub"),
    ):
        done = cli("download", *args)
        assert (done.code, done.out) == (code, ""), done.err
        assert sentence in done.err
        assert len(done.err.splitlines()) <= 2
    config.write_text("[assets.x]\nurll = 'https://x/y'\n")
    done = cli("download", "--config", config)
    assert done.err == f"error: {config} [assets.x]: urll is no key of an asset\nhint: did you mean url?\n"
