"""Words for the values that an option takes, and for a value or a name that is refused.

All values pass here, whatever gave them: a flag, a variable, a TOML key or Python. `Form` is how the user wrote them.
"""

import json
import math
import shlex
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from importlib import resources
from pathlib import Path
from string import Formatter
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dmpctl.words import nearest

Form = Literal["flag", "variable", "key", "argument", "plain"]
MOST = 2**63 - 1  # the largest whole number that torch, numpy and file formats hold
UNFIT = object()  # which no field takes
SHOWN = 80  # characters of a refused value


@cache
def synonyms(table: str) -> Mapping[str, Any]:
    """Returns a table of synonyms.toml: what people write -> our name, or names."""
    tables = tomllib.loads((resources.files("dmpctl") / "synonyms.toml").read_text("utf-8"))
    return {word: ours for words, ours in tables[table].items() for word in words.split()}


@dataclass(frozen=True)
class Takes:
    """A mark of a field that takes text of a form of its own: that form in words, and a text of that form."""

    words: str
    example: str


@dataclass(frozen=True)
class Among:
    """A mark of a field that takes one or some of these names, joined by commas."""

    names: tuple[str, ...]


class Writable(NamedTuple):
    """An option as messages write it. `public`: its name in TOML and Python; `off`: the flag that says no."""

    public: str
    flag: str
    off: str
    variable: str

    def named(self, form: Form) -> str:
        """Returns its name alone."""
        return {"flag": self.flag, "variable": self.variable}.get(form, self.public)

    def typed(self, value: object, form: Form) -> str:
        """Returns it with a value, as one would type it."""
        match form, value:
            case "flag", bool():
                return self.flag if value else self.off
            case "flag", _:
                return f"{self.flag} {shlex.quote(str(value))}"
            case "variable", _:
                return f"{self.variable}={int(value) if isinstance(value, bool) else shlex.quote(str(value))}"
            case "key", _:
                return f"{self.public} = {json.dumps(value, default=str, ensure_ascii=False)}"
            case "argument", _:
                return f"{self.public}={str(value) if isinstance(value, Path) else value!r}"
            case _:
                return f"{self.public} {value}"

    def left_out(self, form: Form) -> str:
        """Returns what to do to give no value."""
        return {"variable": f"unset {self.variable}", "key": f"remove {self.public} there"}.get(
            form, f"leave {self.named(form)} out"
        )


class Clash(ValueError):
    """Values of `section` that do not go together. `sentence` and `hint` name its fields as `str.format` does.

    `{topk}`: the option with its value, as given; `{topk:-}`: its name alone; `{gate:topk}`: how to type it with that value.
    """

    def __init__(self, section: BaseModel | Mapping[str, object], sentence: str, hint: str) -> None:
        self.section, self.sentence, self.hint = section, sentence, hint
        super().__init__(
            self.said(lambda name, value, spec: name if spec == "-" or value is True else f"{name} {spec or value}")[0]
        )

    @property
    def names(self) -> list[str]:
        """The fields that it is about, in order."""
        return [name for text in (self.sentence, self.hint) for _, name, _, _ in Formatter().parse(text) if name]

    def said(self, word: Callable[[str, object, str], str]) -> tuple[str, str]:
        """Returns sentence and hint. `word`: an option's field, its value and what stands after the colon, to text."""
        held = self.section if isinstance(self.section, Mapping) else dict(self.section)
        words = {name: _Word(name, held[name], word) for name in self.names}
        return self.sentence.format_map(words), self.hint.format_map(words)


class _Word(NamedTuple):
    name: str
    value: object
    word: Callable[[str, object, str], str]

    def __format__(self, spec: str) -> str:
        return self.word(self.name, self.value, spec)


def meant(word: str, options: Mapping[str, Writable], form: Form, otherwise: str) -> str:
    """Returns the hint for an option that does not exist. `options`: those that there are, by public name."""
    plain = word.lstrip("-").replace("-", "_").lower()
    known = {public: option.named(form) for public, option in options.items()}
    if form == "flag":
        known |= {option.off[2:].replace("-", "_"): option.off for option in options.values() if option.off}
    names = [known[name] for name in synonyms("options").get(plain, ()) if name in known]
    near = nearest(plain, known)
    names = names or ([known[near]] if near else [])
    return f"did you mean {one_of(names)}?" if names else otherwise


