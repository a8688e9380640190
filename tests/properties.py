"""How tests of properties are run: few examples, the same in every run, and nothing kept between runs."""

from hypothesis import settings

few = settings(max_examples=50, deadline=None, derandomize=True, database=None)
