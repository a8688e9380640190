"""`dmpctl download`: files that the tool uses and may not ship, fetched over https, verified, put in place by one rename."""

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import fsync, make_folder, sha256_of, writing
from dmpctl.settings.model import Settings
from dmpctl.types import Progress, Report

CHUNK = 1 << 20


@dataclass(frozen=True)
class Asset:
    """A file elsewhere. `sha256` and `size` (bytes) None: not known, recorded in the report after the download."""

    name: str
    what: str
    url: str
    licence: str
    sha256: str | None = None
    size: int | None = None

    @property
    def file(self) -> str:
        return self.url.rsplit("/", 1)[1]


FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
DIT = "https://dl.fbaipublicfiles.com/DiT/models/"
ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            "inception",
            "Inception-v3 for FID",
            FIDELITY + "weights-inception-2015-12-05-6726825d.pth",
            "Apache-2.0",
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            95_628_359,
        ),
        Asset("dit-xl2-256", "DiT-XL/2, ImageNet 256", DIT + "DiT-XL-2-256x256.pt", "CC-BY-NC-4.0"),
        Asset("dit-xl2-512", "DiT-XL/2, ImageNet 512", DIT + "DiT-XL-2-512x512.pt", "CC-BY-NC-4.0"),
    )
}


def cache_dir() -> Path:
    """Where downloads lie: $XDG_CACHE_HOME/dmpctl, by default ~/.cache/dmpctl."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dmpctl"


def cached(name: str) -> Path | None:
    """The file of an asset if it was downloaded, None if not."""
    path = cache_dir() / ASSETS[name].file
    return path if path.is_file() else None


def download(settings: Settings, names: Sequence[str], progress: Progress) -> Report:
    """Fetch assets by name; without a name, list them. What is there and has the right hash is kept."""
    unknown = [name for name in names if name not in ASSETS]
    if unknown:
        from difflib import get_close_matches

        near = get_close_matches(unknown[0], ASSETS, 1)
        raise UsageError(
            f"{unknown[0]} is no known download", f"did you mean {near[0]}?" if near else f"known: {', '.join(ASSETS)}"
        )
    if not names:
        rows = tuple(_row(asset) for asset in ASSETS.values())
        return Report({"assets": list(rows), "cache": str(cache_dir())}, rows, (f"cache: {cache_dir()}",))
    done: list[dict[str, Any]] = []
    for asset in (ASSETS[name] for name in names):
        target = cache_dir() / asset.file
        if not target.is_file():
            if settings.console.dry_run:
                progress.say(f"would fetch {asset.url}")
                continue
            if settings.console.offline:
                raise MissingError(
                    f"{asset.name} is not in {cache_dir()} and --offline forbids fetching it",
                    f"run dmpctl download {asset.name} online",
                )
            fetch(asset, target, progress)
        done.append({"name": asset.name, "path": str(target), "sha256": _verified(asset, target), "licence": asset.licence})
    return Report({"files": done}, tuple({k: str(v) for k, v in row.items()} for row in done))


def _row(asset: Asset) -> dict[str, str]:
    size = "unknown" if asset.size is None else f"{asset.size / 1e6:.0f} MB"
    return {
        "name": asset.name,
        "what": asset.what,
        "size": size,
        "licence": asset.licence,
        "present": "yes" if cached(asset.name) else "no",
    }


def _verified(asset: Asset, path: Path) -> str:
    actual = sha256_of(path)
    if asset.sha256 not in (None, actual):
        raise IntegrityError(
            f"{path} has sha256 {actual}, expected {asset.sha256}", f"delete it and run dmpctl download {asset.name} again"
        )
    return actual


def fetch(asset: Asset, target: Path, progress: Progress) -> None:
    """Download into `target`.part, check size and hash, rename.

    MissingError if it cannot be fetched as a whole, IntegrityError if something else came, UsageError on a full disk.
    """
    part = make_folder(target.parent) / f"{target.name}.part"
    try:
        digest = _receive(asset, part, progress)
        if asset.sha256 not in (None, digest):
            raise IntegrityError(
                f"{asset.url} gave sha256 {digest}, expected {asset.sha256}", "try again; if it stays, the file there has changed"
            )
        with writing(target):
            part.replace(target)
            fsync(target.parent)
    finally:
        part.unlink(missing_ok=True)


def _receive(asset: Asset, part: Path, progress: Progress) -> str:
    """Download into `part`; returns the sha256 of what came."""
    digest, received = hashlib.sha256(), 0
    with _opened(asset) as answer, writing(part), part.open("wb") as file:
        total = int(answer.headers.get("Content-Length") or asset.size or 0)
        with progress.track(f"fetching {asset.name}", total) as task:
            for chunk in _chunks(asset, answer):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                task.advance(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if total and received != total:
        raise _not_fetched(asset, f"the connection ended after {received} of {total} bytes")
    return digest.hexdigest()


def _opened(asset: Asset) -> Any:
    try:
        return urllib.request.urlopen(asset.url, timeout=60)
    except (OSError, http.client.HTTPException) as error:
        raise _not_fetched(asset, getattr(error, "reason", error)) from None


def _chunks(asset: Asset, answer: Any) -> Iterator[bytes]:
    """What comes, piece by piece; MissingError where the connection breaks."""
    try:
        while chunk := answer.read(CHUNK):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise _not_fetched(asset, error) from None


def _not_fetched(asset: Asset, why: object) -> MissingError:
    return MissingError(f"cannot fetch {asset.url}: {why}", "check the connection, or put the file there by hand")
