"""Flags > DMPCTL_* > TOML file > what the run recorded > preset > defaults.

Each value comes with where it came from, and each error names it.
"""

import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import EnvSettingsSource

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import read_json
from dmpctl.settings.assets import Assets, rows_of
from dmpctl.settings.methods import METHODS
from dmpctl.settings.model import Settings
from dmpctl.settings.options import COMMANDS, VARIABLE_PREFIX, Option, every_option, field_of, options_of
from dmpctl.settings.presets import PRESETS, chosen_preset, preset_values
from dmpctl.words import did_you_mean

CONFIG_VARIABLE = VARIABLE_PREFIX + "CONFIG"
ASSETS = "assets"
TRUE = ("1", "true", "yes", "on")


class Found(NamedTuple):
    """A value that some layer gives, and where: `--iters`, `DMPCTL_ITERS`, `x.toml: iters` or `preset digits`."""

    value: Any
    where: str


@dataclass(frozen=True)
class Resolved:
    """The settings in force. `origins`: field name -> where its value came from, `default` where nothing gave it."""

    settings: Settings
    origins: dict[str, str]


def resolve(command: str, given: Mapping[str, Any], config: Path | None = None, run: Path | None = None) -> Resolved:
    """The settings of `command`. `given`: field name -> what was typed; `config` None: the file DMPCTL_CONFIG names, if any.

    `run`: a run whose own sampling is the default here, None for a command that starts one.
    UsageError for an unknown name or a wrong value, MissingError for a file that is not there.
    """
    options = options_of(command)
    if config is None and os.environ.get(CONFIG_VARIABLE):
        config = Path(os.environ[CONFIG_VARIABLE])
    found = from_file(config, command) if config is not None else {}
    found |= from_environment(options)
    found |= from_flags(given, options)
    found = from_preset(found, options) | from_run(run, options) | found
    settings = validated(found, options)
    if rows := rows_of(read_toml(config).get(ASSETS, {}), str(config)) if config is not None else ():
        settings = settings.model_copy(update={"assets": Assets(rows=rows)})
    return Resolved(settings, {name: found[name].where if name in found else "default" for name in options})


def from_flags(given: Mapping[str, Any], options: Mapping[str, Option]) -> dict[str, Found]:
    """What was typed; `--no-x` is the origin of a no."""
    return {name: Found(value, options[name].off if value is False else options[name].flag) for name, value in given.items()}


def from_environment(options: Mapping[str, Option]) -> dict[str, Found]:
    """DMPCTL_* of these options; an empty variable counts as unset. UsageError for a DMPCTL_ name that no command has."""
    known = {option.variable for option in every_option().values()} | {CONFIG_VARIABLE}
    for variable in os.environ:
        if variable.upper().startswith(VARIABLE_PREFIX) and variable.upper() not in known:
            raise UsageError(f"{variable} is no variable of dmpctl{did_you_mean(variable.upper(), known)}")
    source = EnvSettingsSource(Settings, case_sensitive=False, env_prefix=VARIABLE_PREFIX, env_ignore_empty=True)
    found = {}
    if "offline" in options and os.environ.get("HF_HUB_OFFLINE", "").lower() in TRUE:
        found["offline"] = Found(True, "HF_HUB_OFFLINE")
    for name, option in options.items():
        value, _, is_complex = source.get_field_value(option.field, option.public)
        if value is not None:
            found[name] = Found(source.prepare_field_value(option.public, option.field, value, is_complex), option.variable)
    return found


def from_file(path: Path, command: str) -> dict[str, Found]:
    """A TOML file: top-level keys for every command, the table named like `command` over them.

    MissingError if it is not there; UsageError if it is not TOML or holds a name that the commands do not have.
    """
    shared, tables = {}, {}
    for key, value in read_toml(path).items():
        if key == ASSETS:
            continue  # no options: rows of the registry
        if isinstance(value, dict):
            tables[key.replace("_", "-")] = value
        else:
            shared[key] = value
    for table in tables:
        if table not in COMMANDS:
            raise UsageError(f"{path}: [{table}] is no command of dmpctl{did_you_mean(table, COMMANDS)}")
    own = {option.public: option for option in options_of(command).values()}  # --weights of patch is a file, of sample a choice
    found = _named(shared, str(path), every_option() | own)
    for table, values in tables.items():
        of_table = {option.public: option for option in options_of(table).values()}
        over = _named(values, f"{path} [{table}]", of_table)
        found |= over if table == command else {}
    options = options_of(command)
    return {name: value for name, value in found.items() if name in options}


