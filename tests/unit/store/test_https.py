"""One file over https, against a server on this machine: what comes whole and right is kept, in the face of every fault."""

import hashlib
import json
import socket
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.settings.assets import AssetRow
from dmpctl.store import cache, https
from dmpctl.store.https import fetch_file, retry_after
from tests.helpers import files, largest_file
from tests.standin import Answer, Repository, running

CONTENT = bytes(range(256)) * 9000  # more than two chunks
DIGEST = hashlib.sha256(CONTENT).hexdigest()
PATH = "/there/good.bin"


class Talk:
    """A progress that remembers."""

    def __init__(self):
        self.said, self.tracked, self.done = [], [], 0

    def track(self, what, total, start=0, unit="it"):
        self.tracked.append((what, total, start, unit))
        return self

    def say(self, message):
        self.said.append(message)

    def advance(self, by=1, **_):
        self.done += by

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture
def server():
    with running() as standin:
        standin.files[PATH] = CONTENT
        yield standin


@pytest.fixture
def get(server, pauses, tmp_path):
    """Fetch PATH into tmp_path/good.bin: the facts, and the talk."""

    def fetch(talk=None, path=PATH, sha256=DIGEST, size=None):
        return fetch_file(
            AssetRow(name="thing", url=server.url + path, sha256=sha256, size=size), tmp_path / "good.bin", talk or Talk()
        )

    return fetch


def whole(tmp_path):
    return files(tmp_path) == {"good.bin"} and (tmp_path / "good.bin").read_bytes() == CONTENT


def test_what_comes_whole_is_kept(get, server, tmp_path):
    talk = Talk()
    assert get(talk) == cache.Fact(sha256=DIGEST, size=len(CONTENT))
    assert whole(tmp_path)
    assert talk.tracked == [("fetching thing", len(CONTENT), 0, "B")]
    assert (talk.done, talk.said) == (len(CONTENT), [])


@pytest.mark.parametrize("sha256", [DIGEST, None])
def test_a_connection_that_drops_is_gone_on_with(get, server, pauses, tmp_path, sha256):
    server.script[PATH] += [Answer(drop=1_500_000), Answer(drop=100_000)]
    talk = Talk()
    get(talk, sha256=sha256)
    assert whole(tmp_path)
    assert server.ranges(PATH) == [None, "bytes=1500000-", "bytes=1600000-"]
    assert "the connection ended after 1500000 of 2304000 bytes" in talk.said[0]
    assert (talk.tracked[1][2], talk.done, len(pauses)) == (1_500_000, len(CONTENT), 2)


def test_a_server_without_ranges_starts_anew(get, server, tmp_path):
    server.script[PATH] += [Answer(drop=1_500_000), Answer(ranges=False)]
    get()
    assert whole(tmp_path)


def test_another_part_than_asked_for_is_not_glued_on(get, server, tmp_path):
    server.script[PATH] += [Answer(drop=1_500_000), Answer(shift=-7)]
    talk = Talk()
    get(talk, sha256=None)
    assert whole(tmp_path)
    assert server.ranges(PATH) == [None, "bytes=1500000-", None]
    assert "another part of the file" in talk.said[1]


def test_a_file_that_changed_meanwhile_starts_anew(get, server, tmp_path):
    """If-Range: the old half never meets the new one, even where no hash is known."""
    server.script[PATH] += [Answer(drop=1_500_000, headers={"ETag": '"old"'}, body=b"x" * 2_000_000)]
    get(sha256=None)
    assert whole(tmp_path)


def test_without_validator_and_hash_nothing_is_gone_on_with(get, server, tmp_path):
    server.script[PATH] += [Answer(drop=1_500_000, headers={"ETag": 'W/"weak"'}), Answer(headers={"ETag": 'W/"weak"'})]
    get(sha256=None)
    assert whole(tmp_path)
    assert server.ranges(PATH) == [None, None]


def test_a_whole_part_needs_no_request(get, server, tmp_path):
    """Killed between the last byte and the rename."""
    (tmp_path / "good.bin.part").write_bytes(CONTENT)
    state = {"url": server.url + PATH, "validator": '"x"', "total": len(CONTENT)}
    (tmp_path / "good.bin.part.json").write_text(json.dumps(state))
    get()
    assert whole(tmp_path)
    assert server.asked == []


