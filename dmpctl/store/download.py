"""`dmpctl download`: lists, fetches, verifies and prunes what the tool uses and may not ship."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import amount
from dmpctl.runs.rundir import RunDir
from dmpctl.settings.assets import AssetRow, Assets
from dmpctl.settings.layers import read_toml, resolve
from dmpctl.settings.measuring import SMALL_SIDE
from dmpctl.settings.model import Settings
from dmpctl.settings.options import COMMANDS
from dmpctl.store.addresses import HUB, address_in, of_rows
from dmpctl.store.cache import Accepted, cache_dir, changing_index, files_dir, hub_dir, need_room, now, read_index
from dmpctl.store.fetch import cached, command_for, fetch, present, provenance, verify
from dmpctl.store.prune import prune
from dmpctl.store.registry import Registry, expanded, registry_of, row_at, row_named, shipped
from dmpctl.store.shapes import LATENTS, is_shape
from dmpctl.types import Progress, Report

WITH_ASSETS = ("pretrain", "patch", "sample", "fid")  # commands whose settings name rows


@dataclass(frozen=True)
class Request:
    """The rows that a command asks for. `rows`: the registry, and addresses as rows of their own; `names`: of the wanted rows,
    before their parts; `typed`: as on the command line.
    """

    settings: Settings
    rows: Registry
    wanted: list[AssetRow]
    names: tuple[str, ...]
    typed: str


def download(settings: Settings, names: Sequence[str], progress: Progress) -> Report:
    """Fetch assets by name, or what an experiment needs; without either, list what there is.

    UsageError for an unknown name, a licence that was not accepted or a full disk; MissingError for what is not there;
    IntegrityError for what is not as it should be.
    """
    options = settings.download
    request = requested(settings, names)
    for row in request.settings.assets.rows:
        if row.name in shipped():
            progress.say(f"{row.name}: the row of your settings takes the place of the shipped one")
    if options.prune:
        if names:
            raise UsageError(
                "--prune goes over the whole cache, it takes no names", "dmpctl download --prune --dry-run shows what goes"
            )
        return prune(request.rows, settings.console.dry_run)
    if options.verify:
        return verified(request, progress)
    if options.list_assets or not (names or options.needed_for):
        return listed(request)
    if not request.wanted:
        return Report({"files": []}, lines=(f"{options.needed_for} needs nothing that has to be fetched",))
    accept_licences(request)
    return fetched(request, progress)


def requested(settings: Settings, names: Sequence[str]) -> Request:
    """The rows that names, addresses and --for stand for."""
    experiment = settings.download.needed_for
    found = settings_in(experiment) if experiment else []
    own = {row.name: row for row in settings.assets.rows}
    own |= {row.name: row for recorded in found for row in recorded.assets.rows if row.name not in own}
    settings = settings.model_copy(update={"assets": Assets(rows=tuple(own.values()))})
    rows = dict(registry_of(settings))
    wanted = [row_at(name) if address_in(name) else row_named(name, rows) for name in names] + needed(found, rows)
    rows |= {row.name: row for row in wanted}
    every = tuple(dict.fromkeys(row.name for row in wanted))
    typed = " ".join([*names, *(["--for", str(experiment)] if experiment else [])])
    return Request(settings, rows, expanded(every, rows), every, typed)


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


def listed(request: Request) -> Report:
    """Every row: name, what, size, licence, present."""
    rows = [request.rows[name] for name in request.names] or list(request.rows.values())
    data: list[dict[str, Any]] = []
    for row in rows:
        path, own = cached(row, request.settings), shipped().get(row.name) != row
        shown = row.model_dump(include={"name", "what", "kind", "sha256", "non_commercial", "gated", "needs", "notes", "score"})
        size = amount(row.size) if row.size is not None else f"about {amount(row.about)}" if row.about is not None else "unknown"
        licence = row.licence + (" (non-commercial)" if row.non_commercial and "NC" not in row.licence else "")
        shown |= {"size": size, "bytes": row.size, "licence": licence, "source": row.source}
        data.append({**shown, "present": "yes" if path else "no", "path": path and str(path), "own": own})
    table = tuple({key: str(shown[key]) for key in ("name", "what", "size", "licence", "present")} for shown in data)
    lines = (f"cache: {cache_dir()}", f"Hub repositories: {hub_dir()}")
    return Report({"assets": data, "cache": str(cache_dir()), "hub_cache": str(hub_dir())}, table, lines)


def accept_licences(request: Request) -> None:
    """Record what --accept-license accepts; UsageError where a non-commercial licence was not accepted."""
    accepted, options = read_index().licences, request.settings.download
    restricted = [request.rows[name] for name in request.names if request.rows[name].non_commercial]
    restricted += [row for row in request.wanted if row.non_commercial and row not in restricted]
    new = [row for row in restricted if row.name not in accepted or accepted[row.name].licence != row.licence]
    if not new:
        return
    if not options.accept_license:
        which = ", ".join(f"{row.name} ({row.licence})" for row in new)
        command = f"dmpctl download {request.typed} --accept-license"
        raise UsageError(f"for non-commercial use only: {which}", f"if you accept that: {command}")
    if not request.settings.console.dry_run:
        with changing_index() as index:
            index.licences |= {row.name: Accepted(licence=row.licence, accepted=now()) for row in new}


def fetched(request: Request, progress: Progress) -> Report:
    """Bring every row into the cache; offline, or in a dry run, say what is missing."""
    console = request.settings.console
    missing = [row for row in request.wanted if present(row) is None]
    if console.offline and missing:
        names = ", ".join(row.label for row in missing)
        raise MissingError(f"not in the cache: {names}, and --offline forbids fetching", f"online: {command_for(missing)}")
    known = [row.size or row.about for row in missing]
    need_room(files_dir(), sum(size for size in known if size and not console.offline), ", ".join(row.label for row in missing))
    if console.dry_run:
        for row in missing:
            size = amount(row.size) if row.size else "unknown size"
            progress.say(f"would fetch {row.label} from {row.source} ({size})")
    rows = [row for row in request.wanted if not (console.dry_run and row in missing)]
    paths = [fetch(row, progress) for row in rows]
    files = [{**provenance(row), "path": str(path)} for row, path in zip(rows, paths, strict=True)]
    table = tuple({key: str(row[key]) for key in ("name", "path", "sha256", "licence")} for row in files)
    return Report({"files": files, "would_fetch": [row.label for row in missing] if console.dry_run else []}, table)


def verified(request: Request, progress: Progress) -> Report:
    """Hash everything that is there again; IntegrityError for the first file that has changed, and how many more."""
    rows = request.wanted or [row for row in request.rows.values() if not row.parts]
    there = [row for row in rows if present(row) is not None or row.name in read_index().entries]
    good: list[dict[str, str]] = []
    bad: list[IntegrityError | MissingError] = []
    for row in there:
        progress.say(f"verifying {row.label}")
        try:
            facts = verify(row, deep=True)
        except (IntegrityError, MissingError) as error:
            bad.append(error)
        else:
            good += [{"name": row.name, "file": name, "sha256": fact.sha256} for name, fact in facts.items()]
    if bad:
        first = next((error for error in bad if isinstance(error, IntegrityError)), bad[0])
        rest = f", and {len(bad) - 1} more are not as they should be" if len(bad) > 1 else ""
        raise type(first)(f"{first.message}{rest}", first.hint)
    lines = (f"{len(good)} files are what they were",) if good else ("nothing was downloaded yet",)
    return Report({"verified": good}, tuple(good), lines)
