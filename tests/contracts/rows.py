"""The rows of a contract suite, and which of them each promise is tried on."""

from collections import Counter
from collections.abc import Iterable
from itertools import product

import pytest


class Rows:
    """Rows by name, for the fixture that opens one. A promise names the rows that could break it, each in its own way."""

    def __init__(self, fixture: str, names: Iterable[str]) -> None:
        self.fixture, self.names, self.asked = fixture, tuple(names), Counter[str]()

    def on(self, names: str) -> pytest.MarkDecorator:
        """A test on these rows."""
        self.asked.update(names.split())
        return pytest.mark.parametrize(self.fixture, names.split(), indirect=True)

    def but(self, names: str) -> pytest.MarkDecorator:
        """A test on all rows but these."""
        return self.on(" ".join(name for name in self.names if name not in names.split()))

    def with_each(self, argument: str, values: Iterable[object], names: str) -> pytest.MarkDecorator:
        """A test on these rows with every value; on a row behind a bar with the first alone."""
        every, _, once = names.partition("|")
        first, *others = values
        self.asked.update((every + once).split())
        cases = [*product(every.split(), (first, *others)), *((name, first) for name in once.split())]
        return pytest.mark.parametrize((self.fixture, argument), cases, indirect=[self.fixture])

    def forgotten(self) -> set[str]:
        """Rows that fewer than two promises are tried on, and unknown ones. A new row joins the promises that it could break."""
        return {name for name in self.names if self.asked[name] < 2} | (set(self.asked) - set(self.names))
