"""Rows of the registry: what can be fetched, and under which licence. Users add theirs as [assets.NAME] in a TOML file."""

import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dmpctl.errors import UsageError
from dmpctl.refusals import Takes, first_error
from dmpctl.settings.sections import Section
from dmpctl.words import nearest_or

COMMIT = re.compile(r"[0-9a-f]{40}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def is_safe(url: str) -> bool:
    """https, or plain http to this machine itself."""
    parts = urlsplit(url)
    if parts.scheme == "http" and parts.hostname:
        if parts.hostname == "localhost":
            return True
        try:
            return ip_address(parts.hostname).is_loopback
        except ValueError:
            return False
    return parts.scheme == "https" and bool(parts.hostname)


class AssetRow(BaseModel):
    """Something elsewhere: a file at `url`, files of the Hub repository `repo`, several rows (`parts`), or a file by hand.

    `revision` None: main, pinned to the commit found at the first download. `file`: the one file meant, to which `sha256`
    and `size` (bytes) belong; None: not known, recorded at the first download and checked after. `allow`: patterns of all
    files of the repository that are wanted, empty: `file` alone. `about`: roughly how many bytes, where `size` cannot say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    what: str = ""
    kind: Literal["backbone", "codec", "data", "extractor", "statistics", "text"] = "backbone"
    url: str | None = None
    repo: Annotated[str | None, Takes("OWNER/NAME", "owner/name")] = Field(default=None, pattern=r"^\w[\w.-]*(/\w[\w.-]*)?$")
    dataset: bool = False
    revision: str | None = None
    file: str | None = None
    allow: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    sha256: Annotated[str | None, Takes("64 hexadecimal digits", "0" * 64)] = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    size: int | None = Field(default=None, ge=0)
    about: int | None = Field(default=None, ge=0)
    licence: str = "unknown"
    non_commercial: bool = False
    gated: bool = False
    needs: tuple[str, ...] = ()
    alternative: str | None = None
    notes: str | None = None
    score: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no name: letters, digits, dots, hyphens and underscores only")
        given = [name for name in ("url", "repo", "parts") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other, give one of the two")
        if not given and self.file is None:
            raise ValueError("it needs url or repo")
        if self.url is not None and not is_safe(self.url):
            raise ValueError(f"url {self.url} is not https")
        if self.repo is not None and self.file is None and not self.allow:
            raise ValueError("repo needs file, or patterns of files in allow")
        wanted = [self.file or "", *self.allow]
        if any(path.startswith("/") or ".." in path.split("/") for path in wanted):
            raise ValueError("file and allow name files inside the repository")
        if self.url is not None and not self.filename:
            raise ValueError(f"url {self.url} names no file")
        return self

    @property
    def label(self) -> str:
        """The row as people call it: its name, or the address that was given instead of one."""
        return self.what if "://" in self.what else self.name

    @property
    def filename(self) -> str:
        """The name of the file in the cache, for a row with `url` or by hand."""
        return self.file or urlsplit(self.url or "").path.rsplit("/", 1)[-1]

    @property
    def patterns(self) -> tuple[str, ...]:
        """Every file of the repository that is wanted."""
        return tuple(dict.fromkeys([*([self.file] if self.file else []), *self.allow]))

    @property
    def source(self) -> str:
        """Where it comes from, as one word."""
        if self.repo is not None:
            return f"hf://{'datasets/' if self.dataset else ''}{self.repo}@{self.revision or 'main'}"
        return self.url or ("+".join(self.parts) if self.parts else "by hand")

    @property
    def pinned(self) -> bool:
        """Whether `revision` is a commit, which never changes."""
        return bool(self.revision and COMMIT.fullmatch(self.revision))


class Assets(Section, panel="Assets", science=False):
    """The rows of the settings file, under [assets.NAME]."""

    rows: tuple[AssetRow, ...] = ()


def rows_of(tables: Any, where: str) -> tuple[AssetRow, ...]:
    """Rows of the [assets.*] tables found in `where`; UsageError, one sentence, for a key or value that is wrong."""
    if not isinstance(tables, Mapping) or not all(isinstance(table, Mapping) for table in tables.values()):
        raise UsageError(f"{where}: an asset is a table [assets.NAME]")
    rows, known = [], sorted(set(AssetRow.model_fields) - {"name"})
    for name, table in tables.items():
        plain = {key: key.replace("-", "_").replace("license", "licence") for key in table}
        for key, field in plain.items():
            if field not in known:
                hint = nearest_or(field, known, f"remove {key} there; the keys are {', '.join(known)}")
                raise UsageError(f"{where} [assets.{name}]: {key} is no key of an asset", hint)
        try:
            rows.append(AssetRow(name=name, **{plain[key]: value for key, value in table.items()}))
        except ValidationError as error:
            wrong = first_error(error, AssetRow)
            raise UsageError(f"{where} [assets.{name}]: {wrong.sentence}", f"correct the table [assets.{name}] there") from None
    return tuple(rows)
