"""Rows by name: the shipped ones of registry.toml, and the users' own, which come before those of the same name.

registry.toml is the place to add a row. Its [data.NAME] tables say how `--data NAME` reads what was fetched.
"""

import hashlib
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from typing import Any

from pydantic import BaseModel, ConfigDict

from dmpctl.errors import UsageError
from dmpctl.settings.assets import AssetRow, rows_of
from dmpctl.settings.model import Settings
from dmpctl.store.addresses import HUB, HubAddress, of_files
from dmpctl.words import nearest_or, redacted

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")  # the first kind that a repository has one of is taken
BESIDE = (".json", ".txt", ".model")  # of a model: its configs and its words
Registry = Mapping[str, AssetRow]


class Published(BaseModel):
    """How a published data set is read. None: the default, found by type and name, or nothing to say.

    `row` and `captions`: rows of images and of captions as COCO publishes them, `row` None: the row of the same name.
    `files`: those of the split, `instead`: what to take where the repository is gone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    row: str | None = None
    captions: str | None = None
    split: str | None = None
    files: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    instead: str | None = None


@cache
def _file() -> dict[str, Any]:
    return tomllib.loads((resources.files("dmpctl") / "store" / "registry.toml").read_text("utf-8"))


@cache
def shipped() -> Registry:
    """The rows that come with dmpctl, by name."""
    return {row.name: row for row in rows_of(_file()["assets"], "registry.toml")}


@cache
def published() -> Mapping[str, Published]:
    """How the published data sets are read, by the name after --data."""
    return {name: Published(**table) for name, table in _file()["data"].items()}


def registry_of(settings: Settings | None = None) -> Registry:
    """All rows by name: the user's own, then the shipped ones whose name they leave free. None: the shipped ones."""
    own = {row.name: row for row in settings.assets.rows} if settings is not None else {}
    rows = own | {name: row for name, row in shipped().items() if name not in own}
    for row in own.values():
        for name in (*row.parts, *row.needs):
            if name not in rows:
                raise UsageError(f"[assets.{row.name}] names {name}, which is no asset", "give it a table of its own")
    return rows


def row_named(name: str, rows: Registry) -> AssetRow:
    """The row of that name; UsageError with the nearest one where there is none."""
    if name in rows:
        return rows[name]
    raise UsageError(f"{name} is no known download", nearest_or(name, rows, "dmpctl download --list shows what there is"))


def expanded(names: Iterable[str], rows: Registry) -> list[AssetRow]:
    """The rows to fetch for these names, each once: a row of parts stands for its parts."""
    found: dict[str, AssetRow] = {}
    for name in names:
        row = row_named(name, rows)
        found |= {part.name: part for part in (expanded(row.parts, rows) if row.parts else [row])}
    return list(found.values())


def row_at(address: str) -> AssetRow:
    """A row for an address, named by its hash; UsageError for what is no address of files.

    Of a model without a file: its weights and what lies beside them; of a data set: all files.
    """
    digest = hashlib.sha256(redacted(address).encode()).hexdigest()[:12]
    if not address.startswith(HUB):
        try:
            return AssetRow(name=f"url-{digest}", what=address, url=address)
        except ValueError:
            raise UsageError(f"{address} is no https address of a file", "write https://HOST/.../FILE") from None
    at = of_files(address)
    allow = () if at.file else ("*",) if at.dataset else tuple(f"*{end}" for end in WEIGHTS + BESIDE)
    return AssetRow(
        name=f"hub-{digest}",
        what=address,
        kind="data" if at.dataset else "backbone",
        repo=at.repo,
        dataset=at.dataset,
        revision=at.revision,
        file=at.file,
        allow=allow,
    )


def address_of(row: AssetRow) -> HubAddress:
    """Where a row of the Hub comes from."""
    return HubAddress(row.repo or "", row.dataset, row.revision, row.file)
