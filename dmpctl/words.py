"""Parts of sentences that several rooms write: the nearest name, the values that differ, a standard error."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the known word that is nearest, None where none is near. Case, `-` for `_` and `plus` for `+` make no difference.

    Of the three nearest it is one that begins with the letter that `word` begins with, else the nearest. `cutoff`: how alike
    the two have to be, from 0 (anything) to 1 (equal), as `difflib` counts.
    """
    plain = {_plain(other): other for other in known}
    near = get_close_matches(_plain(word), list(plain), cutoff=cutoff)
    near.sort(key=lambda other: other[:1] != _plain(word)[:1])
    return plain[near[0]] if near else None


def _plain(word: str) -> str:
    return word.lower().replace("+", "plus").replace("_", "-").lstrip("-")


def nearest_or(word: str, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """Returns the hint `did you mean X?` for the nearest of the known words, `otherwise` where none is near."""
    near = nearest(word, known, cutoff)
    return otherwise if near is None else f"did you mean {near}?"


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[tuple[str, object, object]]:
    """Returns (key, value before, value now) for each key of two flat mappings whose values differ; None for a missing value.

    Keys of `before` come first. Values that were read from JSON equal others only if those went through JSON too.
    """
    return [(key, before.get(key), now.get(key)) for key in {**before, **now} if before.get(key) != now.get(key)]


def plus_minus(error: float | None, form: str = ".4g") -> str:
    """Returns ` ± 0.0123`, to stand behind a value; empty where the error is not known. `form`: of `format`."""
    return "" if error is None else f" ± {error:{form}}"


def printable(name: str) -> str:
    """A file name fit for a terminal: control characters and bytes that are not UTF-8 are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)
