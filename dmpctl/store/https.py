"""One file over https: resumed where it stopped, tried again where that can help, checked before it gets its name."""

import email.utils
import http.client
import random
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ValidationError

from dmpctl.errors import IntegrityError, MissingError
from dmpctl.files import amount, fsync, make_folder, sha256_of, write_json, writing
from dmpctl.settings.assets import AssetRow, is_safe
from dmpctl.store.cache import Fact, need_room
from dmpctl.types import Progress
from dmpctl.words import redacted

CHUNK = 1 << 20  # bytes
TIMEOUT = 60.0  # sec without a byte
ATTEMPTS = 6  # in a row without getting any further
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # sec between attempts
LONGEST_WAIT = 600.0  # sec that a server may ask for
UNANNOUNCED = 2**36  # bytes at most of a file whose size nobody has said
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
sleep = time.sleep
T = TypeVar("T")


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


def fetch_file(row: AssetRow, target: Path, progress: Progress) -> Fact:
    """Download the file of a row with `url` into `target`.part, check size and hash, rename.

    MissingError if it cannot be fetched, IntegrityError if something else came, UsageError on a full disk. What came stays
    in the .part for the next time, unless it is wrong.
    """
    make_folder(target.parent)
    part = _Part(row, target)
    try:
        with_patience(row.label, lambda: part.receive(progress), progress, lambda: part.size)
    except KeyboardInterrupt:
        progress.say(f"{row.label}: stopped, {amount(part.size)} are kept for the next time")
        raise
    fact = Fact(sha256=sha256_of(part.path), size=part.size)
    if row.size not in (None, fact.size):
        part.discard()
        raise IntegrityError(f"{row.url} gave {fact.size} bytes, expected {row.size}", "try again")
    if row.sha256 not in (None, fact.sha256):
        part.discard()
        raise IntegrityError(
            f"{row.url} gave sha256 {fact.sha256}, expected {row.sha256}",
            "try again; if it stays, the file there has changed: give the new hash in a row of your own",
        )
    with writing(target):
        fsync(part.path)
        part.path.replace(target)
        fsync(target.parent)
        part.about.unlink(missing_ok=True)
    return fact


