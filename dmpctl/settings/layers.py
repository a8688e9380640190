"""Priority: flags, environment variables (DMPCTL_*), TOML file, the run's recorded settings, preset, defaults.

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

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import read_json
from dmpctl.refusals import MOST, Clash, Form, Writable, as_written, instead, meant, one_of, shown, takes
from dmpctl.settings.assets import Assets, rows_of
from dmpctl.settings.methods import METHODS
from dmpctl.settings.model import Settings
from dmpctl.settings.options import COMMANDS, VARIABLE_PREFIX, Option, every_option, field_of, options_of
from dmpctl.settings.presets import PRESETS, chosen_preset
from dmpctl.texts import read_user_text, refuse_other_encoding
from dmpctl.words import nearest, nearest_or

CONFIG_VARIABLE = VARIABLE_PREFIX + "CONFIG"
ASSETS = "assets"


class Found(NamedTuple):
    """A value that some layer gives, and where: `--iters`, `DMPCTL_ITERS`, `x.toml: iters` or `preset digits`."""

    value: object
    where: str


@dataclass(frozen=True)
class Resolved:
    """The settings in force. `origins`: field name -> where its value came from, `default` where nothing gave it."""

    settings: Settings
    origins: dict[str, str]


def resolve(
    command: str, given: Mapping[str, object], config: Path | None = None, run: Path | None = None, python: bool = False
) -> Resolved:
    """Returns the settings of `command`. `given`: field name -> value that was typed; `run`: whose sampling is the default.
    `python`: whether they are arguments in Python, which is how messages then write them.

    `config` None: the file that DMPCTL_CONFIG names, if any; `run` None: for a command that starts one. UsageError for an
    unknown name or a wrong value, MissingError for a file that is not there.
    """
    options = options_of(command)
    if config is None and os.environ.get(CONFIG_VARIABLE):
        config = Path(os.environ[CONFIG_VARIABLE])
    found = from_file(config, command) if config is not None else {}
    found |= from_environment(options)
    for name, value in given.items():
        flag = options[name].off if value is False else options[name].flag
        found[name] = Found(value, options[name].public if python else flag)
    found = from_preset(found, options) | from_run(run, options) | found
    settings = validated(found, options)
    if rows := rows_of(read_toml(config).get(ASSETS, {}), str(config)) if config is not None else ():
        settings = settings.model_copy(update={"assets": Assets(rows=rows)})
    return Resolved(settings, {name: found[name].where if name in found else "default" for name in options})


def from_environment(options: Mapping[str, Option]) -> dict[str, Found]:
    """Returns the DMPCTL_* values of these options, in any case; an empty variable counts as unset.

    UsageError for a DMPCTL_ name that no command has.
    """
    known = {option.variable for option in every_option().values()} | {CONFIG_VARIABLE}
    for variable in os.environ:
        if variable.upper().startswith(VARIABLE_PREFIX) and variable.upper() not in known:
            hint = meant(variable[len(VARIABLE_PREFIX) :], written_of(every_option()), "variable", f"unset {variable}")
            raise UsageError(f"{variable} is no variable of dmpctl", hint)
    values = {variable.upper(): value for variable, value in os.environ.items() if value}
    offline = "offline" in options and os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    found = {"offline": Found(True, "HF_HUB_OFFLINE")} if offline else {}
    given = {name: option.variable for name, option in options.items() if option.variable in values}
    return found | {name: Found(values[variable], variable) for name, variable in given.items()}


def from_file(path: Path, command: str) -> dict[str, Found]:
    """Returns the values of a TOML file: top-level keys for every command, the table named like `command` over them.

    MissingError if it is not there; UsageError if it is not TOML or holds a name that the commands do not have.
    """
    content = read_toml(path)
    content.pop(ASSETS, None)  # no options: rows of the registry
    tables = {key.replace("_", "-"): value for key, value in content.items() if isinstance(value, dict)}
    for table in tables:
        if table not in COMMANDS:
            raise UsageError(
                f"{path}: [{table}] is no command of dmpctl", nearest_or(table, COMMANDS, "dmpctl --help lists them")
            )
    own = by_public_name(command)  # --weights of patch is a file, of sample a choice
    shared = {key: value for key, value in content.items() if not isinstance(value, dict)}
    found = named(shared, str(path), every_option() | own)
    for table, values in tables.items():
        over = named(values, f"{path} [{table}]", by_public_name(table))
        found |= over if table == command else {}
    return {name: value for name, value in found.items() if name in options_of(command)}


def by_public_name(command: str) -> dict[str, Option]:
    """Returns the options of `command` by the name that users write."""
    return {option.public: option for option in options_of(command).values()}


def named(
    values: Mapping[str, object], where: str, known: Mapping[str, Option], others: Iterable[str] | None = None
) -> dict[str, Found]:
    """Returns keys (with hyphens or underscores) as field names; UsageError for one that is unknown, or is there twice.

    `known`: options by the name that users write; `others`: what a key may be beside an option, for the nearest name; None:
    options alone, of which other commands may have this one.
    """
    found: dict[str, Found] = {}
    for key, value in values.items():
        public = key.replace("-", "_")
        if public not in known:
            elsewhere = " here, other commands have it" if others is None and public in every_option() else ""
            otherwise = nearest_or(public, others or (), f"remove {key} there; --help lists what there is")
            raise UsageError(f"{where}: {key} is no setting{elsewhere}", meant(key, written_of(known), "key", otherwise))
        if known[public].name in found:
            raise UsageError(f"{where}: {key} is there twice, with a hyphen and an underscore", "remove one of the two")
        found[known[public].name] = Found(value, f"{where}: {key}")
    return found


def written_of(options: Mapping[str, Option]) -> dict[str, Writable]:
    """Returns options as messages write them, by the name that users write."""
    return {option.public: option.written for option in options.values()}


def read_toml(path: Path) -> dict[str, Any]:
    """Returns the content of a TOML file; MissingError if it cannot be read, UsageError if it is not TOML."""
    try:
        return tomllib.loads(read_user_text(path))
    except (ValueError, RecursionError) as error:  # tomllib's own among them
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        why = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise MissingError(f"{path} {why}", "name a settings file with --config") from None


def from_run(run: Path | None, options: Mapping[str, Option]) -> dict[str, Found]:
    """Returns how a run sampled when it compared itself with its backbone, so that its numbers are made again alike."""
    path = None if run is None else run / "config.json"
    if path is None or not path.is_file():
        return {}
    recorded = read_json(path, 1).get("settings")
    if not isinstance(recorded, dict):
        raise IntegrityError(f"{path} does not say with which settings it was made", "name a run of dmpctl patch or pretrain")
    values = dict(recorded.get("sampling", {}))
    if "eval_images" in recorded.get("evaluate", {}):
        values["max_images"] = recorded["evaluate"]["eval_images"]
    return {name: Found(value, f"run {run}") for name, value in values.items() if name in options}


def from_preset(found: Mapping[str, Found], options: Mapping[str, Option]) -> dict[str, Found]:
    """Returns the values of the preset in force, as far as the command has them; `found`: the layers above it."""
    if "preset" not in options:
        return {}
    preset, base, method = (
        str(found[name].value if name in found else options[name].field.default) for name in ("preset", "base", "method")
    )
    if (chosen := chosen_preset(preset, base)) is None:
        return {}
    own = None if "method" in found else PRESETS[chosen].method
    values = {"method": own, **PRESETS[chosen].of(own)} if own else PRESETS[chosen].of(method)
    return {name: Found(value, f"preset {chosen}") for name, value in values.items() if name in options}


def validated(found: Mapping[str, Found], options: Mapping[str, Option]) -> Settings:
    """Returns the model, from the sections that the command has; UsageError that says where each wrong value came from."""
    sections: dict[str, dict[str, object]] = {field_of(option.section): {} for option in options.values()}
    if "method" in sections:
        sections["method"]["method"] = next(iter(METHODS))
    for name, value in found.items():
        refuse_other_encoding(str(value.value), value.where)
        choices = {str(choice): choice for choice in options[name].choices}  # variables are text: "3" stands for 3
        given = as_written(value.value, options[name].field)
        plain = given if isinstance(given, bool) else choices.get(str(given), given)
        sections[field_of(options[name].section)][name] = plain
    try:
        return Settings.model_validate(sections)
    except ValidationError as error:
        refused = dict(_refusal(details, found, options) for details in error.errors(include_url=False))
        raise UsageError("; ".join(refused), "; ".join(dict.fromkeys(refused.values()))) from None


def _refusal(details: ErrorDetails, found: Mapping[str, Found], options: Mapping[str, Option]) -> tuple[str, str]:
    """One validation error as a sentence (which option, as it was given, what it takes, what was found) and a hint."""
    clash = details.get("ctx", {}).get("error")
    if isinstance(clash, Clash):
        return _clash(clash, found, options)
    name = str(details["loc"][-1]) if str(details["loc"][-1]) in options else str(details["loc"][0])
    option, (value, where) = options[name], found[name]
    form, written = option.form(where), option.written
    if details["type"] == "extra_forbidden":
        return _other_method(name, found, options)
    subject = where if form != "plain" else f"{option.public} ({where})"
    what = "one of " if option.choices and len(option.choices) > 1 else ""
    allowed = one_of(list(map(str, option.choices))) if option.choices else takes(option.field)
    better = nearest(str(value), map(str, option.choices)) if option.choices else instead(option.field, value)
    allowed += (
        f" and at most {MOST}" if isinstance(value, int | str) and str(value).isdecimal() and int(str(value)[:30]) > MOST else ""
    )
    leave = f"{written.left_out(form)} for its default"
    hint = leave if better is None else f"say {written.typed(better, form)}, or {leave}"
    return f"{subject} takes {what}{allowed}, found {shown(value)}", hint


def _clash(clash: Clash, found: Mapping[str, Found], options: Mapping[str, Option]) -> tuple[str, str]:
    """Values that do not go together, each as it was given; what to type is in the form of one that was."""
    forms = [options[name].form(found[name].where) for name in clash.names if name in found]
    usual: Form = next((form for form in forms if form != "plain"), "flag")

    def word(name: str, value: object, spec: str) -> str:
        written = options[name].written
        if spec:
            return written.named(usual) if spec == "-" else written.typed(True if spec == "on" else spec, usual)
        where = found[name].where if name in found else "the default"
        form = options[name].form(where)
        file = f"{where.rpartition(': ')[0]}: " if form == "key" else ""
        return f"{file}{written.typed(value, form)}" + (f" ({where})" if form == "plain" else "")

    return clash.said(word)


def _other_method(name: str, found: Mapping[str, Found], options: Mapping[str, Option]) -> tuple[str, str]:
    """An option of another method than the chosen one: which methods have it, and what the chosen one has instead."""
    option, where = options[name], found[name].where
    form, chosen = option.form(where), str(found["method"].value) if "method" in found else next(iter(METHODS))
    having = [method for method, kind in METHODS.items() if name in kind.model_fields]
    own = [options[each] for each in METHODS[chosen].model_fields if set(each.split("_")) & set(name.split("_")) - {"prompt"}]
    names = one_of([each.written.named(form) for each in own])
    change = f"add {options['method'].written.typed(having[0], form)}, or {option.written.left_out(form)}"
    sentence = f"{where if form != 'plain' else option.public} belongs to method {one_of(having)}, the chosen method is {chosen}"
    return sentence, f"say {names}, or {change}" if own else change
