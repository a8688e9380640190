"""`--prompt-sites 0-3,5`: what is written is what is patched."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpctl.errors import UsageError
from dmpctl.methods.prompts import patched_blocks
from dmpctl.settings.methods import Dmp
from tests.properties import few

COUNT = 12
block = st.integers(0, COUNT - 1)
parts = st.lists(st.tuples(block, block).map(sorted), min_size=1, max_size=5)


def written(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"


@few
@given(parts)
def test_ranges_in_any_order_are_the_blocks_that_they_cover(ranges):
    text = ",".join(written(low, high) for low, high in ranges)
    covered = {number for low, high in ranges for number in range(low, high + 1)}
    assert patched_blocks(Dmp(prompt_sites=text), COUNT) == tuple(sorted(covered))


@few
@given(parts, st.integers(0, 20), st.integers(0, 20))
def test_a_range_that_runs_backwards_or_beyond_the_blocks_is_named(ranges, low, high):
    text = ",".join([*(written(*each) for each in ranges), f"{low}-{high}"])
    if low <= high < COUNT:
        assert set(range(low, high + 1)) <= set(patched_blocks(Dmp(prompt_sites=text), COUNT))
    else:
        with pytest.raises(UsageError, match=f"--prompt-sites {low}-{high}"):
            patched_blocks(Dmp(prompt_sites=text), COUNT)
