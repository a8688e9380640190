"""Parts of sentences that several rooms write: the nearest name, the values that differ, a standard error."""

import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")  # variables whose value is never shown
SECRETS = (  # each with the part of it that may be shown
    (re.compile(r"(?i)\b((?!hf:)[a-z][a-z0-9+.-]+:/{1,2})[^/\s\"'<>?#]+@"), r"\1***@"),  # user:password@ before a host
    (
        re.compile(
            r"(?i)((?:[?&;]|\\u0026)(?:amp;)?(?:x-(?:amz|goog|ms)-[\w-]+|[\w.-]*(?:signature|token|secret|password|passwd|"
            r"credential|api[_-]?key|access[_-]?key|auth)[\w.-]*|sig|key|pwd|policy|key-pair-id)=)[^&\s\"'<>#\\]+"
        ),
        r"\1***",  # of a query string
    ),
    (re.compile(r"(?i)\b(bearer\s+|authorization:\s*\w+\s+)[\w.~+/=-]{6,}"), r"\1***"),
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{8,}|gh[opsu]_\w{20,}|github_pat_\w{20,}|sk-[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})"), "***"),
)


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


def redacted(text: str) -> str:
    """Text without passwords and signatures of addresses, and without access tokens: what is printed, recorded or sent."""
    for name in TOKENS:
        token = os.environ.get(name)
        text = text.replace(token, "***") if token else text
    for pattern, shown in SECRETS:
        text = pattern.sub(shown, text)
    return text


def fit_to_show(text: str) -> str:
    """Text of any origin as a terminal may have it: lines without secrets and without characters that would control it."""
    return "\n".join(printable(line) for line in redacted(text).split("\n"))


def printable(name: str) -> str:
    """A file name fit for a terminal: control, bidi and other unseen characters and bytes that are not UTF-8 are escaped."""
    if name.isascii() and name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)
