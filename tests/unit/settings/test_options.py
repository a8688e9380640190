"""Which command shows what."""

from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

from dmpctl.cli.commands import COMMANDS as SHOWN
from dmpctl.settings.methods import Dmp
from dmpctl.settings.model import Settings
from dmpctl.settings.options import COMMANDS, Part, field_of, options_of
from dmpctl.settings.sections import Section


class Other(Section):
    """A second method, as one would be added."""

    panel: ClassVar[str] = "Method"
    method: Annotated[Literal["other"], Field(description="What is trained.")] = "other"
    rank: Annotated[int, Field(description="Rank.")] = 2


def test_the_commands_in_their_order():
    assert list(COMMANDS) == list(SHOWN)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_console(command):
    assert {"json_output", "quiet", "debug", "offline", "dry_run", "print_config"} <= set(options_of(command))
    assert {field_of(option.section) for option in options_of(command).values()} <= set(Settings.model_fields)


def test_every_section_has_its_place_in_settings():
    for name, field in Settings.model_fields.items():
        assert field_of(type(field.default)) == name


def test_a_part_shows_only_what_it_names_in_its_panel():
    options = options_of("inspect-gates")
    assert options["out"].panel == "Gates"
    assert "num_images" not in options


def test_the_names_that_users_write():
    batch_size, as_json = options_of("patch")["batch_size"], options_of("patch")["json_output"]
    assert (batch_size.flag, batch_size.variable, batch_size.public) == ("--batch-size", "DMPCTL_BATCH_SIZE", "batch_size")
    assert (as_json.flag, as_json.off, as_json.variable) == ("--json", "--no-json", "DMPCTL_JSON")


def test_plain_type_drops_none():
    options = options_of("patch")
    assert options["prompts"].plain_type is int
    assert options["hflip"].plain_type is bool
    assert options["iters"].plain_type is int


def test_two_methods_share_one_option_with_the_choices_of_both(monkeypatch):
    monkeypatch.setitem(COMMANDS, "made-up", (Part(Dmp), Part(Other)))
    options = options_of("made-up")
    assert options["method"].choices == ("dmp", "other")
    assert {"rank", "topk"} <= set(options)
