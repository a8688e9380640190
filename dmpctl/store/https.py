"""One file over https: resumed where it stopped, tried again where that can help, checked before it gets its name.

What has come so far is FILE.part; FILE.part.json says of which version of the file it is a part.
"""

import email.utils
import http.client
import json
import random
import re
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from dmpctl.errors import IntegrityError, MissingError
from dmpctl.files import amount, fsync, make_folder, sha256_of, write_json, writing
from dmpctl.settings.assets import is_safe
from dmpctl.store.cache import Fact, need_room
from dmpctl.types import Progress

CHUNK = 1 << 20  # bytes
TIMEOUT = 60.0  # sec without a byte
ATTEMPTS = 6  # in a row without getting any further
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # sec between attempts
LONGEST_WAIT = 600.0  # sec that a server may ask for
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
sleep = time.sleep


@dataclass(frozen=True)
class Wanted:
    """A file at `url`. `sha256` and `size` (bytes) None: not known. `hint`: what else there is if it is gone."""

    name: str
    url: str
    sha256: str | None = None
    size: int | None = None
    hint: str | None = None


class Again(Exception):
    """Something that may go better next time. `after`: sec to wait, None: as always."""

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


class SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if not is_safe(newurl):
            raise MissingError(f"{req.full_url} redirects to an address that is not https", "look at the address in a browser")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch_file(wanted: Wanted, target: Path, progress: Progress) -> Fact:
    """Download into `target`.part, check size and hash, rename.

    MissingError if it cannot be fetched, IntegrityError if something else came, UsageError on a full disk. What came stays
    in the .part for the next time, unless it is wrong.
    """
    make_folder(target.parent)
    part = target.with_name(target.name + ".part")
    try:
        with_patience(wanted.name, lambda: _receive(wanted, part, progress), progress, lambda: _size(part))
    except KeyboardInterrupt:
        progress.say(f"{wanted.name}: stopped, {amount(_size(part))} are kept for the next time")
        raise
    size, digest = _size(part), sha256_of(part)
    if wanted.size not in (None, size):
        _discard(part)
        raise IntegrityError(f"{wanted.url} gave {size} bytes, expected {wanted.size}", "try again")
    if wanted.sha256 not in (None, digest):
        _discard(part)
        raise IntegrityError(
            f"{wanted.url} gave sha256 {digest}, expected {wanted.sha256}",
            "try again; if it stays, the file there has changed: give the new hash in a row of your own",
        )
    with writing(target):
        fsync(part)
        part.replace(target)
        fsync(target.parent)
        _state_of(part).unlink(missing_ok=True)
    return Fact(digest, size)


def with_patience(name: str, attempt: Any, progress: Progress, got: Any = lambda: 0) -> Any:
    """What `attempt()` gives, tried again after each `Again`, with growing pauses; MissingError when that does not help.

    Failures count in a row: as soon as `got()` (bytes) has grown by some, the count begins anew.
    """
    failures, furthest = 0, got()
    while True:
        try:
            return attempt()
        except Again as again:
            if got() >= furthest + CHUNK:
                failures, furthest = 0, got()
            failures += 1
            delay = random.uniform(0.5, 1.0) * min(LONGEST_DELAY, FIRST_DELAY * 2 ** (failures - 1))
            if again.after is not None:
                delay = max(delay, again.after)
            if failures >= ATTEMPTS or delay > LONGEST_WAIT:
                asked = f", it asks to wait {again.after:.0f} s" if delay > LONGEST_WAIT else f", after {failures} attempts"
                hint = "check the connection, and run the same command again: it goes on where it stopped"
                raise MissingError(f"cannot fetch {name}: {again}{asked}", hint) from None
            progress.say(f"{name}: {again}, trying again in {delay:.1f} s ({failures} of {ATTEMPTS - 1})")
            sleep(delay)


def _receive(wanted: Wanted, part: Path, progress: Progress) -> None:
    """One attempt to complete `part`; Again where the next one may do it."""
    kept, state = _kept(wanted, part)
    if kept and kept == state.get("total"):
        return  # killed between the last byte and the rename
    with _opened(wanted, part, kept, state) as answer:
        start, total = _place(wanted, part, answer, kept)
        need_room(part.parent, (total or wanted.size or start) - start, wanted.name)
        if start == 0:
            etag, date = answer.headers.get("ETag") or "W/", answer.headers.get("Last-Modified")
            validator = date if etag.startswith("W/") else etag  # a weak one does not stand for the same bytes
            write_json(_state_of(part), {"url": wanted.url, "validator": validator, "total": total})
        received = start
        with (
            progress.track(f"fetching {wanted.name}", total or wanted.size or 0, start, unit="B") as task,
            writing(part),
            part.open("ab" if start else "wb") as file,
        ):
            while chunk := _chunk(answer):
                file.write(chunk)
                received += len(chunk)
                task.advance(len(chunk))
    if total is not None and received < total:
        raise Again(f"the connection ended after {received} of {total} bytes")


