"""Addresses on the Hub: what is put together is taken apart again, and nothing else is an address."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpctl.errors import UsageError
from dmpctl.store.addresses import HubAddress, address_in, of_files, of_rows
from tests.properties import few

word = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,6}", fullmatch=True)
repo = st.tuples(word, word).map("/".join)
revision = st.none() | word | st.sampled_from(["refs/pr/1", "refs/convert/parquet"])
file = st.lists(word, min_size=1, max_size=3).map("/".join)


@few
@given(st.builds(HubAddress, repo, st.booleans(), revision, st.none() | file))
def test_an_address_of_files_comes_back_as_it_was(address):
    assert of_files(address.word) == address


@few
@given(st.builds(HubAddress, repo | word, st.booleans(), revision), st.none() | word, st.none() | word)
def test_an_address_of_rows_is_a_data_set_with_or_without_saying_so(at, config, split):
    of_split = "" if split is None else f":{split}" if config is None else f":{config}/{split}"
    found = of_rows(at.word + of_split)
    assert (found.repo, found.dataset, found.revision, found.file) == (at.repo, True, at.revision, None)
    assert (found.config, found.split) == (None if split is None else config, split)


@few
@given(repo, file)
def test_a_path_with_an_address_in_it_is_the_address(name, inside):
    for scheme in ("hf", "https"):
        address = f"{scheme}://{name}/{inside}"
        assert address_in(Path(address)) == address_in(address) == address


@few
@given(file)
def test_a_path_without_a_scheme_is_no_address(path):
    assert address_in(path) is None
    with pytest.raises(UsageError, match="is no address on the Hub"):
        of_files(path)


@few
@given(repo, st.sampled_from(["hf://{}/../x", "hf://{}/x:train", "hf://datasets/{}@", "hf://{}@a@b", "hf:/{}"]))
def test_anything_else_is_refused(name, form):
    with pytest.raises(UsageError):
        of_files(form.format(name))
