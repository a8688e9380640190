"""Addresses of things elsewhere: https://HOST/.../FILE, and hf://[datasets/]OWNER/NAME[@REVISION] with a file or a split."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from dmpctl.errors import UsageError
from dmpctl.words import printable

HUB = "hf://"
GRAMMAR = re.compile(
    r"hf://(?P<dataset>datasets/)?(?P<repo>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>refs/(pr|convert)/[\w.-]+|[\w.-]+))?"
    r"(/(?P<file>[^:]+))?(:((?P<config>[^/:]+)/)?(?P<split>[^/:]+))?"
)


@dataclass(frozen=True)
class HubAddress:
    """A repository of the Hugging Face Hub, and what is meant in it.

    `revision` None: the main branch. `file` None: whatever files are wanted. `config` and `split`, of a data set, None: the
    default configuration, and train or the only split.
    """

    repo: str
    dataset: bool = False
    revision: str | None = None
    file: str | None = None
    config: str | None = None
    split: str | None = None

    @property
    def word(self) -> str:
        """The address of these files, whatever is read of them."""
        revision, file = self.revision and f"@{self.revision}", self.file and f"/{self.file}"
        return f"{HUB}{'datasets/' if self.dataset else ''}{self.repo}{revision or ''}{file or ''}"

    @property
    def page(self) -> str:
        """The repository's web page."""
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return f"{endpoint.rstrip('/')}/{'datasets/' if self.dataset else ''}{self.repo}"

    @property
    def folder(self) -> str:
        """The name of the repository's folder in the Hub's cache."""
        return "--".join(["datasets" if self.dataset else "models", *self.repo.split("/")])


def address_in(word: str | Path) -> str | None:
    """The address that was given, None for a path or a name. A Path has made one slash of the two."""
    found = re.fullmatch(r"(hf|https?):/{1,2}(.+)", str(word))
    return f"{found[1]}://{found[2]}" if found else None


def of_files(address: str) -> HubAddress:
    """hf://[datasets/]OWNER/NAME[@REVISION][/FILE]; UsageError for anything else."""
    found = _parsed(address)
    if found is None or "/" not in found.repo or found.split:
        raise UsageError(f"{address} is no address on the Hub", "write hf://OWNER/NAME, hf://OWNER/NAME@REVISION or .../FILE")
    return found


def of_rows(address: str) -> HubAddress:
    """hf://[datasets/][OWNER/]NAME[@REVISION][:[CONFIG/]SPLIT], a data set with or without `datasets/`; else UsageError."""
    found = _parsed(address)
    if found is None or (found.file and not found.revision):
        raise UsageError(f"{printable(address)} is no data set's address", "it looks like hf://owner/name@revision:config/split")
    revision = f"{found.revision}/{found.file}" if found.file else found.revision  # a branch may have a slash in its name
    return replace(found, dataset=True, revision=revision, file=None)


def _parsed(address: str) -> HubAddress | None:
    found = GRAMMAR.fullmatch(address)
    if found is None or ".." in address.split("/"):
        return None
    return HubAddress(found["repo"], bool(found["dataset"]), *found.group("revision", "file", "config", "split"))
