"""The inventory of a source: what was found, what of it is used, and what was assumed. One line for people, JSON for records."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dmpctl.images.scan import Header
from dmpctl.types import Progress, Source
from dmpctl.words import printable

NAMED_CLASSES = 12  # more of them are shown by their first and last


@dataclass(frozen=True)
class Inventory:
    """`forms`: used images by format, as far as headers were read; `smallest` and `largest`: their sides before cropping.

    `classes`: names in the order of their labels, with images of each (None: not counted). `unused`: kind -> (count, example).
    """

    name: str
    images: int
    forms: Mapping[str, int]
    grey: bool
    smallest: tuple[int, int]
    largest: tuple[int, int]
    classes: Mapping[str, int | None]
    labels_from: str | None
    captions_from: str | None
    assumed: Sequence[str]
    unused: Mapping[str, tuple[int, str]]

    @property
    def line(self) -> str:
        """One line for people."""
        sizes = " to ".join(dict.fromkeys(f"{width}x{height}" for width, height in (self.smallest, self.largest)))
        forms = ", ".join(f"{count} {form}" for form, count in self.forms.items())
        parts = [f"{self.name}: {self.images} images ({', '.join(filter(None, (forms, sizes)))})"]
        if self.classes:
            known = [f"{number} {name}{'' if n is None else f' ({n})'}" for number, (name, n) in enumerate(self.classes.items())]
            known = known if len(known) <= NAMED_CLASSES else [*known[:3], "...", known[-1]]
            parts.append(f"{len(self.classes)} classes from {self.labels_from}: {', '.join(known)}")
        parts += [f"captions from {self.captions_from}"] if self.captions_from else []
        parts += self.assumed
        beside = [f"{count} {kind} ({example})" for kind, (count, example) in self.unused.items()]
        return "; ".join([*parts, *(["not used: " + ", ".join(beside)] if beside else [])])


def counted(names: Mapping[str, Sequence[str]]) -> dict[str, tuple[int, str]]:
    """How many of each kind there are, and the first by name."""
    return {kind or "without extension": (len(found), printable(found[0])) for kind, found in names.items() if found}


def done_to(headers: Sequence[Header], size: int, channels: int) -> list[str]:
    """Describes how images with these headers are changed, in words; empty where they are used as they are."""
    cropped = sum(header.width != header.height for header in headers if size)
    resized = sum(min(header.width, header.height) != size for header in headers if size)
    what = [f"{cropped} cropped to squares"] * bool(cropped) + [f"{resized} resized to {size}x{size}"] * bool(resized)
    grey = sum(header.grey for header in headers)
    turned = (len(headers) - grey, "made grey") if channels == 1 else (grey, "grey, repeated to colour")
    for count, words in (
        turned,
        (sum(header.frames for header in headers), "with several frames, of which the first is used"),
        (sum(header.transparent for header in headers), "transparent, put over white"),
    ):
        what += [f"{count} {words}"] * bool(count)
    return what


def inventory_of(source: Source) -> Inventory | None:
    """The inventory of a source that has one; None for others (a cache, a stand-in)."""
    found = getattr(source, "inventory", None)
    return found if isinstance(found, Inventory) else None


def recorded(source: Source) -> dict[str, Any]:
    """The inventory as a record has it: {"inventory": ...}, {} without one."""
    found = inventory_of(source)
    return {} if found is None else {"inventory": asdict(found)}


def told(source: Source, progress: Progress, takes: Sequence[str] | None = None, hint: str = "") -> None:
    """Says the inventory and, of labels and captions, those that are there and not in `takes`; `hint` ends that sentence.

    `takes` None: nobody could use them.
    """
    found = inventory_of(source)
    if found is None:
        return
    progress.say(found.line)
    if found.classes and takes is not None and "labels" not in takes:
        progress.say(f"{len(found.classes)} classes found, not used{hint}")
