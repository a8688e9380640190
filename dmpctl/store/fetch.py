"""Rows of the registry on this disk: where their files lie, whether they are whole, and how they come here."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import sha256_of, sha256_of_bytes
from dmpctl.settings.assets import AssetRow
from dmpctl.settings.model import Settings
from dmpctl.store import hub
from dmpctl.store.cache import Fact, Fetched, changing_index, files_dir, now, read_index, working_on
from dmpctl.store.https import fetch_file
from dmpctl.store.registry import address_of, expanded, registry_of, row_named
from dmpctl.types import Progress
from dmpctl.words import redacted


@dataclass(frozen=True)
class Expected:
    """A file of a row: where it lies or would lie, its name in the index, and its hash and size (None: not known)."""

    path: Path
    name: str
    sha256: str | None
    size: int | None


def target_of(row: AssetRow) -> Path:
    """Where the file of a row from https, or put there by hand, lies."""
    return files_dir() / row.name / row.filename


def entry_of(row: AssetRow) -> Fetched | None:
    """Returns the index's entry of a row, None if it was never fetched, or the row means something else now."""
    entry = read_index().entries.get(row.name)
    same = entry is not None and (entry.source, entry.wanted) == (redacted(row.source), row.patterns)
    return entry if same else None


def folder_of(row: AssetRow) -> Path:
    """The folder that the row's files are named in."""
    entry = entry_of(row)
    if entry is not None:
        return entry.folder
    return files_dir() if row.repo is None else hub.snapshot_of(address_of(row), row.revision)


def files_of(row: AssetRow) -> list[Expected]:
    """Returns the files of a row, fetched or not; empty where nobody can tell which these are."""
    entry, folder = entry_of(row), folder_of(row)
    facts = entry.files if entry is not None else {}
    own = row.file if row.repo is not None else f"{row.name}/{row.filename}"  # the file that the row's hash and size are of
    if entry is not None:
        names = list(facts)
    elif row.repo is None:
        names = [str(own)] if row.name not in read_index().entries else []  # that was fetched from elsewhere
    else:  # another program may have fetched it
        names = list(row.patterns) if row.pinned and not any(set("*?[") & set(name) for name in row.patterns) else []
    found = []
    for name in names:
        fact, known = facts.get(name), name == own
        digest = (row.sha256 if known else None) or (fact.sha256 if fact else None)
        found.append(Expected(folder / name, name, digest, fact.size if fact else row.size if known else None))
    return found


def present(row: AssetRow) -> Path | None:
    """Returns where the row lies, a file or a folder, if all of it is there with the right size, else None.

    A file that was put there by hand, or fetched from https, is held against the size of its row alone: one with another size
    than at first is damaged, which `verify` says, and not fetched again.
    """
    files = files_of(row)
    for file in files:
        size = row.size if row.repo is None else file.size
        if not file.path.is_file() or size not in (None, file.path.stat().st_size):
            return None
    return (folder_of(row) if row.allow else files[0].path) if files else None


def cached(asset: str | AssetRow, settings: Settings | None = None) -> Path | None:
    """Returns where an asset lies if it was downloaded, None if not; nothing is read of it. `settings` None: shipped rows only.

    A file, or a folder: of a whole repository, or of all downloads for a row of several parts.
    """
    row, parts = _parts_of(asset, settings)
    places = [present(part) for part in parts]
    return None if None in places else files_dir() if row.parts else places[0]


def require(asset: str | AssetRow, settings: Settings | None = None) -> Path:
    """Returns where an asset lies, checked: by hash, or by size alone for data, which is large.

    MissingError with the command that fetches it; IntegrityError if it is not what was fetched.
    """
    row, parts = _parts_of(asset, settings)
    path = cached(asset, settings)
    if path is None:
        what = f" ({row.what})" if row.what and row.what != row.label else ""
        raise MissingError(f"{row.label}{what} is not in the cache", f"run {command_for([row])}")
    for part in parts:
        verify(part, deep=row.kind != "data")
    return path


def _parts_of(asset: str | AssetRow, settings: Settings | None) -> tuple[AssetRow, list[AssetRow]]:
    """The row of an asset, and the rows to fetch for it."""
    rows = registry_of(settings)
    row = row_named(asset, rows) if isinstance(asset, str) else asset
    return row, expanded(row.parts, rows) or [row]