def _named(values: Mapping[str, Any], where: str, known: Mapping[str, Option]) -> dict[str, Found]:
    """Keys (with hyphens or underscores) as field names; UsageError for one that is not in `known`, or is there twice."""
    found: dict[str, Found] = {}
    for key, value in values.items():
        public = key.replace("-", "_")
        if public not in known:
            elsewhere = " here, other commands have it" if public in every_option() else did_you_mean(public, known)
            raise UsageError(f"{where}: {key} is no setting{elsewhere}")
        if known[public].name in found:
            raise UsageError(f"{where}: {key} is there twice, with a hyphen and with an underscore")
        found[known[public].name] = Found(value, f"{where}: {key}")
    return found


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; MissingError if it cannot be read, UsageError if it is not TOML."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    except FileNotFoundError:
        raise MissingError(f"{path} is not there", "name a settings file with --config") from None
    except OSError as error:
        raise MissingError(f"{path} cannot be read: {error.strerror}", "name a settings file with --config") from None


def from_run(run: Path | None, options: Mapping[str, Option]) -> dict[str, Found]:
    """How a run sampled when it compared itself with its backbone: so that its numbers are made again in the same way."""
    path = None if run is None else run / "config.json"
    if path is None or not path.is_file():
        return {}
    recorded = read_json(path).get("settings")
    if not isinstance(recorded, dict):
        raise IntegrityError(f"{path} does not say with which settings it was made", "name a run of dmpctl patch or pretrain")
    values = dict(recorded.get("sampling", {}))
    if "eval_images" in recorded.get("evaluate", {}):
        values["max_images"] = recorded["evaluate"]["eval_images"]
    return {name: Found(value, f"run {run}") for name, value in values.items() if name in options}


def from_preset(found: Mapping[str, Found], options: Mapping[str, Option]) -> dict[str, Found]:
    """The values of the preset in force, as far as the command has them."""
    if "preset" not in options:
        return {}
    preset, base, method = (
        str(found[name].value if name in found else options[name].field.default) for name in ("preset", "base", "method")
    )
    chosen = chosen_preset(preset, base)
    own = PRESETS[chosen].method if chosen and "method" not in found else None
    values, where = preset_values(preset, base, own or method), f"preset {chosen}"
    if own:
        values = {"method": own} | values
    return {name: Found(value, where) for name, value in values.items() if name in options}


def validated(found: Mapping[str, Found], options: Mapping[str, Option]) -> Settings:
    """The model, from the sections that the command has; UsageError that says where each wrong value came from."""
    sections: dict[str, dict[str, Any]] = {field_of(option.section): {} for option in options.values()}
    if "method" in sections:
        sections["method"]["method"] = next(iter(METHODS))
    for name, value in found.items():
        sections[field_of(options[name].section)][name] = _as_choice(value.value, options[name].choices)
    try:
        return Settings(**sections)  # type: ignore[arg-type]  # validation is what turns dicts into sections
    except ValidationError as error:
        sentences = [_sentence(details, found, options) for details in error.errors(include_url=False)]
        raise UsageError("; ".join(dict.fromkeys(sentences))) from None


def _as_choice(value: Any, choices: Iterable[Any]) -> Any:
    """The choice that is written like `value`: "3" for 3 (variables are text), 3 for "3"; `value` itself for none."""
    return next((choice for choice in choices if str(choice) == str(value)), value)


def _sentence(details: ErrorDetails, found: Mapping[str, Found], options: Mapping[str, Option]) -> str:
    """One validation error: where the value came from, what is wrong with it, what was found."""
    if details["type"] == "value_error":
        return str(details["ctx"]["error"])
    name = str(details["loc"][-1]) if str(details["loc"][-1]) in options else str(details["loc"][0])
    where, value, option = found[name].where, found[name].value, options[name]
    match details["type"]:
        case "literal_error" | "union_tag_invalid":
            choices = [str(choice) for choice in option.choices]
            return f"{where}: {value!r} is not one of {', '.join(choices)}{did_you_mean(str(value), choices)}"
        case "string_pattern_mismatch":
            return f"{where}: found {value!r}, expected {option.field.description}".rstrip(".")
        case "extra_forbidden":
            return f"{where}: the chosen method has no {option.public}"
        case _:
            return f"{where}: {details['msg']}, found {value!r}"
