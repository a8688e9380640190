"""Assets by name for the rest of the program: where they lie, whether they are whole, and where they came from."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import sha256_of
from dmpctl.settings.assets import AssetRow
from dmpctl.settings.model import Settings
from dmpctl.store import hub
from dmpctl.store.cache import Entry, Fact, changing_index, files_dir, hub_dir, now, read_index, working_on
from dmpctl.store.https import Wanted, fetch_file
from dmpctl.store.registry import registry_of, row_named
from dmpctl.types import Progress


def cached(name: str, settings: Settings | None = None) -> Path | None:
    """Where an asset lies if it was downloaded, None if not; nothing is read of it. `settings` None: shipped rows only.

    A file, or a folder: of a whole repository, or of all downloads for a row of several parts.
    """
    rows = registry_of(settings)
    row = row_named(name, rows)
    if row.parts:
        return files_dir() if all(cached(part, settings) for part in row.parts) else None
    return present(row)


def require(name: str, settings: Settings | None = None) -> Path:
    """Where an asset lies, checked: by hash, or by size alone for data, which is large.

    MissingError with the command that fetches it; IntegrityError if it is not what was fetched.
    """
    row = row_named(name, registry_of(settings))
    path = cached(name, settings)
    if path is None:
        raise MissingError(f"{name}{f' ({row.what})' if row.what else ''} is not in the cache", f"run {command_for([row])}")
    for part in row.parts or (name,):
        verify(row_named(part, registry_of(settings)), deep=row.kind != "data")
    return path


def command_for(rows: list[AssetRow]) -> str:
    """The command that fetches these rows, to be pasted."""
    accept = " --accept-license" if any(row.non_commercial for row in rows) else ""
    return f"dmpctl download {' '.join(row.label for row in rows)}{accept}"


def target_of(row: AssetRow) -> Path:
    """Where the file of a row from https, or put there by hand, lies."""
    return files_dir() / row.name / row.filename


def entry_of(row: AssetRow) -> Entry | None:
    """What the index knows of a row, None if it was never fetched, or the row means something else now."""
    entry = read_index().entries.get(row.name)
    same = entry is not None and (entry.source, entry.wanted) == (row.source, row.patterns)
    return entry if same else None


def folder_of(entry: Entry) -> Path:
    """The folder that an entry's files are named in."""
    return files_dir() if entry.hub is None else hub_dir() / entry.hub / "snapshots" / str(entry.revision)


def present(row: AssetRow) -> Path | None:
    """Where the row lies if all of it is there with the right size, else None."""
    entry = entry_of(row)
    if row.repo is None:
        path, other = target_of(row), row.name in read_index().entries and entry is None  # fetched from elsewhere
        return path if not other and path.is_file() and row.size in (None, path.stat().st_size) else None
    if entry is not None:
        folder, names = folder_of(entry), list(entry.files)
        whole = all(_size(folder / name) == fact.size for name, fact in entry.files.items())
    else:  # another program may have fetched it; whether that is all of it can be told for plain names only
        folder, names = hub.folder_of(row) / "snapshots" / str(row.revision), list(row.patterns)
        whole = row.pinned and not any(set("*?[") & set(name) for name in names) and all(map(_there(folder), names))
    return (folder if row.allow else folder / str(row.file)) if whole and names else None


def _there(folder: Path) -> Any:
    return lambda name: (folder / name).is_file()


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def files_of(row: AssetRow) -> Iterator[tuple[Path, str, Fact | None]]:
    """Each file of a row that is there: its path, its name in the index, and what should be true of it (None: not known)."""
    entry = entry_of(row)
    if entry is not None:
        yield from ((folder_of(entry) / name, name, fact) for name, fact in entry.files.items())
    elif row.repo is None:
        known = Fact(row.sha256, row.size or 0) if row.sha256 else None
        yield target_of(row), f"{row.name}/{row.filename}", known
    else:
        folder = hub.folder_of(row) / "snapshots" / str(row.revision)
        for name in row.patterns:
            yield folder / name, name, Fact(row.sha256, row.size or 0) if name == row.file and row.sha256 else None


def verify(row: AssetRow, deep: bool) -> dict[str, Fact]:
    """The facts of all files of a row, by hash if `deep`, else by size; IntegrityError naming file, expected and actual.

    What was not known before (a file put there by hand) is recorded, where the cache can be written.
    """
    found, new = {}, False
    for path, name, known in files_of(row):
        size = _size(path)
        if size is None:
            raise MissingError(f"{path} is not there", f"run {command_for([row])}")
        if known is not None and not deep:
            if known.size not in (0, size):
                raise _damaged(row, path, f"{size} bytes", f"{known.size} bytes")
            found[name] = known
            continue
        fact = Fact(sha256_of(path), size)
        expected = row.sha256 if row.sha256 and path.name == Path(row.filename).name else known.sha256 if known else None
        if expected not in (None, fact.sha256):
            raise _damaged(row, path, f"sha256 {fact.sha256}", expected)
        found[name], new = fact, new or known is None
    if new or entry_of(row) is None:
        _record_found(row, found)
    return found


def _damaged(row: AssetRow, path: Path, actual: str, expected: str) -> IntegrityError:
    return IntegrityError(f"{path} is damaged: it has {actual}, expected {expected}", f"delete it and run {command_for([row])}")


def _record_found(row: AssetRow, files: dict[str, Fact]) -> None:
    revision, folder = (row.revision, hub.folder_of(row).name) if row.repo else (None, None)
    try:
        record(row, Entry(row.source, row.licence, now(), row.patterns, revision, folder, files))
    except UsageError:  # a cache that may only be read is as good
        return


def record(row: AssetRow, entry: Entry) -> None:
    """Put what was found of a row into the index."""
    with changing_index() as index:
        index.entries[row.name] = entry


