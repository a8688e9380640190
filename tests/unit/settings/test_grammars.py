"""Texts with a grammar of their own: lists of metrics, names that may change, rows of assets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpctl.errors import UsageError
from dmpctl.settings.assets import AssetRow, rows_of
from dmpctl.settings.layers import resolve
from dmpctl.settings.measuring import Fid
from dmpctl.settings.sections import Run
from tests.properties import few

METRICS = ("fid", "sfid", "is", "pr", "dc", "kid", "fid-infinity", "clip-score")
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
paths = st.from_regex(r"[a-z0-9_-]{1,6}(/[a-z0-9_-]{1,6}){0,2}", fullmatch=True)
common = {
    "kind": st.sampled_from(["backbone", "codec", "data", "extractor", "statistics", "text"]),
    "sha256": st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    "size": st.integers(0, 2**40),
    "licence": st.text(min_size=1, max_size=8),
    "non_commercial": st.booleans(),
}
tables = st.one_of(
    st.fixed_dictionaries({"url": paths.map("https://host.example/{}".format)}, optional=common),
    st.fixed_dictionaries({"repo": st.just("owner/name"), "file": paths}, optional=common),
    st.fixed_dictionaries({"parts": st.lists(names, min_size=1, max_size=3).map(tuple)}, optional=common),
)
junk = st.dictionaries(st.sampled_from([*AssetRow.model_fields, "sha-256", "urls"]), st.one_of(st.none(), st.integers(), names))


@few
@given(st.lists(st.sampled_from(METRICS), min_size=1))
def test_a_list_of_metrics_is_each_of_them_once_after_fid(wanted):
    found = Fid(metrics=",".join(wanted)).wanted
    assert found == tuple(dict.fromkeys(["fid", *wanted]))


@few
@given(st.text("fidskpr,- ", min_size=1).filter(lambda text: not {word.strip() for word in text.split(",")} <= set(METRICS)))
def test_any_other_list_of_metrics_is_refused_in_one_sentence(text):
    with pytest.raises(UsageError) as caught:
        resolve("fid", {"metrics": text})
    assert caught.value.message.startswith("--metrics takes ")


@few
@given(st.lists(st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True), min_size=1, max_size=4))
def test_names_that_may_change_are_read_as_fields_are_called(allowed):
    assert Run(allow_change=",".join(allowed)).allowed == tuple(name.replace("-", "_") for name in allowed)


@few
@given(names, tables, st.booleans())
def test_a_row_of_assets_is_read_as_it_was_written(name, table, hyphens):
    written = {key.replace("_", "-") if hyphens else key: value for key, value in table.items()}
    assert rows_of({name: written}, "x.toml") == (AssetRow(name=name, **table),)


@few
@given(junk)
def test_whatever_else_a_row_holds_is_refused_in_one_sentence(table):
    sentence = "x.toml [assets.x]: it is read"
    try:
        rows_of({"x": table}, "x.toml")
    except UsageError as error:
        sentence = error.message
    assert sentence.startswith("x.toml [assets.x]: ")
    assert "\n" not in sentence
