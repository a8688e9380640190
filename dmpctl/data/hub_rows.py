"""Data sets of the Hugging Face Hub: one commit of a repository in the Hub's own cache, read as a table."""

import fnmatch
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from dmpctl.data.columns import UNNAMED, Columns
from dmpctl.data.parquet import TableReader, explained, first_line, prepared, quiet, split_of
from dmpctl.data.stream import StreamReader
from dmpctl.errors import MissingError, UsageError
from dmpctl.images.scan import printable

log = logging.getLogger(__name__)
SCHEME = "hf://"
ADDRESS = re.compile(
    r"hf://(?:datasets/)?(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^@:]+))?(?::(?:(?P<config>[^/:]+)/)?(?P<split>[^/:]+))?"
)
PAGE = "https://huggingface.co/datasets/"
CARD = ("README.md", "dataset_infos.json", ".huggingface.yaml")


@dataclass(frozen=True)
class HubSet:
    """One split of a repository. None: the main branch, the default configuration, train or the only split.

    `word`: the name after --data. `files`: the split's files, None: the repository says. `instead`: what to say where it is gone.
    """

    word: str
    repo: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    files: str | None = None
    columns: Columns = UNNAMED
    instead: str | None = None

    @property
    def shown(self) -> str:
        """What messages call it."""
        return printable(self.word if self.word.startswith(SCHEME) else f"{self.word} ({self.repo})")

    @property
    def name(self) -> str:
        """What a run calls it."""
        return self.repo if self.word.startswith(SCHEME) else self.word


KNOWN = {
    known.word: known
    for known in (
        HubSet(
            "ffhq",
            "bitmind/ffhq-256",
            split="train",
            columns=Columns("image"),
            instead="take another copy: --data hf://merkol/ffhq-256",
        ),
        HubSet(
            "imagenet",
            "ILSVRC/imagenet-1k",
            split="train",
            files="data/train-*.parquet",
            columns=Columns("image", "label"),
            instead="or name your own copy: --data DIR with one sub-folder for each synset",
        ),
        HubSet(
            "coco-val30k",
            "sayakpaul/coco-30-val-2014",
            columns=Columns("image", caption="caption"),
            instead="take your own copy: --data DIR with val2014/ and annotations/captions_val2014.json",
        ),
        HubSet(
            "laion-art",
            "fantasyfish/laion-art",
            columns=Columns("image", caption="text"),
            instead="many LAION sets have vanished; a smaller one: --data laion-subset",
        ),
        HubSet("laion-subset", "nannullna/laion_subset", instead="many LAION sets have vanished; a larger one: --data laion-art"),
    )
}


def parse(address: str) -> HubSet:
    """hf://id[@revision][:[config/]split]. Raises UsageError for anything else."""
    found = ADDRESS.fullmatch(address)
    if found is None:
        raise UsageError(f"{printable(address)} is no data set's address", "it looks like hf://owner/name@revision:config/split")
    return HubSet(address, found["repo"], found["revision"], found["config"], found["split"])


def hub_rows(wanted: HubSet, columns: Columns = UNNAMED, folder: Path | None = None) -> TableReader:
    """Returns one split of a data set of the Hub, as memory-mapped Arrow. Its rows are those of one commit, in the fingerprint.

    `folder`: its files, in a folder named after the commit; None: in the Hub's cache, fetched where they are not there.
    Raises MissingError for a repository that is gone, gated or, offline, not in the cache, and what `parquet_rows` raises.
    """
    folder = folder or snapshot(wanted)
    data_files = {wanted.split or "train": wanted.files} if wanted.files else None
    rows, _, taken = prepared(folder, wanted.shown, wanted.split, wanted.config, data_files)
    origin = f"{wanted.repo}@{folder.name}:{taken}"
    return TableReader(rows, wanted.name, wanted.shown, merged(columns, wanted.columns), origin)