def fetch(row: AssetRow, progress: Progress) -> Path:
    """Bring a row into the cache, or wait for the process that is doing so; returns where it lies, checked."""
    if (path := present(row)) is not None:
        verify(row, deep=row.kind != "data")
        return path
    if row.repo is None and row.url is None:
        raise MissingError(f"{row.filename} has no address to fetch it from", f"get it by hand, and put it at {target_of(row)}")
    with working_on(row.name, progress):
        if present(row) is None:
            before = entry_of(row)
            entry = _from_hub(row, before, progress) if row.repo else _from_https(row, before, progress)
            record(row, entry)
    path = present(row)
    if path is None:
        raise MissingError(f"{row.name} is gone again", "run the same command again")
    return path


def _from_https(row: AssetRow, before: Entry | None, progress: Progress) -> Entry:
    name = f"{row.name}/{row.filename}"
    first = before.files.get(name) if before else None
    wanted = Wanted(row.label, row.url or "", row.sha256 or (first.sha256 if first else None), row.size, row.alternative)
    fact = fetch_file(wanted, target_of(row), progress)
    return Entry(row.source, row.licence, now(), row.patterns, files={name: fact})


def _from_hub(row: AssetRow, before: Entry | None, progress: Progress) -> Entry:
    snapshot = hub.fetch_repo(row, row.revision if row.pinned else before.revision if before else None, progress)
    fact = snapshot.files.get(row.file or "")
    if row.sha256 is not None and fact is not None and fact.sha256 != row.sha256:
        raise _damaged(row, snapshot.folder / str(row.file), f"sha256 {fact.sha256}", row.sha256)
    folder = hub.folder_of(row).name
    return Entry(row.source, row.licence, now(), row.patterns, snapshot.commit, folder, snapshot.files)


def provenance_of(name: str, settings: Settings | None = None) -> dict[str, Any]:
    """What a run records of an asset it used: source, commit, hashes, licence, and when that was accepted (None: it was not)."""
    row = row_named(name, registry_of(settings))
    parts = {"parts": [provenance_of(part, settings) for part in row.parts]} if row.parts else {}
    return provenance(row) | parts


def provenance(row: AssetRow) -> dict[str, Any]:
    """The same of one row."""
    entry, accepted = entry_of(row), read_index().licences.get(row.name, {})
    about = {"name": row.label, "source": row.source, "licence": row.licence, "non_commercial": row.non_commercial}
    about["accepted"] = accepted.get("accepted") if accepted.get("licence") == row.licence else None
    if entry is None:
        return about | {"revision": row.revision, "sha256": row.sha256}
    digests = {name: fact.sha256 for name, fact in entry.files.items()}
    one = next(iter(digests.values())) if len(digests) == 1 else _digest_of(digests)
    return about | {"revision": entry.revision, "sha256": one, "fetched": entry.fetched}


def _digest_of(digests: dict[str, str]) -> str:
    """One sha256 for many files: over their names and hashes, sorted."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def ad_hoc(address: str) -> AssetRow:
    """A row for hf://... or https://..., named by its hash; UsageError for what is neither."""
    if address.startswith("hf://"):
        return hub.parse(address)
    name = "url-" + hashlib.sha256(address.encode()).hexdigest()[:12]
    try:
        return AssetRow(name=name, what=address, url=address)
    except ValueError:
        raise UsageError(f"{address} is no https address of a file", "write https://HOST/.../FILE") from None


def address_in(given: str | Path) -> str | None:
    """The address that was given, None for a path or a name. A Path has made one slash of the two."""
    found = re.fullmatch(r"(hf|https?):/{1,2}(.+)", str(given))
    return f"{found[1]}://{found[2]}" if found else None


def resolve_weights(given: str | Path, settings: Settings, progress: Progress) -> Path:
    """The file that --weights means: hf://OWNER/NAME[@REV][/FILE], https://..., a name of the registry, or a path.

    An address is fetched into the cache, unless offline: MissingError. Its hash is recorded at first, and checked after.
    """
    address, rows = address_in(given), registry_of(settings)
    if address is None:
        if str(given) in rows and not Path(given).exists():
            return require(str(given), settings)
        path = Path(given).expanduser()
        if not path.is_file():
            raise MissingError(f"{path} is not there", "name a file, hf://OWNER/NAME@REVISION/FILE or https://...")
        return path
    row = ad_hoc(address)
    if present(row) is None:
        if settings.console.offline:
            hint = "run the same command online once"
            raise MissingError(f"{address} is not in the cache and --offline forbids fetching it", hint)
        fetch(row, progress)
    return weights_at_hand(address)


def folder_at_hand(address: str) -> Path:
    """The model of the Hub that was fetched from hf://OWNER/NAME[@REV], as a folder, checked.

    MissingError with the command that fetches it; UsageError for an address of one file.
    """
    row = ad_hoc(address)
    if row.repo is None or row.file is not None or row.dataset:
        raise UsageError(f"--base {address} is no model of the Hub", "write hf://OWNER/NAME, or name a shape and --weights")
    path = present(row)
    if path is None:
        raise MissingError(f"{address} is not in the cache", f"run {command_for([row])}")
    verify(row, deep=True)
    return path


def weights_at_hand(address: str) -> Path:
    """The file of weights that was fetched from an address, checked; MissingError with the command that fetches it."""
    row = ad_hoc(address)
    path = present(row)
    if path is None:
        raise MissingError(f"{address} is not in the cache", f"run {command_for([row])}")
    verify(row, deep=row.kind != "data")
    entry = entry_of(row)
    if row.file is None and row.repo is not None and entry is not None:
        return hub.only_weights(hub.Snapshot(path, str(entry.revision), entry.files), address)
    return path
