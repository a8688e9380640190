"""A stand-in for the places that downloads come from, on this machine: plain files and a Hub in miniature, with their faults."""

import base64
import hashlib
import json
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "cafe"
LFS_FROM = 64  # bytes: larger files are stored as the Hub stores large ones


@dataclass(frozen=True)
class Answer:
    """How one request for a file is answered. `status` None: as it should be; `drop`: close after so many bytes.

    `ranges`: whether parts are given; `shift`: by how much the part that is given lies beside the one asked for;
    `pause`: sec between pieces of `piece` bytes; `body`: other bytes; `length`: whether the answer says how long it is;
    `gate`: the second half is sent when it is set.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: int | None = None
    ranges: bool = True
    shift: int = 0
    pause: float = 0.0
    piece: int = 1 << 16
    body: bytes | None = None
    length: bool = True
    gate: threading.Event | None = None


@dataclass
class Repository:
    """A repository of the Hub: files by path, at one commit."""

    files: dict[str, bytes]
    commit: str = COMMIT
    gated: bool = False


class Standin(ThreadingHTTPServer):
    """Serves `files` by path and `repositories` by `models/OWNER/NAME` or `datasets/OWNER/NAME`.

    `script`: path -> answers to its next requests, one each, then `always[path]`, or as it should be. `asked` holds what came.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.repositories: dict[str, Repository] = {}
        self.script: dict[str, deque[Answer]] = defaultdict(deque)
        self.always: dict[str, Answer] = {}
        self.asked: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """Variables under which a command finds nothing but this server, and caches of its own below `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
            "HF_HOME": str(home / "hf"),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }

    def answer_for(self, path: str) -> Answer:
        return self.script[path].popleft() if self.script[path] else self.always.get(path, Answer())

    def ranges(self, path: str) -> list[str | None]:
        """The Range of each GET for a path."""
        return [given for method, asked, given in self.asked if (method, asked) == ("GET", path)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who goes away in the middle is part of the tests."""


@contextmanager
def running() -> Iterator[Standin]:
    """A server until the end of the block."""
    with Standin() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Standin
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def do_POST(self) -> None:
        """What publishing takes: a repository is made, files are announced, and one commit brings them, all inline."""
        path, body = unquote(urlsplit(self.path).path), self.body()
        self.server.asked.append(("POST", path, None))
        if not self.headers.get("Authorization"):
            return self.plain(401)
        if path == "/api/repos/create":
            about = json.loads(body)
            name = f"{about['organization']}/{about['name']}"
            self.server.repositories.setdefault(f"models/{name}", Repository({}))
            return self.say({"url": f"{self.server.url}/{name}"})
        if path == "/api/validate-yaml":  # of a card
            return self.say({"errors": [], "warnings": []})
        kind, owner, name, what, _ = path.removeprefix("/api/").split("/")
        repository = self.server.repositories[f"{kind}/{owner}/{name}"]
        if what == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.say({"files": [file | {"shouldIgnore": False} for file in files]})
        lines = [json.loads(line) for line in body.splitlines()]
        sent = [line["value"] for line in lines if line["key"] == "file"]
        repository.files |= {file["path"]: base64.b64decode(file["content"]) for file in sent}
        url = f"{self.server.url}/{owner}/{name}/commit/{repository.commit}"
        self.say({"success": True, "commitOid": repository.commit, "commitUrl": url})

    def body(self) -> bytes:
        """What was sent, in one piece or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def say(self, value: object) -> None:
        """JSON."""
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/api/"):
            self.api(path.removeprefix("/api/"))
        elif "/resolve/" in path:
            self.resolve(path.lstrip("/"), path)
        elif path in self.server.files or self.server.script[path] or path in self.server.always:
            self.file(self.server.answer_for(path), self.server.files.get(path, b""), {})
        else:
            self.plain(404)

    def repository(self, name: str) -> Repository | None:
        """The repository, None after the refusal was sent."""
        found = self.server.repositories.get(name)
        if found is None:
            self.plain(404, {"X-Error-Code": "RepoNotFound"})
        elif found.gated and not self.headers.get("Authorization"):
            self.plain(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
            return None
        return found

    def api(self, path: str) -> None:
        kind, owner, name, *rest = path.split("/")
        repository = self.repository(f"{kind}/{owner}/{name}")
        if repository is None:
            return
        what, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        if revision not in ("main", repository.commit):
            return self.plain(404, {"X-Error-Code": "RevisionNotFound"})
        answer = self.server.answer_for(f"/api/{path}")
        if answer.status:
            return self.plain(answer.status, answer.headers)
        entries = [self.entry(file, data, tree=what == "tree") for file, data in repository.files.items()]
        about = {"id": f"{owner}/{name}", "sha": repository.commit, "siblings": entries, "private": False, "tags": []}
        body = json.dumps(entries if what == "tree" else about).encode()
        self.file(Answer(body=body), body, {"Content-Type": "application/json"})

    def entry(self, path: str, data: bytes, tree: bool) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        large = len(data) >= LFS_FROM
        lfs = {"lfs": {"oid" if tree else "sha256": digest, "size": len(data), "pointerSize": 130}} if large else {}
        oid = git_hash(digest.encode() if large else data)
        if tree:
            return {"type": "file", "oid": oid, "size": len(data), "path": path, **lfs}
        return {"rfilename": path, "blobId": oid, "size": len(data), **lfs}

    def resolve(self, path: str, whole: str) -> None:
        name, _, rest = path.partition("/resolve/")
        name = name if name.startswith("datasets/") else f"models/{name}"
        repository = self.repository(name)
        if repository is None:
            return
        data = repository.files.get(rest.split("/", 1)[1])
        if data is None:
            return self.plain(404, {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(data).hexdigest() if len(data) >= LFS_FROM else git_hash(data)
        answer = self.server.answer_for(whole) if self.command == "GET" else Answer()
        about = {"X-Repo-Commit": repository.commit, "ETag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        self.file(answer, data, about)

    def plain(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def file(self, answer: Answer, data: bytes, headers: dict[str, str]) -> None:
        if answer.status is not None:
            return self.plain(answer.status, answer.headers)
        body = data if answer.body is None else answer.body
        etag, start = headers.get("ETag", f'"{hashlib.sha256(data).hexdigest()[:16]}"'), 0
        given, unchanged = self.headers.get("Range"), self.headers.get("If-Range", etag) == etag
        if given and answer.ranges and unchanged:
            start = int(given.removeprefix("bytes=").split("-")[0]) + answer.shift
            if start >= len(body):
                return self.plain(416, {"Content-Range": f"bytes */{len(body)}"})
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        for name, value in ({"ETag": etag} | headers | answer.headers).items():
            self.send_header(name, value)
        if answer.length:
            self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        if self.command == "GET":
            self.send(body[start:] if answer.drop is None else body[start : start + answer.drop], answer)

    def send(self, body: bytes, answer: Answer) -> None:
        for begin in range(0, len(body), answer.piece):
            if answer.gate is not None and 2 * begin >= len(body):
                answer.gate.wait(300)
            self.wfile.write(body[begin : begin + answer.piece])
            self.wfile.flush()
            time.sleep(answer.pause)

    def log_message(self, *_: object) -> None:
        pass
