"""Every settings file in examples/ is one that its commands accept."""

import tomllib
from pathlib import Path

import pytest

from dmpctl.settings.commands import COMMANDS

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = {path.name: tomllib.loads(path.read_text("utf-8")) for path in sorted(EXAMPLES.glob("*.toml"))}
TABLES = [(name, table) for name, tables in FILES.items() for table in tables if table in COMMANDS and table != "compare"]


def test_there_are_examples_of_every_task():
    assert {"ffhq-dit-l2.toml", "coco-dit-b2.toml", "sd15-laion.toml", "imagenet256-dit-xl2.toml"} <= set(FILES)
    assert len(TABLES) > 10


@pytest.mark.parametrize(("name", "command"), TABLES)
def test_its_settings_are_accepted(cli, name, command):
    given = ("runs/nothing",) if command in ("sample", "fid") else ()
    done = cli(command, *given, "--config", EXAMPLES / name, "--print-config")
    assert done.code == 0, done.err


@pytest.mark.parametrize("name", FILES)
def test_it_opens_with_its_commands(name):
    first = [line for line in (EXAMPLES / name).read_text("utf-8").splitlines() if line.startswith("#")]
    assert any("dmpctl " in line for line in first)