@pytest.mark.parametrize("state", ["", "{", "[]", '{"url": "https://elsewhere/good.bin", "validator": "x"}'])
def test_a_part_of_something_else_is_thrown_away(get, server, tmp_path, state):
    (tmp_path / "good.bin.part").write_bytes(b"half")
    if state:
        (tmp_path / "good.bin.part.json").write_text(state)
    get()
    assert whole(tmp_path)
    assert server.ranges(PATH) == [None]


def test_a_part_that_is_too_long_starts_anew(get, server, tmp_path):
    (tmp_path / "good.bin.part").write_bytes(CONTENT + b"more")
    (tmp_path / "good.bin.part.json").write_text(json.dumps({"url": server.url + PATH, "validator": None, "total": None}))
    get()
    assert whole(tmp_path)
    assert server.ranges(PATH) == [f"bytes={len(CONTENT) + 4}-", None]


def test_wrong_bytes_leave_nothing(get, server, tmp_path):
    server.script[PATH] += [Answer(body=CONTENT[:-1] + b"x")]
    with pytest.raises(IntegrityError, match=rf"gave sha256 [0-9a-f]{{64}}, expected {DIGEST}") as failure:
        get()
    assert failure.value.exit_code == 4
    assert files(tmp_path) == set()
    get()
    assert whole(tmp_path)


def test_another_size_is_refused_before_it_comes(get, server, tmp_path):
    talk = Talk()
    with pytest.raises(IntegrityError, match="has 2304000 bytes, expected 5"):
        get(talk, size=5)
    assert (files(tmp_path), talk.done) == (set(), 0)


@pytest.mark.parametrize(
    ("answer", "code", "sentence", "hint"),
    [
        (Answer(404), 3, r"there is nothing at http.*good.bin \(HTTP 404", "by hand"),
        (Answer(410), 3, "there is nothing at", "by hand"),
        (Answer(401), 3, r"refuses access \(HTTP 401", "by hand"),
        (Answer(403), 3, r"refuses access \(HTTP 403", "by hand"),
        (Answer(418), 3, r"cannot fetch .*\(HTTP 418", "by hand"),
        (Answer(headers={"Content-Type": "text/html; charset=utf-8"}), 4, "gave a web page, not a file", "browser"),
        (Answer(302, {"Location": "http://example.org/good.bin"}), 3, "redirects to an address that is not https", "browser"),
        (Answer(302, {"Location": "file:///etc/hostname"}), 3, "not allowed", "by hand"),
    ],
)
def test_what_stays_as_it_is_is_not_asked_for_again(get, server, pauses, tmp_path, answer, code, sentence, hint):
    server.script[PATH] += [answer]
    with pytest.raises((MissingError, IntegrityError), match=sentence) as failure:
        get()
    assert failure.value.exit_code == code
    assert hint in failure.value.hint
    assert (pauses, len(server.asked), files(tmp_path)) == ([], 1, set())


def test_a_gated_file_of_the_hub_names_its_page_and_the_token(get, server):
    path = "/owner/name/resolve/main/a.bin"
    server.repositories["models/owner/name"] = Repository({"a.bin": CONTENT}, gated=True)
    with pytest.raises(MissingError, match="refuses access") as failure:
        get(path=path)
    assert failure.value.hint == f"open {server.url}/owner/name and accept its terms, set HF_TOKEN, and name it hf://"


def test_redirects_are_followed_and_keep_the_range(get, server, tmp_path):
    server.files["/elsewhere.bin"] = CONTENT
    server.script[PATH] += [Answer(drop=1_200_000), *[Answer(302, {"Location": "/elsewhere.bin"})] * 2]
    get()
    assert whole(tmp_path)
    assert server.ranges("/elsewhere.bin") == ["bytes=1200000-"]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_in_trouble_is_asked_again_with_growing_pauses(get, server, pauses, tmp_path, status):
    server.script[PATH] += [Answer(status)] * 4
    talk = Talk()
    get(talk)
    assert whole(tmp_path)
    assert len(talk.said) == 4
    assert f"HTTP {status}" in talk.said[0]
    assert all(2**k / 2 <= pause <= 2**k for k, pause in enumerate(pauses))


def test_retry_after_in_seconds_and_as_a_date(get, server, pauses, tmp_path):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    server.script[PATH] += [Answer(429, {"Retry-After": "17"}), Answer(503, {"Retry-After": date})]
    get()
    assert whole(tmp_path)
    assert pauses[0] == 17
    assert 35 < pauses[1] <= 40
    assert [retry_after(value) for value in (None, "soon", "0", "Wed, 21 Oct 2015 07:28:00 GMT")] == [None, None, 0, 0]


