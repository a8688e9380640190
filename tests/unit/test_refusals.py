"""What a value may be, in words, and the first thing that is wrong with the values of a model."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dmpctl.refusals import WrongValue, first_error, one_of, takes


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: int = Field(ge=0)


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inner: Inner
    low: int = 0
    high: float = Field(default=1, gt=0, le=2)
    kind: Literal["a", "b"] | None = None
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = ()
    path: Path | None = None
    yes: bool = False

    @model_validator(mode="after")
    def _ordered(self):
        if self.high < self.low:
            raise ValueError("high is below low")
        return self


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({"inner": {"number": -1}}, ("inner.number", "inner.number takes a whole number of 0 or more, found -1")),
        ({"inner": {}}, ("inner.number", "inner.number is missing")),
        ({"inner": {"number": 1}, "lower": 1}, ("lower", "lower is no setting")),
        ({"inner": {"number": 1}, "low": 2}, ("", "high is below low")),
        ({"inner": 3}, ("inner", "inner takes a table, found 3")),
    ],
)
def test_the_first_error_of_a_model_is_a_sentence(values, wrong):
    with pytest.raises(ValidationError) as caught:
        Outer(**values)
    assert first_error(caught.value, Outer) == WrongValue(*wrong)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("low", "a whole number"),
        ("high", "a number above 0 and of 2 or less"),
        ("kind", "a or b"),
        ("seeds", "a list of values, each a whole number of 0 or more"),
        ("path", "a path"),
        ("yes", "yes or no (true or false)"),
    ],
)
def test_what_a_field_takes(name, words):
    assert takes(Outer.model_fields[name]) == words


def test_words_are_listed():
    assert [one_of(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a or b", "a, b or c"]
