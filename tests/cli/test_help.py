"""Help is complete, quick and whole at any width."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dmpctl import __version__
from dmpctl.cli.commands import COMMANDS
from dmpctl.cli.parameters import parsed_by_typer
from dmpctl.settings import options
from tests.helpers import environment

FROZEN = Path(__file__).parent / "help"
HEAVY = ("torch", "numpy", "datasets", "diffusers", "huggingface_hub", "accelerate", "rich", "pydantic")


def built(name: str):
    return parsed_by_typer(COMMANDS[name])


def imported_by(*argv: str) -> set[str]:
    line = [sys.executable, "-X", "importtime", "-m", "dmpctl", *argv]
    found = subprocess.run(line, capture_output=True, text=True, check=True)
    return {row.rsplit("|", 1)[1].strip().split(".")[0] for row in found.stderr.splitlines() if row.startswith("import time:")}


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_is_what_it_was(name, dmpctl_, monkeypatch):
    """A change of what users read is made on purpose: `python -m tests.cli.test_help` writes the files anew."""
    monkeypatch.setenv("COLUMNS", "100")
    kept = FROZEN / f"{name or 'dmpctl'}.txt"
    assert dmpctl_(*filter(None, (name, "--help")))[1] == kept.read_text("utf-8")


def test_no_help_is_kept_of_a_command_that_is_gone():
    assert {path.stem for path in FROZEN.glob("*.txt")} == {"dmpctl", *COMMANDS}


def test_root_help_imports_nothing_heavy():
    assert not imported_by("--help") & set(HEAVY)


def test_command_help_imports_nothing_heavier_than_pydantic():
    assert not imported_by("patch", "--help") & (set(HEAVY) - {"pydantic", "rich"})


def test_the_commands_and_their_order(dmpctl_):
    code, out, _ = dmpctl_("--help")
    assert code == 0
    listed = re.findall(r"^  ([a-z-]+)  +[A-Z]", out.split("Commands:")[1], re.MULTILINE)
    assert listed == list(COMMANDS) == list(options.COMMANDS)


def test_the_list_says_what_the_commands_say(dmpctl_):
    listed = dmpctl_("--help")[1]
    for name in COMMANDS:
        assert (built(name).help or "").splitlines()[0] in listed


@pytest.mark.parametrize(
    ("name", "columns"),
    [("patch", "60"), ("patch", "200"), *((name, ("80", "60", "200")[n % 3]) for n, name in enumerate(COMMANDS))],
)
def test_every_option_is_there_whole_with_its_help(name, columns, dmpctl_, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    code, out, err = dmpctl_(name, "--help")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    words = set(out.split())
    flat = " ".join(out.split())
    for option in options.options_of(name).values():
        assert option.flag in words
        assert option.field.description.split()[0] in words
        assert option.variable in flat
        assert f"{option.panel}:" in out
        assert option.plain_type is not bool or option.off in words
        for choice in option.choices:
            assert str(choice) in flat
    assert "--config" in words


def test_every_parameter_has_help():
    assert [(name, param.name) for name in COMMANDS for param in built(name).params if not param.help] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_shown_and_are_lines_that_work(name, dmpctl_):
    _, out, _ = dmpctl_(name, "--help")
    examples = [line.strip() for line in out.split("Examples:")[1].splitlines() if line.strip()]
    assert examples
    for example in examples:
        program, *argv = shlex.split(example)
        code, _, err = dmpctl_(*argv, "--print-config")
        assert (program, argv[0], code, err) == ("dmpctl", name, 0, "")


def test_bounds_and_defaults(dmpctl_):
    _, out, _ = dmpctl_("sample", "--help")
    assert "--steps <int >=1 <=1000>" in out
    assert "default: 250" in out
    assert "<soft|topk|hard|uniform|random>" in dmpctl_("patch", "--help")[1]
    assert "--prompt-lr <float >0>" in dmpctl_("patch", "--help")[1]


def test_version(dmpctl_):
    assert dmpctl_("--version") == (0, f"dmpctl {__version__}\n", "")


def test_no_command_shows_the_help_and_is_a_usage_error(dmpctl_):
    code, out, _ = dmpctl_()
    assert code == 2
    assert "Commands:" in out


if __name__ == "__main__":
    for one in ("", *COMMANDS):
        line = [sys.executable, "-m", "dmpctl", *filter(None, (one, "--help"))]
        env = environment() | {"COLUMNS": "100"}
        text = subprocess.run(line, capture_output=True, text=True, check=True, env=env).stdout
        (FROZEN / f"{one or 'dmpctl'}.txt").write_text(text, "utf-8")