def test_a_server_that_asks_for_an_hour_is_not_waited_for(get, server, pauses):
    server.script[PATH] += [Answer(429, {"Retry-After": "3600"})]
    with pytest.raises(MissingError, match=r"HTTP 429 .*it asks to wait 3600 s"):
        get()
    assert pauses == []


def test_it_gives_up_after_some_failures_in_a_row(get, server, pauses, tmp_path):
    server.always[PATH] = Answer(503)
    with pytest.raises(MissingError, match=r"HTTP 503.*after 6 attempts") as failure:
        get()
    assert failure.value.exit_code == 3
    assert (len(pauses), len(server.asked)) == (5, 6)


def test_getting_further_is_no_failure_in_a_row(get, server, pauses, tmp_path, monkeypatch):
    monkeypatch.setattr(https, "CHUNK", 1 << 16)
    server.script[PATH] += [Answer(drop=200_000)] * 11
    get()
    assert whole(tmp_path)
    assert len(pauses) == 11
    assert max(pauses) <= 1


def test_a_part_that_stays_the_same_ends(get, server, pauses, tmp_path):
    server.always[PATH] = Answer(drop=300)
    with pytest.raises(MissingError, match="the connection ended after"):
        get()
    assert 1500 <= (tmp_path / "good.bin.part").stat().st_size <= 2000
    del server.always[PATH]
    get()
    assert whole(tmp_path)


def test_half_a_file_is_never_taken_for_a_whole_one(get, server, tmp_path):
    """A server that does not say how long the file is can end it anywhere: only a known hash or size can tell."""
    server.script[PATH] += [Answer(length=False)]
    with pytest.raises(IntegrityError, match="does not say how long it is") as failure:
        get(sha256=None)
    assert "[assets.NAME]" in failure.value.hint
    server.script[PATH] += [Answer(length=False, drop=1000)]
    with pytest.raises(IntegrityError, match="gave 1000 bytes, expected 2304000"):
        get(sha256=None, size=len(CONTENT))
    assert files(tmp_path) == set()
    server.script[PATH] += [Answer(length=False)]
    get()
    assert whole(tmp_path)


def test_nobody_answers(pauses, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/x.bin"
        with pytest.raises(MissingError, match=r"no connection .*Connection refused"):
            fetch_file(AssetRow(name="thing", url=url), tmp_path / "x.bin", Talk())
    assert len(pauses) == 5
    assert files(tmp_path) == set()


def test_the_disk_is_looked_at_first(get, tmp_path, free_bytes):
    talk = Talk()
    free_bytes(cache.MARGIN + len(CONTENT) - 1)
    with pytest.raises(UsageError, match=r"thing needs 2\.3 MB in .*, 69\.4 MB are free") as failure:
        get(talk)
    assert "--cache-dir" in failure.value.hint
    assert (talk.done, files(tmp_path)) == (0, set())
    free_bytes(cache.MARGIN + len(CONTENT))
    get()
    assert whole(tmp_path)


def test_a_full_disk_is_no_matter_of_the_connection(get, pauses, tmp_path):
    with largest_file(len(CONTENT) - 1), pytest.raises(UsageError, match="File too large") as failure:
        get()
    assert "free some space" in failure.value.hint
    assert pauses == []
    assert not (tmp_path / "good.bin").exists()


def test_ctrl_c_keeps_what_came(get, server, tmp_path):
    class Stopped(Talk):
        def advance(self, by=1, **_):
            super().advance(by)
            if self.done > 1_000_000:
                raise KeyboardInterrupt

    talk = Stopped()
    with pytest.raises(KeyboardInterrupt):
        get(talk)
    assert "stopped" in talk.said[-1]
    kept = (tmp_path / "good.bin.part").stat().st_size
    assert kept > 1_000_000
    get()
    assert whole(tmp_path)
    assert server.ranges(PATH) == [None, f"bytes={kept}-"]


def test_a_proxy_is_used(server, pauses, tmp_path, monkeypatch):
    """HTTP_PROXY and NO_PROXY: the request for another host goes to the proxy, unless that host is left out."""
    server.files["http://127.0.0.2:1/good.bin"] = CONTENT
    server.files["/good.bin"] = CONTENT
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    wanted = AssetRow(name="thing", url="http://127.0.0.2:1/good.bin", sha256=DIGEST)
    fetch_file(wanted, tmp_path / "good.bin", Talk())
    assert whole(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.2")
    with pytest.raises(MissingError, match="no connection"):
        fetch_file(wanted, tmp_path / "other.bin", Talk())
