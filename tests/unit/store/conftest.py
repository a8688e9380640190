"""Nothing here waits, asks a proxy or leaves this machine."""

import socket

import pytest

from dmpctl.store import https


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited for."""
    noted: list[float] = []
    monkeypatch.setattr(https, "sleep", noted.append)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return noted


@pytest.fixture
def no_connection(monkeypatch: pytest.MonkeyPatch):
    """Call it: from then on a connection is a failure."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection")

    return lambda: monkeypatch.setattr(socket.socket, "connect", refuse)