def command_for(rows: list[AssetRow]) -> str:
    """The command that fetches these rows, to be pasted."""
    accept = " --accept-license" if any(row.non_commercial for row in rows) else ""
    return f"dmpctl download {' '.join(row.label for row in rows)}{accept}"


def verify(row: AssetRow, deep: bool) -> dict[str, Fact]:
    """Returns the facts of all files of a row, checked by hash if `deep`, else by size; IntegrityError names what differs.

    What was not known before (a file put there by hand) is recorded, where the cache can be written.
    """
    found = {}
    for file in files_of(row):
        if not file.path.is_file():
            raise MissingError(f"{file.path} is not there", f"run {command_for([row])}")
        size = file.path.stat().st_size
        digest = sha256_of(file.path) if deep or file.sha256 is None else file.sha256
        if not deep and file.sha256 is not None and file.size not in (None, size):
            raise _damaged(row, file.path, f"{size} bytes", f"{file.size} bytes")
        if file.sha256 not in (None, digest):
            raise _damaged(row, file.path, f"sha256 {digest}", str(file.sha256))
        found[file.name] = Fact(sha256=digest, size=size)
    if found and entry_of(row) is None:
        with suppress(UsageError):  # a cache that may only be read is as good
            record(row, found, row.revision if row.repo else None)
    return found


def _damaged(row: AssetRow, path: Path, actual: str, expected: str) -> IntegrityError:
    return IntegrityError(f"{path} is damaged: it has {actual}, expected {expected}", f"delete it and run {command_for([row])}")


def record(row: AssetRow, files: dict[str, Fact], commit: str | None) -> None:
    """Put what was found of a row into the index; `commit` None: it is no repository."""
    repository = address_of(row).folder if row.repo else None
    with changing_index() as index:
        index.entries[row.name] = Fetched(
            source=row.source,
            licence=row.licence,
            fetched=now(),
            wanted=row.patterns,
            revision=commit,
            hub=repository,
            files=files,
        )


def fetch(row: AssetRow, progress: Progress) -> Path:
    """Bring a row into the cache, or wait for the process that is doing so; returns where it lies, checked."""
    if (path := present(row)) is not None:
        verify(row, deep=row.kind != "data")
        return path
    if row.repo is None and row.url is None:
        raise MissingError(f"{row.filename} has no address to fetch it from", f"get it by hand, and put it at {target_of(row)}")
    with working_on(row.name, progress):
        if present(row) is None:
            record(row, *_received(row, progress))
    if (path := present(row)) is None:
        raise MissingError(f"{row.name} is gone again", "run the same command again")
    return path


def _received(row: AssetRow, progress: Progress) -> tuple[dict[str, Fact], str | None]:
    """The files of a row that were fetched now, and their commit (None: it is no repository)."""
    if row.repo is None:
        [file] = files_of(row) or [Expected(target_of(row), f"{row.name}/{row.filename}", row.sha256, row.size)]
        return {file.name: fetch_file(row.model_copy(update={"sha256": file.sha256}), file.path, progress)}, None
    entry = entry_of(row)
    files, commit = hub.fetch_repo(row, row.revision if row.pinned else entry.revision if entry else None, progress)
    if row.sha256 is not None and row.file in files and (actual := files[row.file].sha256) != row.sha256:
        raise _damaged(row, hub.snapshot_of(address_of(row), commit) / row.file, f"sha256 {actual}", row.sha256)
    return files, commit


def provenance(row: AssetRow) -> dict[str, Any]:
    """Returns the report of a row: source, commit, hash, licence, and when that was accepted (None: it was not)."""
    entry, accepted = entry_of(row), read_index().licences.get(row.name)
    about = {"name": row.label, "source": row.source, "licence": row.licence, "non_commercial": row.non_commercial}
    about["accepted"] = accepted.accepted if accepted and accepted.licence == row.licence else None
    if entry is None:
        return about | {"revision": row.revision, "sha256": row.sha256}
    digests = [fact.sha256 for fact in entry.files.values()]
    lines = "".join(f"{fact.sha256}  {name}\n" for name, fact in sorted(entry.files.items()))  # one hash for many files
    digest = digests[0] if len(digests) == 1 else sha256_of_bytes(lines.encode())
    return about | {"revision": entry.revision, "sha256": digest, "fetched": entry.fetched}
