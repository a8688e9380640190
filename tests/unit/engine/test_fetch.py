"""Downloads, against a server on this machine: what comes whole and right is kept, all else leaves nothing."""

import hashlib
import socket
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dmpctl.cli.console import Silent
from dmpctl.engine import fetch
from dmpctl.engine.fetch import Asset
from dmpctl.errors import IntegrityError, MissingError, UsageError
from tests.helpers import settings_for

CONTENT = bytes(range(256)) * 9000  # more than two chunks
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """/good.bin, /short.bin (says more than it sends), /plain.bin (no length), /garbage.bin (no HTTP), else 404."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path == "/garbage.bin":
            self.wfile.write(b"this is no HTTP\r\n\r\n")
        elif self.path in ("/good.bin", "/short.bin", "/plain.bin"):
            self.send_response(200)
            if self.path != "/plain.bin":
                self.send_header("Content-Length", str(len(CONTENT) + (self.path == "/short.bin")))
            self.end_headers()
            self.wfile.write(CONTENT)
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.asked = []
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "dmpctl"


@pytest.fixture
def asset(server, cache, monkeypatch):
    def known(file: str, sha256: str | None = DIGEST, size: int | None = None) -> None:
        url = f"http://127.0.0.1:{server.server_port}/{file}"
        monkeypatch.setattr(fetch, "ASSETS", {"thing": Asset("thing", "a thing", url, "MIT", sha256, size)})

    return known


def download(*names: str, **given: object):
    return fetch.download(settings_for("download", **given), names, Silent())


@pytest.mark.parametrize("file", ["good.bin", "plain.bin"])
def test_what_comes_whole_is_kept_and_not_fetched_again(asset, server, cache, file):
    asset(file)
    report = download("thing")
    assert report.data["files"] == [{"name": "thing", "path": str(cache / file), "sha256": DIGEST, "licence": "MIT"}]
    assert (cache / file).read_bytes() == CONTENT
    assert [path.name for path in cache.iterdir()] == [file]
    assert fetch.cached("thing") == cache / file
    assert download("thing").data == report.data
    assert server.asked == [f"/{file}"]


def test_a_hash_that_is_not_known_is_reported(asset, cache):
    asset("good.bin", sha256=None)
    assert download("thing").data["files"][0]["sha256"] == DIGEST


def test_something_else_leaves_nothing(asset, cache):
    asset("good.bin", sha256="0" * 64)
    with pytest.raises(IntegrityError, match=f"gave sha256 {DIGEST}, expected {'0' * 64}") as failure:
        download("thing")
    assert failure.value.exit_code == 4
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("file", "sentence"), [("none.bin", "Not Found"), ("garbage.bin", "cannot fetch")])
def test_what_is_not_there(asset, cache, file, sentence):
    asset(file)
    with pytest.raises(MissingError, match=sentence) as failure:
        download("thing")
    assert failure.value.exit_code == 3
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("file", "size"), [("short.bin", None), ("plain.bin", len(CONTENT) + 5)])
def test_half_a_file_is_never_taken_for_a_whole_one(asset, cache, file, size):
    """Not even where its hash is not known."""
    asset(file, sha256=None, size=size)
    with pytest.raises(MissingError, match=f"the connection ended after {len(CONTENT)} of {size or len(CONTENT) + 1} bytes"):
        download("thing")
    assert list(cache.iterdir()) == []


def test_nobody_answers(cache, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/x.bin"
        monkeypatch.setattr(fetch, "ASSETS", {"thing": Asset("thing", "a thing", url, "MIT")})
        with pytest.raises(MissingError, match="Connection refused"):
            download("thing")
    assert list(cache.iterdir()) == []


def test_offline_opens_no_connection(asset, server, cache, monkeypatch):
    asset("good.bin")

    def refuse(*_, **__):
        raise AssertionError("a connection")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(MissingError, match="--offline forbids fetching it") as failure:
        download("thing", offline=True)
    assert (failure.value.exit_code, failure.value.hint) == (3, "run dmpctl download thing online")
    assert not cache.exists()
    assert server.asked == []
    cache.mkdir()
    (cache / "good.bin").write_bytes(CONTENT)
    assert download("thing", offline=True).data["files"][0]["sha256"] == DIGEST


def test_a_cached_file_is_verified_before_use(asset, cache):
    asset("good.bin")
    cache.mkdir()
    (cache / "good.bin").write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(IntegrityError, match=r"good\.bin has sha256 [0-9a-f]{64}, expected ") as failure:
        download("thing")
    assert "delete it" in failure.value.hint


def test_leftovers_of_a_killed_download_do_not_matter(asset, cache):
    asset("good.bin")
    cache.mkdir()
    (cache / "good.bin.part").write_bytes(b"half")
    assert fetch.cached("thing") is None
    download("thing")
    assert [path.name for path in cache.iterdir()] == ["good.bin"]


def test_a_cache_that_cannot_be_written(asset, cache):
    asset("good.bin")
    cache.write_text("a file")
    with pytest.raises(UsageError, match="cannot write to"):
        download("thing")


def test_a_full_disk_is_no_matter_of_the_connection(asset, cache, monkeypatch):
    asset("good.bin")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UsageError, match="No space left on device") as failure:
        download("thing")
    assert "free some space" in failure.value.hint
    assert list(cache.iterdir()) == []


def test_a_dry_run_fetches_nothing(asset, server, cache):
    asset("good.bin")
    assert download("thing", dry_run=True).data == {"files": []}
    assert server.asked == []
    assert not cache.exists()


def test_names(cache):
    with pytest.raises(UsageError, match="incption is no known download") as failure:
        download("incption")
    assert failure.value.hint == "did you mean inception?"
    rows = download().data["assets"]
    assert [row["name"] for row in rows] == ["inception", "dit-xl2-256", "dit-xl2-512"]
    assert {row["present"] for row in rows} == {"no"}
    assert all(asset.url.startswith("https://") for asset in fetch.ASSETS.values())