def stream_hub(wanted: HubSet, columns: Columns = UNNAMED) -> StreamReader:
    """Returns the rows of `hub_rows`, but fetched as they are used, and not kept. UsageError for a set that is not parquet."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise MissingError(f"{wanted.shown} cannot be streamed offline", "leave --offline or --streaming out")
    with reached(wanted):
        commit, by_split = resolved(wanted)
        split = split_of(by_split, wanted.split, wanted.shown)
        files = by_split[split]
        if not all(name.endswith(".parquet") for name in files):
            hint = f"try the Hub's own conversion: --data hf://{wanted.repo}@refs/convert/parquet"
            raise UsageError(f"{wanted.shown} is not parquet, and only that can be streamed", hint)
        urls = [f"{SCHEME}datasets/{wanted.repo}@{commit}/{name}" for name in files]
        origin = f"{wanted.repo}@{commit}:{wanted.config or 'default'}/{split}"
        return StreamReader(urls, wanted.name, wanted.shown, merged(columns, wanted.columns), origin)


def merged(given: Columns, known: Columns) -> Columns:
    """Returns the columns that were asked for, else those that are known of a set."""
    return Columns(given.image or known.image, given.label or known.label, given.caption or known.caption)


def snapshot(wanted: HubSet) -> Path:
    """The folder in the Hub's cache that has all files of the set at one commit; its name is that commit.

    Online, what is missing is fetched; offline, or where the Hub is not reached, it is what is there.
    """
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

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
            some = [wanted.files or "README.md"]
            asked: dict[str, Any] = {"repo_type": "dataset", "revision": wanted.revision, "allow_patterns": some}
            return Path(snapshot_download(wanted.repo, local_files_only=True, **asked))
        commit, by_split = found
        names = [name for files in by_split.values() for name in files]
        cached = (try_to_load_from_cache(wanted.repo, name, revision=commit, repo_type="dataset") for name in names)
        if not all(isinstance(path, str) for path in cached):
            log.warning("fetching %s from the Hub, %s files", wanted.shown, len(names))
        patterns = [*CARD, *map(escape, names)]
        with quiet():  # by its revision, not the commit: so it is found offline
            folder = snapshot_download(wanted.repo, repo_type="dataset", revision=wanted.revision, allow_patterns=patterns)
    if Path(folder).name != commit:
        raise MissingError(f"{wanted.shown} has changed while it was fetched", "run the same command again")
    return Path(folder)


def of_network(error: Exception) -> bool:
    """Whether an error says that the Hub was not reached, in whatever library it was raised; an answer of it is none."""
    from huggingface_hub.errors import HfHubHTTPError

    libraries = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    answered = isinstance(error, HfHubHTTPError)
    return not answered and (isinstance(error, ConnectionError) or bool(libraries & {"httpx", "httpx2", "requests"}))


def resolved(wanted: HubSet) -> tuple[str, dict[str, list[str]]]:
    """The commit that a set's revision is now, and the files of each split of its configuration there. Asks the Hub."""
    from datasets import load_dataset_builder
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(wanted.repo, revision=wanted.revision)
    commit = str(info.sha)
    if wanted.files:
        there = sorted(sibling.rfilename for sibling in info.siblings or [])
        return commit, {wanted.split or "train": fnmatch.filter(there, wanted.files)}
    with explained(wanted.shown):
        builder = load_dataset_builder(wanted.repo, wanted.config, revision=commit)
    start, found = f"@{commit}/", dict[str, list[str]]()
    for split, files in (builder.config.data_files or {}).items():
        found[str(split)] = [str(file).split(start, 1)[1] for file in files if start in str(file)]
    return commit, found


@contextmanager
def reached(wanted: HubSet) -> Iterator[None]:
    """Around what asks the Hub: a repository that is gone, gated or out of reach becomes a MissingError of one sentence."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    again = "run the same command online" if wanted.word.startswith(SCHEME) else f"dmpctl download {wanted.word}"
    instead = f"; {wanted.instead}" if wanted.instead else ""
    try:
        yield
    except GatedRepoError:
        page = f"accept its terms at {PAGE}{wanted.repo}, and log in: hf auth login"
        raise MissingError(f"{wanted.shown} is gated: the Hub hands it to those who accept its terms", page + instead) from None
    except RepositoryNotFoundError:
        hint = wanted.instead or f"check {PAGE}{wanted.repo}; for a private one log in: hf auth login"
        raise MissingError(f"the Hub has no data set {wanted.repo} (or hides it from you)", hint) from None
    except RevisionNotFoundError:
        revision = printable(str(wanted.revision))
        raise MissingError(f"{wanted.repo} has no revision {revision}", f"see {PAGE}{wanted.repo}/commits") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise MissingError(f"{wanted.shown} is not in the cache, and the Hub is not reached", f"fetch it: {again}") from None
    except Exception as error:
        if not isinstance(error, HfHubHTTPError) and not of_network(error):
            raise
        raise MissingError(f"{wanted.shown} cannot be fetched: {first_line(error)}", f"try again later: {again}") from None
