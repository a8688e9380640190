"""The one door from a word of the command line, a name, an address or a path, to a thing on this disk.

`locate` is for what is one file or folder, `locate_data` for images to read.
"""

import os
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Literal, assert_never

from dmpctl.errors import DmpError, MissingError, UsageError
from dmpctl.settings.model import Settings
from dmpctl.store.addresses import HUB, HubAddress, address_in, of_rows
from dmpctl.store.fetch import fetch, files_of, present, require
from dmpctl.store.registry import WEIGHTS, Published, Registry, address_of, published, registry_of, row_at, shipped
from dmpctl.store.shapes import SHAPE_NAMES, is_shape
from dmpctl.texts import refuse_other_encoding
from dmpctl.types import Progress
from dmpctl.words import nearest_or, printable

Kind = Literal["backbone", "weights", "run", "codec", "text", "clip"]
BUNDLED = {"digits": "digits-dit.safetensors"}  # backbones that come with dmpctl
BUNDLED_DATA = ("digits",)
PUBLISHED_SHAPES = {"DiT-XL/2": "dit-xl2-256"}  # shapes with public weights, and the row of the registry that has them
NAME_DATA = "say --data digits, give a folder of PNG/JPEG images, or a data set of the Hub: --data hf://owner/name"


def locate(word: str | Path, kind: Kind, settings: Settings | None = None) -> Path:
    """Returns the file or folder that `word` names, checked; for a run whatever path was given.

    `settings`: with the user's own rows of the registry, None: the shipped ones. MissingError with the command that fetches
    it, or where nothing lies at a path; UsageError, with the nearest name, for a word that is no such thing; IntegrityError
    for a damaged download.
    """
    name, path, rows = str(word), Path(word).expanduser(), named(kind, settings)
    if kind in ("backbone", "weights", "run") and (address := address_in(word)) is not None:
        if kind == "weights":
            return _weights_at(address)
        row = row_at(address)
        if row.repo is None or row.file is not None or row.dataset:
            raise UsageError(f"--base {address} is no model of the Hub", "write hf://OWNER/NAME, or name a shape and --weights")
        return require(row)
    if name in rows and (kind == "codec" or not path.exists()):  # a codec is recorded by its name, whatever folder lies here
        if kind == "backbone" and rows[name].kind != "backbone":
            known = f"name one, such as {PUBLISHED_SHAPES['DiT-XL/2']}"
            raise UsageError(f"--base {name} is no backbone but {rows[name].what}", known)
        return require(name, settings)
    if kind == "backbone" and name in BUNDLED:
        return Path(str(resources.files("dmpctl") / "assets" / BUNDLED[name]))
    if kind == "run" or (kind != "weights" and path.is_dir()) or (kind in ("backbone", "weights") and path.is_file()):
        return path
    if kind in ("codec", "text") and (other := registry_of(settings).get(name)) is not None:
        raise UsageError(f"{name} is a row of kind {other.kind}, no {kind}", f'give that row kind = "{kind}"')
    raise _nothing(name, path, kind)


def named(kind: Kind, settings: Settings | None = None) -> Registry:
    """Returns the rows of the registry that a word may name where a thing of this kind is asked for."""
    match kind:
        case "backbone" | "weights":
            return registry_of(settings)
        case "codec" | "text":
            return {name: row for name, row in registry_of(settings).items() if row.kind == kind}
        case "clip":
            return {"clip-l": registry_of(settings)["clip-l"]}
        case "run":
            return {}
        case _:
            assert_never(kind)


def _nothing(name: str, path: Path, kind: Kind) -> DmpError:
    """The failure for a word that is no name, and at which nothing lies."""
    names = list(named(kind))
    if kind != "run" and (there := _on_the_hub(name, kind)) is not None:
        return UsageError(f"{name} is the name of a model on the Hub, and nothing lies at that path", there)
    match kind:
        case "backbone":
            known = f"name one of {', '.join(BUNDLED)}, a shape such as DiT-L/2, a file or a run"
            hint = nearest_or(name, [*BUNDLED, *SHAPE_NAMES, *PUBLISHED_SHAPES.values(), *names], known, 0.5)
            return UsageError(f"--base {name} is no known backbone, no file and no run", hint)
        case "codec" if path.name != name:
            return MissingError(f"there is no folder {name} with a codec", "name it with --codec FOLDER")
        case "codec":
            known = f"name one of auto, identity, {', '.join(names)}, or a folder"
            return UsageError(f"--codec {name} is no known codec and no folder", nearest_or(name, ["identity", *names], known))
        case "text":
            return MissingError(f"there is no text encoder {name}", f"name a folder, or one of {', '.join(names)}")
        case "clip":
            return MissingError(f"there is no CLIP {path}", f"name a folder, or {names[0]}")
        case "weights" | "run":
            return MissingError(f"{path} is not there", "name a file, hf://OWNER/NAME@REVISION/FILE or https://...")
        case _:
            assert_never(kind)


