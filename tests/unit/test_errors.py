import pytest

from dmpctl import errors

CODES = {  # the table that the command line documents
    "DmpError": 1,
    "UsageError": 2,
    "InUse": 2,
    "MissingError": 3,
    "IntegrityError": 4,
    "Damaged": 4,
    "NumericalError": 5,
    "ThresholdError": 6,
}


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_exit_codes(name, code):
    error = getattr(errors, name)("a sentence", "a hint")
    assert (error.exit_code, error.message, error.hint, str(error)) == (code, "a sentence", "a hint", "a sentence")
    assert isinstance(error, errors.DmpError)


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
def test_signals_are_codes_too(number, code):
    assert errors.Interrupted("stopped", number).exit_code == code


def test_every_failure_is_in_the_table():
    kinds = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.DmpError)}
    assert kinds == {*CODES, "Interrupted"}
    assert errors.DmpError("a sentence").hint is None
