"""Data sets of the Hugging Face Hub: one commit of a repository in the Hub's own cache, read as a table."""

import fnmatch
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from glob import escape
from pathlib import Path

from dmpctl.errors import DmpError, MissingError, UsageError
from dmpctl.store.addresses import HUB
from dmpctl.store.https import Again
from dmpctl.store.hub import failure, of_network
from dmpctl.store.locate import HubRows
from dmpctl.store.registry import Published
from dmpctl.tables.columns import UNNAMED, Columns
from dmpctl.tables.parquet import TableReader, built, explained, prepared, quiet, split_of, with_splits
from dmpctl.tables.stream import StreamReader
from dmpctl.words import printable

log = logging.getLogger(__name__)
CARD = ("README.md", "dataset_infos.json", ".huggingface.yaml")


def hub_rows(wanted: HubRows, columns: Columns = UNNAMED) -> TableReader:
    """Returns one split of a data set of the Hub, as memory-mapped Arrow. Its rows are those of one commit, in the fingerprint.

    `wanted.folder` is named after the commit; None: the files lie in the Hub's cache, and are fetched where they are not there.
    Raises MissingError for a repository that is gone, gated or, offline, not in the cache, and what `parquet_rows` raises.
    """
    folder, at, files = wanted.folder or snapshot(wanted), wanted.at, wanted.how.files
    data_files = {at.split or "train": files} if files else None
    builder, split, _ = built(folder, wanted.shown, at.split, at.config, data_files, follow=True)  # the cache is made of links
    rows, origin = prepared(builder, split, wanted.shown), f"{at.repo}@{folder.name}:{builder.config.name}/{split}"
    return with_splits(TableReader(rows, wanted.name, wanted.shown, merged(columns, wanted.how), origin), builder, split)


def stream_hub(wanted: HubRows, columns: Columns = UNNAMED) -> StreamReader:
    """Returns the rows of `hub_rows`, but fetched as they are used, and not kept. UsageError for a set that is not parquet."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise MissingError(f"{wanted.shown} cannot be streamed offline", "leave --offline or --streaming out")
    with reached(wanted):
        commit, by_split = resolved(wanted)
        split = split_of(by_split, wanted.at.split, wanted.shown)
        files = by_split[split]
        if not all(name.endswith(".parquet") for name in files):
            hint = f"try the Hub's own conversion: --data hf://{wanted.at.repo}@refs/convert/parquet"
            raise UsageError(f"{wanted.shown} is not parquet, and only that can be streamed", hint)
        urls = [f"{HUB}datasets/{wanted.at.repo}@{commit}/{name}" for name in files]
        origin = f"{wanted.at.repo}@{commit}:{wanted.at.config or 'default'}/{split}"
        return StreamReader(urls, wanted.name, wanted.shown, merged(columns, wanted.how), origin)


def merged(given: Columns, known: Published) -> Columns:
    """Returns the columns that were asked for, else those that are known of a published set."""
    image, label, caption = known.image_column, known.label_column, known.caption_column
    return Columns(given.image or image, given.label or label, given.caption or caption)


def snapshot(wanted: HubRows) -> Path:
    """Returns the folder in the Hub's cache that has all files of the set at one commit; its name is that commit.

    Online, missing files are fetched; offline, or where the Hub is not reached, the cache has to do.
    """
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

    fetch = partial(snapshot_download, repo_type="dataset")
    with reached(wanted):
        found = None
        if not constants.is_offline_mode():
            try:
                found = resolved(wanted)
            except Exception as error:
                if not of_network(error):
                    raise
                log.warning("the Hub is not reached: looking for %s in its cache", wanted.shown)
        if found is None:
            some = wanted.how.files or "README.md"
            return Path(fetch(wanted.at.repo, revision=wanted.at.revision, allow_patterns=some, local_files_only=True))
        commit, by_split = found
        names = [name for files in by_split.values() for name in files]
        cached = (try_to_load_from_cache(wanted.at.repo, name, revision=commit, repo_type="dataset") for name in names)
        if not all(isinstance(path, str) for path in cached):
            log.warning("fetching %s from the Hub, %s files", wanted.shown, len(names))
        patterns = [*CARD, *map(escape, names)]
        with quiet():  # by its revision, not the commit: so it is found offline
            folder = fetch(wanted.at.repo, revision=wanted.at.revision, allow_patterns=patterns)
    if Path(folder).name != commit:
        raise MissingError(f"{wanted.shown} has changed while it was fetched", "run the same command again")
    return Path(folder)


def resolved(wanted: HubRows) -> tuple[str, dict[str, list[str]]]:
    """Returns the commit of a set's revision, asked of the Hub, and the files of each split of its configuration there."""
    from datasets import load_dataset_builder
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(wanted.at.repo, revision=wanted.at.revision)
    commit = str(info.sha)
    if wanted.how.files:
        there = sorted(sibling.rfilename for sibling in info.siblings or [])
        return commit, {wanted.at.split or "train": fnmatch.filter(there, wanted.how.files)}
    with explained(wanted.shown):
        builder = load_dataset_builder(wanted.at.repo, wanted.at.config, revision=commit)
    start, found = f"@{commit}/", dict[str, list[str]]()
    for split, files in (builder.config.data_files or {}).items():
        if far := [str(file) for file in files if start not in str(file)]:
            raise UsageError(f"the card of {wanted.shown} names data outside of it: {printable(far[0])}", "name that itself")
        found[str(split)] = [str(file).split(start, 1)[1] for file in files]
    return commit, found


@contextmanager
def reached(wanted: HubRows) -> Iterator[None]:
    """Around questions to the Hub: a repository that is gone, gated or out of reach becomes a MissingError of one sentence."""
    try:
        yield
    except DmpError:
        raise
    except Exception as error:
        found = failure(wanted.at, error, wanted.how.instead, wanted.shown, wanted.command)
        if isinstance(found, Again):
            found = MissingError(f"{wanted.shown} cannot be fetched: {found}", f"try again later: {wanted.command}")
        raise found from None
