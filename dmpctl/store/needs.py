"""The rows of the registry that an experiment needs, found in its settings file or in its run."""

from collections.abc import Iterator
from pathlib import Path

from dmpctl.errors import IntegrityError, MissingError
from dmpctl.runs.rundir import RunDir
from dmpctl.settings.assets import AssetRow
from dmpctl.settings.layers import read_toml, resolve
from dmpctl.settings.measuring import SMALL_SIDE
from dmpctl.settings.model import Settings
from dmpctl.settings.options import COMMANDS
from dmpctl.store.addresses import HUB, address_in, of_rows
from dmpctl.store.registry import Registry, row_at
from dmpctl.store.shapes import LATENTS, is_shape

WITH_ASSETS = ("pretrain", "patch", "sample", "fid")


def settings_in(experiment: Path) -> list[Settings]:
    """Returns the settings that a run has recorded, or that each command finds in a settings file."""
    path = experiment.expanduser()
    if path.is_dir() or path.suffix == ".json":
        recorded = RunDir(path if path.is_dir() else path.parent).config().settings
        try:
            return [Settings.from_dict(recorded)]
        except IntegrityError as error:
            raise IntegrityError(error.message, "name the settings file instead of the run") from None
    if not path.is_file():
        raise MissingError(f"{path} is not there", "name a settings file (TOML) or a run")
    tables = read_toml(path)
    named = [name for name in WITH_ASSETS if isinstance(tables.get(name), dict)]
    shared = any(not isinstance(value, dict) for value in tables.values())
    commands = named or (["patch"] if shared else [])
    return [resolve(name, {}, path).settings for name in commands if name in COMMANDS]


def needed(found: list[Settings], rows: Registry) -> list[AssetRow]:
    """Returns the rows that these settings name, those that they need in turn, and Inception where distances are taken in it."""
    wanted = {row.name: row for settings in found for row in _named(settings, rows)}
    if wanted and "inception" in rows and any(_measures_in_inception(settings) for settings in found):
        wanted["inception"] = rows["inception"]
    kinds = {row.kind for row in wanted.values()}
    for row in list(wanted.values()):
        for need in (rows[name] for name in row.needs):
            if need.kind != "codec" or "codec" not in kinds:  # no second codec where one is named
                wanted[need.name] = need
    return list(wanted.values())


def _named(settings: Settings, rows: Registry) -> Iterator[AssetRow]:
    base, data, fid = settings.base, settings.data, settings.fid
    images = None if data.streaming else data.data
    clip = fid.clip if "clip-score" in fid.metrics else None
    words = [base.base, base.weights, images, fid.reference, fid.protocol, fid.extractor, clip]
    words += [settings.text.text_encoder, settings.codec.codec, settings.prompting.prompts_from]
    for word in map(str, filter(None, words)):
        if word in rows:
            yield rows[word]
        elif word in (base.base, str(base.weights)) and (address := address_in(word)):
            yield row_at(address)
        elif word == base.base and is_shape(word) and settings.codec.codec == "auto" and LATENTS in rows:
            yield rows[LATENTS]
        elif word in (images, fid.reference) and word.startswith(HUB):
            yield row_at(of_rows(word).word)


def _measures_in_inception(settings: Settings) -> bool:
    data = settings.data
    measures = settings.evaluate.evaluate if "evaluate" in settings.model_fields_set else "fid" in settings.model_fields_set
    small = data.data == "digits" or (data.size or SMALL_SIDE) < SMALL_SIDE
    return measures and not small and settings.fid.extractor is None