def shown(value: object) -> str:
    """Returns a value that was found, in quotes where it is text, not too long for a sentence."""
    plain = isinstance(value, str | int | float | bool | list | tuple | dict | Path | None)
    text = repr(str(value) if isinstance(value, Path) else value) if plain else f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def one_of(words: list[str]) -> str:
    """Returns `a, b or c`."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def takes(field: FieldInfo) -> str:
    """Returns in words what a field takes: `a whole number from 1 to 1000`, `soft, topk or hard`."""
    for mark in field.metadata:
        if isinstance(mark, Takes):
            return mark.words
        if isinstance(mark, Among):
            return f"{one_of(list(mark.names))}, or several joined by commas"
    return _kind(field.annotation, field.metadata)


def _kind(annotation: Any, marks: list[Any]) -> str:
    rest = [part for part in get_args(annotation) if part is not NoneType]
    match get_origin(annotation):
        case origin if origin is Annotated:
            return _kind(rest[0], [mark for each in rest[1:] for mark in getattr(each, "metadata", [each])])
        case origin if origin is Literal:
            return one_of(list(map(str, rest)))
        case origin if origin in (list, tuple):
            some = "one or more values" if any(getattr(mark, "min_length", 0) for mark in marks) else "values"
            return f"a list of {some}" + (f", each {_kind(rest[0], [])}" if rest[0] is not Any else "")
        case origin if origin is dict:
            return f"a table, each value {_kind(rest[1], [])}"
    if NoneType in get_args(annotation) and len(rest) == 1:
        return _kind(rest[0], marks)
    low, high = (_bound(marks, "ge", "gt"), _bound(marks, "le", "lt"))
    if annotation is int or annotation is float:
        kind = "a whole number" if annotation is int else "a number"
        if low and high and low[1] and high[1]:
            return f"{kind} from {low[0]:g} to {high[0]:g}"
        ends = [f"of {low[0]:g} or more" if low[1] else f"above {low[0]:g}"] if low else []
        ends += [f"of {high[0]:g} or less" if high[1] else f"below {high[0]:g}"] if high else []
        return " ".join([kind, " and ".join(ends)]).strip()
    return {bool: "yes or no (true or false)", Path: "a path", str: "text"}.get(annotation, "a table")


def _bound(marks: list[Any], inside: str, outside: str) -> tuple[float, bool] | None:
    """A bound and whether it is allowed itself."""
    return next(((getattr(m, name), name == inside) for m in marks for name in (inside, outside) if hasattr(m, name)), None)


def instead(field: FieldInfo, value: object) -> Any:
    """Returns a value of the field that is likely meant by a wrong one; None where there is nothing to go by."""
    marks, annotation = field.metadata, field.annotation
    parts = [annotation, *get_args(annotation)]
    choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    if choices:
        near = nearest(str(value), map(str, choices))
        return near if near is not None else choices[0] if field.default is None else field.default
    for mark in marks:
        if isinstance(mark, Takes):
            return mark.example
        if isinstance(mark, Among):
            words = [nearest(word.strip(), mark.names) for word in str(value).split(",")]
            return ",".join(dict.fromkeys(filter(None, words))) or mark.names[0]
    if int not in parts and float not in parts:
        return field.default if isinstance(field.default, bool) else None
    low, high = _bound(marks, "ge", "gt"), _bound(marks, "le", "lt")
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if math.isfinite(number) and abs(number) <= MOST:
        number = max(number, low[0]) if low and low[1] else number
        number = min(number, high[0]) if high and high[1] else number
        beyond = (low and not low[1] and number <= low[0]) or (high and not high[1] and number >= high[0])
        if not beyond and not isinstance(value, bool):
            return round(number) if int in parts else number
    return field.default if field.default is not None else int(low[0]) if low and low[1] else 1


def as_written(value: Any, field: FieldInfo) -> Any:
    """Returns a value as a model is to see it: `1e3` is a whole number, a list of names is text; UNFIT for what it would misread.

    That is a yes for a number, a number that no file or library holds, text that is empty or holds a NUL.
    """
    parts = (field.annotation, *get_args(field.annotation))
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value  # a number of numpy or torch
    if int in parts or float in parts:
        if isinstance(value, bool):
            return UNFIT
        if int in parts and isinstance(value, int | float | str):
            try:
                number = Decimal(value.strip() if isinstance(value, str) else value)
            except InvalidOperation:
                return value
            if not number.is_finite() or abs(number) > MOST:
                return UNFIT
            return int(number) if number == int(number) else value
    if (str in parts or Path in parts) and isinstance(value, str | list):
        if any(isinstance(mark, Among) for mark in field.metadata):
            return ",".join(str(word).strip() for word in (value.split(",") if isinstance(value, str) else value))
        if isinstance(value, str) and (not value.strip() or "\0" in value):
            return UNFIT
    return value


class WrongValue(NamedTuple):
    """One value that a model refused. `where`: its keys, joined by dots, empty for the whole; `sentence`: what is wrong."""

    where: str
    sentence: str


def first_error(error: ValidationError, model: type[BaseModel]) -> WrongValue:
    """Returns the first of the errors that pydantic has found in values for `model`."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    match first["type"]:
        case "value_error":
            return WrongValue(where, str(first["ctx"]["error"]))
        case "missing":
            return WrongValue(where, f"{where} is missing")
        case "extra_forbidden":
            return WrongValue(where, f"{where} is no setting")
    field = _field_at(model, first["loc"])
    return WrongValue(where, f"{where} takes {takes(field) if field else 'another value'}, found {shown(first['input'])}")


def _field_at(model: type[BaseModel], keys: tuple[int | str, ...]) -> FieldInfo | None:
    """The innermost field that these keys lead to; those of a list and the tags of a union lead nowhere."""
    found: FieldInfo | None = None
    kinds: list[Any] = [model]
    for key in keys:
        fields = [kind.model_fields for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        named = [each[str(key)] for each in fields if str(key) in each]
        if named:
            found = named[0]
            kinds = [found.annotation, *get_args(found.annotation)]
    return found