def _kept(wanted: Wanted, part: Path) -> tuple[int, dict[str, Any]]:
    """Bytes of an earlier attempt that may be gone on with, and what is known of it."""
    try:
        state = json.loads(_state_of(part).read_text("utf-8"))
    except (OSError, ValueError):
        state = {}
    certain = isinstance(state, dict) and state.get("url") == wanted.url and (state.get("validator") or wanted.sha256)
    if not certain or not part.is_file():
        _discard(part)
        return 0, {}
    return _size(part), state


def _opened(wanted: Wanted, part: Path, kept: int, state: dict[str, Any]) -> Any:
    """The answer, 200 or 206; Again where the failure may pass, MissingError where it will not."""
    headers = {"User-Agent": "dmpctl"}
    if kept:
        headers["Range"] = f"bytes={kept}-"
        if state.get("validator"):
            headers["If-Range"] = state["validator"]
    opener = urllib.request.build_opener(SafeRedirects)
    try:
        return opener.open(urllib.request.Request(wanted.url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:
                _discard(part)
                raise Again("the server has no such part of the file") from None
            if error.code in TRANSIENT:
                raise Again(f"HTTP {error.code} {error.reason}", retry_after(error.headers.get("Retry-After"))) from None
            raise _refused(wanted, part, error.code, str(error.reason)) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            why = error.reason.verify_message
            raise MissingError(f"cannot fetch {wanted.url}: {why}", "check the proxy and the clock") from None
        raise Again(f"no connection ({error.reason})") from None
    except (OSError, http.client.HTTPException) as error:
        raise Again(f"the connection broke ({error or type(error).__name__})") from None


def _place(wanted: Wanted, part: Path, answer: Any, kept: int) -> tuple[int, int | None]:
    """Where the bytes of this answer begin, and the size of the whole file (None: not said)."""
    length = answer.headers.get("Content-Length")
    if answer.status == 206:
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range") or "")
        if not found or int(found[1]) != kept or (length and int(length) != int(found[2]) - kept + 1):
            _discard(part)
            raise Again("the server sent another part of the file than was asked for")
        start, total = kept, None if found[3] == "*" else int(found[3])
    else:
        start, total = 0, int(length) if length and length.isdigit() else None
    if total is None and wanted.sha256 is None and wanted.size is None and not getattr(answer, "chunked", False):
        raise IntegrityError(
            f"{wanted.url} does not say how long it is, so half of it could be taken for the whole",
            "give its size or sha256 in a row of your own, [assets.NAME]",
        )
    if total is not None and wanted.size not in (None, total):
        _discard(part)
        raise IntegrityError(f"{wanted.url} has {total} bytes, expected {wanted.size}", "the file there has changed")
    if answer.headers.get_content_type() == "text/html" and part.name.rsplit(".", 2)[-2] not in ("html", "htm"):
        raise IntegrityError(f"{wanted.url} gave a web page, not a file", "look at the address in a browser")
    return start, total


def _chunk(answer: Any) -> bytes:
    """What has come by now, at most CHUNK bytes, empty at the end; Again where the connection breaks."""
    try:
        return bytes(answer.read1(CHUNK))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Again(f"the connection broke ({error or type(error).__name__})") from None


def _refused(wanted: Wanted, part: Path, code: int, reason: str) -> MissingError:
    """The failure for an answer that will stay as it is."""
    by_hand = f"or put the file there by hand: {part.with_suffix('')}"
    if code in (401, 403):
        page, found, _ = wanted.url.partition("/resolve/")
        hint = f"open {page} and accept its terms, set HF_TOKEN, and name it hf://" if found else f"ask its owner, {by_hand}"
        return MissingError(f"{wanted.url} refuses access (HTTP {code} {reason})", hint)
    there = "there is nothing at" if code in (404, 410) else "cannot fetch"
    return MissingError(f"{there} {wanted.url} (HTTP {code} {reason})", wanted.hint or f"check the address, {by_hand}")


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or a date; None where it says nothing."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _state_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _discard(part: Path) -> None:
    with writing(part):
        for path in (part, _state_of(part)):
            path.unlink(missing_ok=True)
