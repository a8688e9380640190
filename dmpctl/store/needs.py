"""What an experiment needs of the registry, from its settings file or from its run."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dmpctl.errors import IntegrityError, MissingError
from dmpctl.runs.rundir import RunDir
from dmpctl.settings.assets import AssetRow, Assets
from dmpctl.settings.layers import read_toml, resolve
from dmpctl.settings.measuring import SMALL_SIDE
from dmpctl.settings.options import COMMANDS
from dmpctl.store.assets import ad_hoc, address_in
from dmpctl.store.registry import Registry
from dmpctl.store.shapes import is_shape

WITH_ASSETS = ("pretrain", "patch", "sample", "fid")
LATENTS = "vae-ema"  # what their latents are, where nothing says otherwise
PLACES = ("run", "out", "cache_dir", "needed_for")  # a folder may be called like an asset
DATA_SET = re.compile(r"hf://(?:datasets/)?([^:]+)(?::.*)?")  # then its configuration and split


def settings_in(experiment: Path) -> list[dict[str, dict[str, Any]]]:
    """The settings (section -> values) that a run has recorded, or that each command finds in a settings file."""
    path = experiment.expanduser()
    if path.is_dir():
        return [RunDir(path).config()["settings"]]
    if path.suffix == ".json":
        return [RunDir(path.parent).config()["settings"]]
    if not path.is_file():
        raise MissingError(f"{path} is not there", "name a settings file (TOML) or a run")
    tables = read_toml(path)
    named = [name for name in WITH_ASSETS if isinstance(tables.get(name), dict)]
    shared = any(not isinstance(value, dict) for value in tables.values())
    commands = named or (["patch"] if shared else [])
    return [resolve(name, {}, path).settings.to_dict() for name in commands if name in COMMANDS]


def rows_in(found: list[dict[str, dict[str, Any]]]) -> tuple[AssetRow, ...]:
    """The rows of their own that an experiment's settings hold."""
    rows: dict[str, AssetRow] = {}
    for sections in found:
        try:
            rows |= {row.name: row for row in Assets(**sections.get("assets", {})).rows}
        except (TypeError, ValueError):
            hint = "name the settings file instead of the run"
            raise IntegrityError("the recorded assets do not fit this dmpctl", hint) from None
    return tuple(rows.values())


def needed(found: list[dict[str, dict[str, Any]]], rows: Registry) -> list[AssetRow]:
    """Rows that these settings name, what those need in turn, and Inception where distances will be measured in it."""
    wanted: dict[str, AssetRow] = {}
    extractors: list[Any] = []
    for sections in found:
        values = {key: value for name, section in sections.items() if name != "assets" for key, value in section.items()}
        wanted |= {row.name: row for row in _named(values, rows)}
        if values.get("evaluate", "extractor" in values) and not _is_small(values):
            extractors.append(values.get("extractor"))
    if None in extractors and wanted and "inception" in rows:
        wanted["inception"] = rows["inception"]
    return _with_needs(wanted, rows)


def _named(values: Mapping[str, Any], rows: Registry) -> Iterator[AssetRow]:
    for key, value in values.items():
        if key in PLACES or not isinstance(value, str) or (key == "data" and values.get("streaming")):
            continue
        if key == "clip" and "clip-score" not in str(values.get("metrics")):
            continue
        if value in rows:
            yield rows[value]
        elif key in ("base", "weights") and (address := address_in(value)):
            yield ad_hoc(address)
        elif key == "base" and is_shape(value) and values.get("codec", "auto") == "auto" and LATENTS in rows:
            yield rows[LATENTS]
        elif key in ("data", "reference") and (found := DATA_SET.fullmatch(value)):
            yield ad_hoc("hf://datasets/" + found[1])


def _is_small(values: Mapping[str, Any]) -> bool:
    return values.get("data") == "digits" or (values.get("size") or SMALL_SIDE) < SMALL_SIDE


def _with_needs(wanted: Mapping[str, AssetRow], rows: Registry) -> list[AssetRow]:
    """With what each row needs, but no second codec where one is named."""
    found, kinds = dict(wanted), {row.kind for row in wanted.values()}
    for row in wanted.values():
        for need in (rows[name] for name in row.needs):
            if need.kind != "codec" or "codec" not in kinds:
                found[need.name] = need
    return list(found.values())
