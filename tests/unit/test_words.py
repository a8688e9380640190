"""Parts of sentences, each as its readers see it."""

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dmpctl.words import WrongValue, did_you_mean, differences, first_error, nearest_or, plus_minus


def test_the_nearest_word_ends_a_sentence():
    assert did_you_mean("itres", ["iters", "seed"]) == ", did you mean iters?"
    assert did_you_mean("zzz", ["iters", "seed"]) == ""


def test_of_several_near_words_one_that_begins_alike_is_meant():
    assert did_you_mean("--sed", ["--used", "--seed"]) == ", did you mean --seed?"
    assert did_you_mean("bed", ["fbed", "bead"]) == ", did you mean bead?"
    assert did_you_mean("bed", ["fbed", "bead"], n=1) == ", did you mean fbed?"


def test_the_nearest_word_is_a_hint():
    assert nearest_or("digit", ["digits", "photos"], "name one") == "did you mean digits?"
    assert nearest_or("zzz", ["digits", "photos"], "name one") == "name one"
    assert nearest_or("dig", ["digitalia"], "name one") == "name one"
    assert nearest_or("dig", ["digitalia"], "name one", cutoff=0.5) == "did you mean digitalia?"


def test_differences_name_each_key_once_with_both_values():
    before, now = {"a": 1, "b": 2, "gone": 3, "same": None}, {"b": 5, "a": 1, "new": 4}
    assert differences(before, now) == [("b", 2, 5), ("gone", 3, None), ("new", None, 4)]


def test_an_error_stands_behind_its_value():
    assert f"{1.5}{plus_minus(0.01234567)}" == "1.5 ± 0.01235"
    assert plus_minus(0.01234567, ".2f") == " ± 0.01"
    assert plus_minus(None) == ""


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: int = Field(ge=0)


class Outer(BaseModel):
    inner: Inner
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _ordered(self):
        if self.high < self.low:
            raise ValueError("high is below low")
        return self


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({"inner": {"number": -1}}, ("inner.number", "Input should be greater than or equal to 0", None, ", found -1")),
        ({"inner": {}}, ("inner.number", "Field required", None, "")),
        (
            {"inner": {"number": 1}, "low": 2},
            ("", "Value error, high is below low", "high is below low", ", found {'inner': {'number': 1}, 'low': 2}"),
        ),
    ],
)
def test_the_first_error_of_a_model_comes_in_parts(values, wrong):
    with pytest.raises(ValidationError) as caught:
        Outer(**values)
    assert first_error(caught.value) == WrongValue(*wrong)