def with_patience(name: str, attempt: Callable[[], T], progress: Progress, got: Callable[[], int] = lambda: 0) -> T:
    """Returns what `attempt()` gives, tried again after each `Again` with growing pauses; MissingError when that does not help.

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
            delay = max(delay, again.after or 0.0)
            if failures >= ATTEMPTS or delay > LONGEST_WAIT:
                asked = f", it asks to wait {again.after:.0f} s" if delay > LONGEST_WAIT else f", after {failures} attempts"
                hint = "check the connection, and run the same command again: it goes on where it stopped"
                raise MissingError(f"cannot fetch {name}: {again}{asked}", hint) from None
            progress.say(f"{name}: {again}, trying again in {delay:.1f} s ({failures} of {ATTEMPTS - 1})")
            sleep(delay)


class _Version(BaseModel):
    """The version of a file that a part is of. `validator` None: the server names none. `total` (bytes) None: it was not said."""

    url: str
    validator: str | None = None
    total: int | None = None


class _Part:
    """The bytes that have come of a row's file so far, FILE.part, and FILE.part.json with its version."""

    def __init__(self, row: AssetRow, target: Path) -> None:
        self.row, self.url, self.target = row, row.url or "", target
        self.path = target.with_name(target.name + ".part")
        self.about = target.with_name(target.name + ".part.json")

    @property
    def size(self) -> int:
        """Bytes that have come."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def discard(self) -> None:
        """Begin anew."""
        with writing(self.path):
            self.path.unlink(missing_ok=True)
            self.about.unlink(missing_ok=True)

    def receive(self, progress: Progress) -> None:
        """One attempt to complete it; Again where the next one may do it."""
        try:
            version = _Version.model_validate_json(self.about.read_bytes())
        except (OSError, ValidationError):
            version = _Version(url="")
        # Else it may be of another version than is wanted now.
        if version.url != redacted(self.url) or not (version.validator or self.row.sha256):
            self.discard()
        kept = self.size
        if kept and kept == version.total:
            return  # killed between the last byte and the rename
        with self._opened(kept, version.validator) as answer:
            start, total = self._place(answer, kept)
            whole = total or self.row.size
            need_room(self.path.parent, (whole or start) - start, self.row.label)
            if start == 0:
                etag, date = answer.headers.get("ETag") or "W/", answer.headers.get("Last-Modified")
                validator = date if etag.startswith("W/") else etag  # a weak one does not stand for the same bytes
                write_json(self.about, _Version(url=self.url, validator=validator, total=total).model_dump())
            received = start
            with (
                progress.track(f"fetching {self.row.label}", whole or 0, start, unit="B") as task,
                writing(self.path),
                self.path.open("ab" if start else "wb") as file,
            ):
                while chunk := _chunk(answer):
                    received += len(chunk)
                    if received > (whole or UNANNOUNCED):
                        self.discard()
                        raise IntegrityError(
                            f"{self.url} gives more than {amount(whole or UNANNOUNCED)}, and does not end",
                            "look at the address; give the size of the file in a row of your own, [assets.NAME]",
                        )
                    file.write(chunk)
                    task.advance(len(chunk))
        if total is not None and received < total:
            raise Again(f"the connection ended after {received} of {total} bytes")

    def _opened(self, kept: int, validator: str | None) -> Any:  # an http.client.HTTPResponse, or what urllib makes of it
        """The answer, 200 or 206; Again where the failure may pass, MissingError where it will not."""
        headers = {"User-Agent": "dmpctl"}
        if kept:
            headers["Range"] = f"bytes={kept}-"
            if validator:
                headers["If-Range"] = validator
        opener = urllib.request.build_opener(SafeRedirects)
        try:
            return opener.open(urllib.request.Request(self.url, headers=headers), timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 416:
                    self.discard()
                    raise Again("the server has no such part of the file") from None
                if error.code in TRANSIENT:
                    raise Again(f"HTTP {error.code} {error.reason}", retry_after(error.headers.get("Retry-After"))) from None
                raise self._refused(error.code, str(error.reason)) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                why = error.reason.verify_message
                raise MissingError(f"cannot fetch {self.url}: {why}", "check the proxy and the clock") from None
            raise Again(f"no connection ({error.reason})") from None
        except (OSError, http.client.HTTPException) as error:
            raise Again(f"the connection broke ({error or type(error).__name__})") from None

    def _place(self, answer: Any, kept: int) -> tuple[int, int | None]:
        """Where the bytes of this answer begin, and the size of the whole file (None: not said)."""
        row, length = self.row, answer.headers.get("Content-Length")
        if answer.status == 206:
            found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range") or "")
            if not found or int(found[1]) != kept or (length and int(length) != int(found[2]) - kept + 1):
                self.discard()
                raise Again("the server sent another part of the file than was asked for")
            start, total = kept, None if found[3] == "*" else int(found[3])
        else:
            start, total = 0, int(length) if length and length.isdigit() else None
        if total is None and row.sha256 is None and row.size is None and not getattr(answer, "chunked", False):
            raise IntegrityError(
                f"{self.url} does not say how long it is, so half of it could be taken for the whole",
                "give its size or sha256 in a row of your own, [assets.NAME]",
            )
        if total is not None and row.size not in (None, total):
            self.discard()
            raise IntegrityError(f"{self.url} has {total} bytes, expected {row.size}", "the file there has changed")
        if answer.headers.get_content_type() == "text/html" and self.target.suffix not in (".html", ".htm"):
            raise IntegrityError(f"{self.url} gave a web page, not a file", "look at the address in a browser")
        return start, total

    def _refused(self, code: int, reason: str) -> MissingError:
        """The failure for an answer that will stay as it is."""
        by_hand = f"or put the file there by hand: {self.target}"
        if code in (401, 403):
            page, found, _ = self.url.partition("/resolve/")
            hint = f"open {page} and accept its terms, set HF_TOKEN, and name it hf://" if found else f"ask its owner, {by_hand}"
            return MissingError(f"{self.url} refuses access (HTTP {code} {reason})", hint)
        there = "there is nothing at" if code in (404, 410) else "cannot fetch"
        hint = self.row.alternative or f"check the address, {by_hand}"
        return MissingError(f"{there} {self.url} (HTTP {code} {reason})", hint)


def _chunk(answer: Any) -> bytes:
    """Returns the bytes that have come by now, at most CHUNK, empty at the end; Again where the connection breaks."""
    try:
        return bytes(answer.read1(CHUNK))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Again(f"the connection broke ({error or type(error).__name__})") from None


def retry_after(value: str | None) -> float | None:
    """Returns the seconds of a Retry-After header: a number, or a date; None where it says nothing."""
    value = (value or "").strip()
    if value.isdigit():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