def _on_the_hub(name: str, kind: Kind) -> str | None:
    """The hint for a word OWNER/NAME, which is an address or has a name of its own here; None for another word."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or is_shape(name) or name.endswith((*WEIGHTS, ".json", ".toml")):
        return None
    own = [row.name for row in shipped().values() if row.repo == name and row.name in named(kind)]
    own += [row.removesuffix("-diffusers") for row in own if row.endswith("-diffusers")]
    if kind in ("backbone", "weights"):
        return f"write {' or '.join([*own, f'{HUB}{name}'])}"
    return f"write {' or '.join(own)}" if own else None


def fetch_weights(word: str | Path, settings: Settings, progress: Progress) -> Path:
    """Returns the file that --weights names; an address is fetched into the cache first, unless offline: MissingError.

    Its hash is recorded at the first download, and checked after.
    """
    address = address_in(word)
    if address is not None and present(row_at(address)) is None:
        if settings.console.offline:
            hint = "run the same command online once"
            raise MissingError(f"{address} is not in the cache and --offline forbids fetching it", hint)
        fetch(row_at(address), progress)
    return locate(word, "weights", settings)


def _weights_at(address: str) -> Path:
    """The file of weights that was fetched from an address; UsageError for a repository with several to choose from."""
    row = row_at(address)
    path = require(row)
    if row.file is not None or row.repo is None:
        return path
    for end in WEIGHTS:
        names = [file.name for file in files_of(row) if file.name.endswith(end)]
        if len(names) > 1:
            raise UsageError(f"{address} holds {len(names)} files of weights", f"name one: {address}/{names[0]}")
        if names:
            return path / names[0]
    raise MissingError(f"{address} holds no weights ({', '.join(WEIGHTS)})", "name another repository")


@dataclass(frozen=True)
class CocoFiles:
    """A split of MS-COCO as it is published: its images and its captions, each a zip file or what lies unpacked."""

    images: Path
    captions: Path
    split: str


@dataclass(frozen=True)
class HubRows:
    """One split of a data set of the Hub. `word`: as it was given; `folder`: where it was downloaded, None: it was not."""

    word: str
    at: HubAddress
    how: Published
    folder: Path | None = None

    @property
    def shown(self) -> str:
        """The data set as messages call it."""
        return printable(self.word if self.word.startswith(HUB) else f"{self.word} ({self.at.repo})")

    @property
    def name(self) -> str:
        """The data set as a run calls it."""
        return self.at.repo if self.word.startswith(HUB) else self.word

    @property
    def command(self) -> str:
        """The command that fetches it, for hints."""
        return "run the same command online" if self.word.startswith(HUB) else f"dmpctl download {self.word}"


def locate_data(
    word: str, settings: Settings | None = None, streaming: bool = False
) -> Literal["digits"] | CocoFiles | HubRows | Path:
    """Returns where the images lie that `word` names; published ones lie in the cache, unless they are streamed.

    `settings` and failures as for `locate`; UsageError, too, for a row of the user's that is no data.
    """
    word = lasting_data(word, settings)
    if word == "digits":
        return "digits"
    if (how := published().get(word)) is not None:
        if how.row is not None and how.captions is not None and how.split is not None:
            return CocoFiles(require(how.row, settings), require(how.captions, settings), how.split)
        if (row := registry_of(settings)[word]).repo is None and streaming:
            raise UsageError(f"{word} comes from {row.source}, and only sets of the Hub are streamed", "leave --streaming out")
        at = replace(address_of(row), split=how.split)
        return HubRows(word, at, how, None if streaming else require(word, settings))
    if word.startswith(HUB):
        return HubRows(word, of_rows(word), Published())
    path = os.path.expanduser(word)
    if os.path.exists(path):
        refuse_other_encoding(os.path.abspath(path), "--data")
        return Path(path)
    shown, names = printable(word), (*BUNDLED_DATA, *published())
    if any(separator in word for separator in (os.sep, os.altsep, "/") if separator):
        raise MissingError(f"there is no folder {shown}", "check --data")
    near = get_close_matches(word, names, n=1)
    known = f"; the nearest is {near[0]!r}" if near else f"; there is {', '.join(names)}"
    raise UsageError(f"no data is called {shown!r}{known}", NAME_DATA)


def lasting_data(word: str, settings: Settings | None) -> str:
    """Returns a word for these images that means the same without the user's own rows: a path or an hf:// address for such a row.

    A row of a published name changes what is fetched under it, not how it is found. Failures as for `locate_data`.
    """
    rows = {row.name: row for row in settings.assets.rows} if settings is not None else {}
    if word not in rows or word in (*BUNDLED_DATA, *published()) or os.path.exists(os.path.expanduser(word)):
        return word
    row = rows[word]
    if row.kind != "data":
        raise UsageError(f"--data {word} is a row of kind {row.kind}", 'give that row kind = "data"')
    return f"{HUB}{row.repo}@{row.revision or 'main'}" if row.repo is not None else str(require(word, settings))
