"""The stand-in for the Hub, with what `datasets` asks for besides: folders of a tree, facts of paths, ranges that end."""

import json
from typing import Any
from urllib.parse import parse_qs

from tests.standin import Answer, Handler, Standin


class DatasetsHandler(Handler):
    """`revision` in the address may go on with a folder; a POST asks about paths."""

    def do_POST(self) -> None:
        given = self.rfile.read(int(self.headers["Content-Length"])).decode()
        text = self.headers["Content-Type"].startswith("application/json")
        asked = json.loads(given)["paths"] if text else parse_qs(given).get("paths", [])
        self.server.asked.append(("POST", self.path, None))
        kind, owner, name, _ = self.path.removeprefix("/api/").split("/", 3)
        if (repository := self.repository(f"{kind}/{owner}/{name}")) is None:
            return
        entries = [self.entry(path, repository.files[path], tree=True) for path in asked if path in repository.files]
        entries += [folder(path) for path in asked if any(file.startswith(f"{path}/") for file in repository.files)]
        self.answer(entries)

    def api(self, path: str) -> None:
        kind, owner, name, *rest = path.split("/")
        if rest[:1] != ["tree"]:
            return super().api(path)
        if (repository := self.repository(f"{kind}/{owner}/{name}")) is None:
            return None
        start = "/".join(rest[2:])
        inside = [file for file in repository.files if not start or file.startswith(f"{start}/")]
        folders = sorted({"/".join(file.split("/")[:n]) for file in inside for n in range(1, file.count("/") + 1)})
        entries = [self.entry(file, repository.files[file], tree=True) for file in inside]
        return self.answer(entries + [folder(name) for name in folders if len(name) > len(start)])

    def answer(self, value: Any) -> None:
        body = json.dumps(value).encode()
        super().file(Answer(body=body), body, {"Content-Type": "application/json"})

    def file(self, answer: Answer, data: bytes, headers: dict[str, str]) -> None:
        first, _, last = (self.headers.get("Range") or "").removeprefix("bytes=").partition("-")
        if not last or int(last) >= len(data) or answer.status:
            return super().file(answer, data, headers)
        part = data[int(first) : int(last) + 1]
        self.send_response(206)
        for name, value in ({"Content-Range": f"bytes {first}-{last}/{len(data)}"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


def folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}


def hub() -> Standin:
    """A server that is not running yet."""
    server = Standin()
    server.RequestHandlerClass = DatasetsHandler
    return server
