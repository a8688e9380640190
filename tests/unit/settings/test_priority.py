"""The highest of the layers that give a value wins and is named: flags, environment, TOML file, run, preset, defaults."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from dmpctl.settings.layers import resolve
from dmpctl.settings.presets import PRESETS
from tests.properties import few

LAYERS = ("flag", "variable", "table", "top of the file", "run", "preset")  # from the highest down
DEFAULT = 250
subsets = st.fixed_dictionaries({}, optional=dict.fromkeys(LAYERS, st.integers(1, 1000)))


@few
@given(subsets, st.sampled_from(["steps = {}\n", "# {}\n"]))
def test_the_highest_layer_that_gives_a_value_wins_and_is_named(layers, other_table):
    """`--steps` of dmpctl patch, which every layer can give; the table of another command never counts."""
    with TemporaryDirectory() as name:
        run, file = Path(name), Path(name) / "x.toml"
        top = f"steps = {layers['top of the file']}\n" if "top of the file" in layers else ""
        table = f"[patch]\nsteps = {layers['table']}\n" if "table" in layers else ""
        file.write_text(top + table + "[sample]\n" + other_table.format(7))
        if "run" in layers:
            recorded = {"sampling": {"steps": layers["run"]}}
            (run / "config.json").write_text(json.dumps({"schema_version": 1, "settings": recorded}))
        typed = {"base": "DiT-L/2"} | ({"preset": "digits"} if "preset" in layers else {})
        typed |= {"steps": str(layers["flag"])} if "flag" in layers else {}
        variables = {"DMPCTL_STEPS": str(layers["variable"])} if "variable" in layers else {}
        with mock.patch.dict(os.environ, variables):
            found = resolve("patch", typed, file, run)
    origins = {
        "flag": "--steps",
        "variable": "DMPCTL_STEPS",
        "table": f"{file} [patch]: steps",
        "top of the file": f"{file}: steps",
        "run": f"run {run}",
        "preset": "preset digits",
    }
    values = layers | ({"preset": PRESETS["digits"].values["steps"]} if "preset" in layers else {})
    highest = next((layer for layer in LAYERS if layer in layers), None)
    assert found.settings.sampling.steps == (DEFAULT if highest is None else values[highest])
    assert found.origins["steps"] == ("default" if highest is None else origins[highest])
