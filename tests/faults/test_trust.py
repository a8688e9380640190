"""Files, servers, names and disks of strangers do nothing that was not asked for, and that is said in one sentence."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dmpctl.batches.shards import Claims, Shards
from dmpctl.errors import IntegrityError, InUse, MissingError
from dmpctl.files import locked, read_json, read_tensors, write_json, write_tensors
from dmpctl.pages.page import render
from dmpctl.runs.rundir import RunDir
from dmpctl.settings.assets import AssetRow
from dmpctl.store import https
from dmpctl.store.cache import Fetched, changing_index
from dmpctl.store.fetch import entry_of
from dmpctl.store.https import fetch_file
from dmpctl.store.registry import row_at
from dmpctl.training.trackers import Trackers
from dmpctl.types import Silent
from dmpctl.words import fit_to_show, redacted
from tests.helpers import copied, environment, files, write_by_hand

SECRETS = {
    "https://ada:hunter22@host.example/a.safetensors": "hunter22",
    "https://ada@host.example/a.safetensors": "ada",
    "https://b.s3.amazonaws.com/a.pt?X-Amz-Credential=AKIDEXAMPLE%2F2026&X-Amz-Signature=5ec2e7ffff&X-Amz-Date=1": "5ec2e7ffff",
    "https://b.s3.amazonaws.com/a.pt?AWSAccessKeyId=x&Signature=5ec2e7ffff%3D": "5ec2e7ffff",
    "https://a.blob.core.windows.net/c/a.pt?sv=2022&sig=5ec2e7ffff%3D": "5ec2e7ffff",
    "https://storage.googleapis.com/b/a.pt?X-Goog-Signature=5ec2e7ffff": "5ec2e7ffff",
    "https://host.example/a.pt?token=5ec2e7ffff": "5ec2e7ffff",
    "https://host.example/a.pt?x=1&api_key=5ec2e7ffff#there": "5ec2e7ffff",
    "https://host.example/a.pt?a=1&key=5ec2e7ffff": "5ec2e7ffff",
    "https:/ada:hunter22@host.example/as/a/Path": "hunter22",
    "hf_5ec2e7ffffAbCd": "5ec2e7ffff",
    "Authorization: Bearer 5ec2e7ffff.x": "5ec2e7ffff",
    "ghp_5ec2e7ffff5ec2e7ffff5ec2e7ffff": "5ec2e7ffff",
}
PLAIN = (
    "hf://owner/name@main/a.pt",
    "hf://datasets/cifar10@refs/convert/parquet",
    "https://host.example/a.pt?download=true&x=1",
    "runs/me@home/patch.safetensors",
    "C:/data/a@b.png",
    "a key=value pair, a token of thanks",
)


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_not_shown(text):
    for around in (text, f"cannot fetch {text} (HTTP 403)", json.dumps({"a": text}), f'<a href="{text.replace("&", "&amp;")}">'):
        assert SECRETS[text] not in redacted(around)
        assert redacted(redacted(around)) == redacted(around)
    assert "host.example" not in text or "host.example" in redacted(text)


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_stays(text):
    assert redacted(text) == text


URL = "https://ada:hunter22@127.0.0.1:1/a.safetensors?X-Amz-Signature=5ec2e7ffff"


def hidden(text: str) -> bool:
    return "hunter22" not in text and "5ec2e7ffff" not in text


def test_secrets_are_neither_printed_nor_recorded(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dmpctl", "patch", "--base", URL, "--token", "hf_5ec2e7ffffAbCd"])
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path / "cache"))
    for line in (("patch", "--base", URL, "--dry-run"), ("download", URL, "--offline"), ("sample", URL), ("fid", URL, "--json")):
        done = cli(*line)
        assert done.code != 0
        assert hidden(done.out + done.err), line
    assert hidden(cli("patch", "--base", URL, "--print-config").out)
    assert hidden(cli("patch", "--base", URL, "--print-config", "--json").out)
    with RunDir(tmp_path / "run") as run:
        run.begin("patch", {"base": URL}, {"base": {"base": URL}}, {"backbone": URL})
        run.refuse_other("patch", {"base": URL})  # the same experiment still
    write_json(tmp_path / "run" / "x.json", {URL: URL, "list": [{"deep": URL}]})
    write_tensors(tmp_path / "run" / "x.safetensors", {"x": torch.ones(1)}, {"data": URL})
    shown = {"title": URL, "step": 1, "judgement": [URL], "rows": [{"site": URL}], "weights": b"", "similarity": b""}
    page = render("gates", SimpleNamespace(**shown))
    (tmp_path / "run" / "page.html").write_bytes(page)
    assert all(hidden((tmp_path / "run" / name).read_text(errors="replace")) for name in files(tmp_path / "run"))


def test_an_address_with_a_new_signature_is_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path))
    one, two = (row_at(f"https://host.example/a.pt?X-Amz-Signature={word}") for word in ("one1", "two2"))
    assert one.name == two.name
    with changing_index() as index:
        index.entries[one.name] = Fetched(source=one.source, licence="", fetched="now", wanted=one.patterns)
    assert "one1" not in (tmp_path / "index.json").read_text()
    assert entry_of(two) is not None


def test_trackers_are_told_no_secret(tmp_path, monkeypatch):
    told = []

    class Tracker:
        def __init__(self, *_, **__):
            pass

        start = finish = lambda self: None

        def store_init_configuration(self, values):
            told.append(values)

    monkeypatch.setattr("dmpctl.training.trackers.LOGGER_TYPE_TO_CLASS", {"wandb": Tracker})
    (tmp_path / "run").mkdir()
    Trackers(Silent()).start("wandb", RunDir(tmp_path / "run"), {"base": URL, "iters": 3})
    assert told[0]["iters"] == 3
    assert hidden(told[0]["base"])


HOSTILE = "red\x1b[31m\x1b]0;title\x07\x9b2J \u202egnp.exe\u200b \x08\r"


def test_text_of_others_cannot_steer_the_terminal(cli, finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    about = read_json(run / "patch.json")
    write_by_hand(
        run / "patch.json",
        {**about, "data": {**about["data"], "name": HOSTILE}, "backbone": {**about["backbone"], "base": HOSTILE}},
    )
    for line in (("sample", run), ("fid", run), ("report", run), ("push", run, "hf://me/x", "--dry-run"), ("fid", f"a{HOSTILE}")):
        done = cli(*line)
        assert all(c.isprintable() or c == "\n" for c in done.out + done.err), line
    assert fit_to_show("plain ± “words”\nand lines") == "plain ± “words”\nand lines"


class Hostile(BaseHTTPRequestHandler):
    """Chunks without end; a reason phrase that moves the cursor; redirects to anywhere."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/").replace("_", ":", 1))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if self.path == "/reason":
            self.wfile.write(b"HTTP/1.1 404 \x1b[2J\x1b[31mgone\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return None
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        except OSError:
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def hostile():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("about", [{}, {"size": 3_000_000}, {"sha256": "0" * 64}])
def test_a_download_that_does_not_end_is_ended(hostile, tmp_path, monkeypatch, about):
    monkeypatch.setattr(https, "UNANNOUNCED", 5_000_000)
    with pytest.raises(IntegrityError, match=r"gives more than [35] MB, and does not end"):
        fetch_file(AssetRow(name="x", url=f"{hostile}/x.bin", **about), tmp_path / "x.bin", Silent())
    assert files(tmp_path) == set()


@pytest.mark.parametrize("target", ["ftp_//127.0.0.1/x", "file_///etc/hostname", "http_//example.org/x", "data_,x"])
def test_a_redirect_to_another_scheme_is_not_followed(hostile, tmp_path, monkeypatch, target):
    monkeypatch.setattr(https, "sleep", lambda _: None)
    with pytest.raises(MissingError):
        fetch_file(AssetRow(name="x", url=f"{hostile}/to/{target}"), tmp_path / "x", Silent())
    assert not (tmp_path / "x").exists()


def test_a_reason_phrase_cannot_steer_the_terminal(cli, hostile, tmp_path):
    done = cli("download", f"{hostile}/reason", "--cache-dir", tmp_path)
    assert done.code == 3
    assert "\\x1b[2J" in done.err
    assert "\x1b" not in done.err


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def no_locks(request, monkeypatch):
    """A file system that knows no locks: an NFS mount without its daemon, some FUSE and parallel ones."""

    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    return request.param


def test_a_run_on_a_disk_without_locks(no_locks, tmp_path):
    with RunDir(tmp_path / "run"):
        with pytest.raises(InUse, match=f"is in use by .*{os.getpid()}") as refused, RunDir(tmp_path / "run"):
            pass
        assert refused.value.hint.startswith("wait for it")
        (tmp_path / "run" / "config.json").write_text("{}")
    with RunDir(tmp_path / "run"):
        pass


def test_a_lock_that_a_dead_process_left_on_such_a_disk_is_taken_over(no_locks, tmp_path):
    code = f"""
import errno, fcntl, os, pathlib
def refuse(*_): raise OSError({no_locks}, "no")
fcntl.flock = refuse
from dmpctl.files import locked
with locked(pathlib.Path({str(tmp_path / ".lock")!r})) as held:
    os._exit(0 if held else 1)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
    with locked(tmp_path / ".lock", wait=False) as held:
        assert held


def test_shards_are_made_on_a_disk_without_locks(no_locks, tmp_path):
    shards = Shards(tmp_path, "things", {}, 3, 3, {})
    shards.folder.mkdir(parents=True)
    with Claims(shards) as claims:
        assert claims.take(0)  # else it would wait for nobody, for ever
        claims.give_back(0)


def npz_of(path, header: bytes, body: bytes = b"", name: str = "arr_0.npy"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body)


def npy_header(shape, descr="|u1") -> bytes:
    return (repr({"descr": descr, "fortran_order": False, "shape": shape}) + "\n").encode()


@pytest.mark.parametrize(
    "shape",
    [(2, 60_000, 60_000, 3), (10**12, 8, 8, 3), (2**62, 2**62, 2**62, 3), (100, 8, 8, 3)],
    ids=["60000x60000", "10^12 images", "over int64", "short"],
)
def test_an_npz_that_holds_less_than_it_says_fills_no_memory(cli, tmp_path, shape):
    npz_of(tmp_path / "x.npz", npy_header(shape), bytes(1000))
    done = cli("fid", tmp_path / "x.npz", "--reference", "digits", "--extractor", "pixels", "--allow-small", "--cpu")
    assert (done.code, "this is a bug" in done.err) == (4, False), done.err


@pytest.mark.parametrize("name", ["mu", "sigma"])
def test_statistics_that_hold_less_than_they_say(cli, tmp_path, name):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for each in ("mu", "sigma"):
            header = npy_header((60_000, 60_000) if each == name else (4,), "<f8")
            archive.writestr(f"{each}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(32))
    done = cli("fid", tmp_path / "x.npz", "--reference", tmp_path / "x.npz")
    assert (done.code, "this is a bug" in done.err) == (4, False), done.err


@pytest.mark.parametrize("change", [{"depth": 10**9}, {"hidden_size": 4 * 10**8}, {"input_size": 10**8}, {"num_classes": 10**12}])
def test_a_file_that_describes_more_than_it_holds_fills_no_memory(cli, conditional, tmp_path, change):
    tensors, metadata = read_tensors(conditional / "backbone.safetensors")
    (key,) = (name for name in metadata if name.startswith("dmpctl."))
    about = json.loads(metadata[key])
    metadata[key] = json.dumps({**about, "config": {**about["config"], **change}})
    write_tensors(tmp_path / "x.safetensors", tensors, metadata)
    done = cli("sample", tmp_path / "x.safetensors", "--dry-run", "--cpu")
    assert (done.code, "larger model than its" in done.err) == (4, True), done.err


def test_a_patch_that_describes_more_than_it_holds_fills_no_memory(cli, finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    about = read_json(run / "patch.json")
    write_by_hand(run / "patch.json", {**about, "method": {**about["method"], "prompts": 10**11}})
    done = cli("sample", run, "--dry-run", "--cpu")
    assert (done.code, "larger model than its" in done.err) == (4, True), done.err


def test_a_folder_of_diffusers_that_describes_more_than_it_holds_fills_no_memory(cli, tmp_path):
    about = {"_class_name": "DiTTransformer2DModel", "num_layers": 10**9, "num_attention_heads": 2, "attention_head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(about))
    write_tensors(tmp_path / "diffusion_pytorch_model.safetensors", {"x": torch.zeros(2)})
    done = cli("patch", "--base", tmp_path, "--data", "digits", "--dry-run", "--cpu")
    assert (done.code, "larger model than its" in done.err) == (4, True), done.err


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "9" * 5000])
def test_settings_that_are_too_deep_or_too_long_are_refused(cli, tmp_path, text):
    (tmp_path / "x.toml").write_text(text)
    done = cli("patch", "--config", tmp_path / "x.toml", "--dry-run")
    assert (done.code, "this is a bug" in done.err) == (2, False), done.err


def test_a_picture_that_unpacks_into_gigabytes_is_refused(cli, finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    line = ("sample", run, "--cpu", "--sampler", "ddim", "--steps", "2", "--num-images", "3", "--json")
    folder = json.loads(cli(*line).out)["out"]
    Image.new("1", (20_000, 20_000)).save(f"{folder}/000001.png")
    done = cli("fid", folder, "--reference", "digits", "--allow-small", "--cpu")
    assert (done.code, "000001.png" in done.err) == (4, True), done.err
