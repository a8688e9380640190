"""Parts of sentences that several rooms write: the nearest name, the values that differ, a standard error, a wrong value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # a help page does without pydantic, which is slow to import
    from pydantic import ValidationError


def did_you_mean(word: str, known: Iterable[str], n: int = 3) -> str:
    """Returns `, did you mean X?` for the end of a sentence; empty where none of the known words is near.

    Of the `n` nearest X is one that begins with the letter that `word` begins with, else the nearest.
    """
    near = get_close_matches(word, list(known), n=n)
    near.sort(key=lambda other: other.lstrip("-")[:1] != word.lstrip("-")[:1])
    return f", did you mean {near[0]}?" if near else ""


def nearest_or(word: str, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """Returns the hint `did you mean X?` for the nearest of the known words, `otherwise` where none is near.

    `cutoff`: how alike the two have to be, from 0 (anything) to 1 (equal), as `difflib` counts.
    """
    near = get_close_matches(word, list(known), 1, cutoff)
    return f"did you mean {near[0]}?" if near else otherwise


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[tuple[str, object, object]]:
    """Returns (key, value before, value now) for each key of two flat mappings whose values differ; None for a missing value.

    Keys of `before` come first. Values that were read from JSON equal others only if those went through JSON too.
    """
    return [(key, before.get(key), now.get(key)) for key in {**before, **now} if before.get(key) != now.get(key)]


def plus_minus(error: float | None, form: str = ".4g") -> str:
    """Returns ` ± 0.0123`, to stand behind a value; empty where the error is not known. `form`: of `format`."""
    return "" if error is None else f" ± {error:{form}}"


class WrongValue(NamedTuple):
    """One value that a model refused. `where`: its keys, joined by dots, empty for the whole; `message`: pydantic's words.

    `own`: the sentence of one of our validators, None where pydantic itself refused; `found`: `, found 'x'`, empty for a
    value that is missing.
    """

    where: str
    message: str
    own: str | None
    found: str


def first_error(error: ValidationError) -> WrongValue:
    """Returns the first of the errors that pydantic has found."""
    first = error.errors(include_url=False)[0]
    return WrongValue(
        where=".".join(map(str, first["loc"])),
        message=first["msg"],
        own=str(first["ctx"]["error"]) if first["type"] == "value_error" else None,
        found="" if first["type"] == "missing" else f", found {first['input']!r}",
    )


def printable(name: str) -> str:
    """A file name fit for a terminal: control characters and bytes that are not UTF-8 are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)
