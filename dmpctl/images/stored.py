"""Encoded images that a reader finds (files, rows, members of shards) as a source: every bad one is named and counted.

A small set (`most_held`, HELD_BYTES) is decoded as a whole at the start and held in memory. Of a larger one headers are read
at the start, and it is decoded as it is used: an image that is broken behind its header then stops the run by name under
`on_bad` "fail"; under "skip" the next good one stands in for it, always that one.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import IO, Any, Literal

import torch
from PIL import Image
from torch import Tensor

from dmpctl.errors import IntegrityError, UsageError
from dmpctl.images.inventory import Inventory, counted, done_to
from dmpctl.images.reader import Reader
from dmpctl.images.scan import BROKEN, FORMATS, OUTWARD, TO_FOLDER, Header, attempt, header_of, reason_of
from dmpctl.images.transforms import to_square
from dmpctl.types import Source
from dmpctl.words import printable

HELD_ITEMS, HELD_BYTES = 20_000, 2**30
LOSSY = (".jpg", ".jpeg", ".webp")
ONE_BY_ONE = 256  # images in a batch of those that are read one by one
NAMED = 3  # bad images that an error names
IN_A_ROW = 100  # broken images side by side: no longer a few bad ones

Bad = tuple[str, str]  # an image's name, printable, and the reason why it cannot be used
OnBad = Literal["fail", "skip"]
OwnSize = Literal["never", "one", "any"]
log = logging.getLogger(__name__)


class StoredImages:
    """The images of a reader as uint8 [C, size, size], by `transforms.to_square`; with a short side under size / 2 one is bad.

    `size` None: the side that all images share. `channels` None: 1 if all of them are grey, else 3. Bad images raise
    IntegrityError under `on_bad` "fail"; under "skip" they are left out and listed in `bad`. `num_classes` 0: no labels.
    `most_held`: images to hold in memory, at most. `own`: "any": images stay as large as they are, items differ in shape;
    "one": so if all share one size, else squares of `size`. Raises UsageError if there is no common size.
    """

    mirror = True

    def __init__(
        self,
        reader: Reader,
        size: int | None = None,
        channels: int | None = None,
        on_bad: OnBad = "fail",
        most_held: int = HELD_ITEMS,
        own: OwnSize = "never",
    ) -> None:
        self.name, self._reader = reader.name, reader
        self.bad: list[Bad] = []
        good = self._left(range(len(reader)), {index: why for index in range(len(reader)) if (why := reader.wrong(index))})
        looked = reader.looked_at(good)
        headers = dict(zip(looked, attempt(self._header, looked), strict=True))
        known = [header for header in headers.values() if isinstance(header, Header)]
        whole = own == "any" or (own == "one" and len({(header.width, header.height) for header in known}) == 1)
        self._size = 0 if whole else size or (common_side(known, reader.shown) if known else 1)
        self._channels = channels or (1 if all(header.grey for header in known) else 3)
        all_looked = len(looked) == len(good)
        judged = {i: too_small(found, self._size) if isinstance(found, Header) else found for i, found in headers.items()}
        good = self._left(good, {index: why for index, why in judged.items() if why})
        digests: list[bytes] | None = None
        self._held: Tensor | None = None
        if all_looked and self._size and len(good) <= most_held and len(good) * self._channels * self._size**2 <= HELD_BYTES:
            good, self._held, digests = self._decoded(good)
        self.bad.sort()
        if self.bad and (on_bad == "fail" or not good):
            raise refused(self.bad, len(reader), reader.shown)
        self._kept: Sequence[int] = good
        self._labels, self.num_classes = reader.labels(good)
        self.classes = reader.classes(good)
        used = [header for index in good if isinstance(header := headers.get(index), Header)]
        sides = [(header.width, header.height) for header in used] or [(0, 0)]
        self.inventory = Inventory(
            reader.name,
            len(good),
            dict(Counter(header.form for header in used).most_common()),
            all(header.grey for header in used),
            min(sides),
            max(sides),
            self._counted(),
            reader.labels_from,
            reader.captions_from,
            [*reader.assumed, *done_to(used, self._size, self._channels)],
            counted(reader.unused | {"that cannot be used": [name for name, _ in self.bad]}),
        )
        flags: Any = torch.zeros(len(good), dtype=torch.bool)
        # In memory that loader processes share: between them, each broken image is reported once.
        self._broken: Tensor | None = flags.share_memory_() if self._held is None and on_bad == "skip" else None
        digest = hashlib.sha256(repr((self._channels, self._size)).encode())
        for part in reader.identity(good, digests):
            digest.update(part)
        self.fingerprint = digest.hexdigest()

    @property
    def replaced(self) -> list[str]:
        """Names of the broken images, found since the start, that others stand in for."""
        return [] if self._broken is None else [self._name(place) for place in self._broken.nonzero()[:, 0].tolist()]

    def __len__(self) -> int:
        return len(self._kept)

    def item(self, index: int) -> tuple[Tensor, int]:
        """Image uint8 [C, S, S] and label (0 without classes). Raises IntegrityError if it cannot be decoded."""
        if self._held is not None:
            return self._held[index], self._label(index)
        place, image = self._standing_in(range(len(self))[index])
        return image, self._label(place)

    def names(self) -> list[str]:
        """The names of the images, as messages show them."""
        return [self._name(place) for place in range(len(self))]

    def images(self) -> Tensor | None:
        """All images, uint8 [N, C, S, S], not copied; None if they are too large to be held in memory."""
        return self._held

    def labels(self) -> Tensor:
        """All labels, int64 [N]."""
        return torch.tensor([self._label(place) for place in range(len(self))]) if self._labels is None else self._labels

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of one image, () without; where images may be replaced, this decodes it to know."""
        place = index if self._broken is None else self._standing_in(range(len(self))[index])[0]
        return self._reader.captions(self._kept[place])

    def _counted(self) -> dict[str, int | None]:
        """Images of each class, by name, in the order of the labels; None where labels are read as they are used."""
        names = [printable(str(name)) for name in self._reader.label_names or self.classes or range(self.num_classes)]
        if self._labels is None:
            return dict.fromkeys(names)
        counts = torch.bincount(self._labels, minlength=self.num_classes).tolist()
        return dict(zip(names, counts, strict=True)) if self.num_classes else {}

    def _label(self, place: int) -> int:
        return self._reader.label(self._kept[place]) if self._labels is None else int(self._labels[place])

    def _name(self, place: int) -> str:
        return self._reader.name_of(self._kept[place])

    def _header(self, index: int) -> Header:
        with self._reader.open(index) as file, Image.open(file, formats=FORMATS) as image:
            return header_of(image)

    def _left(self, indices: Iterable[int], wrong: Mapping[int, str]) -> list[int]:
        """The indices that nothing is wrong with; the others are noted as bad."""
        self.bad += [(self._reader.name_of(index), why) for index, why in wrong.items()]
        return [index for index in indices if index not in wrong]

    def _decoded(self, indices: list[int]) -> tuple[list[int], Tensor, list[bytes]]:
        """The indices that can be used, their images, and the sha256 of their bytes."""
        images = torch.empty(len(indices), self._channels, self._size, self._size, dtype=torch.uint8)

        def read(row: int) -> bytes:
            with self._reader.open(indices[row]) as file:
                images[row] = read_image(file, self._size, self._channels)
                file.seek(0)
                return hashlib.sha256(file.read()).digest()

        results = attempt(read, range(len(indices)))
        good = self._left(indices, {i: why for i, why in zip(indices, results, strict=True) if isinstance(why, str)})
        if len(good) < len(indices):
            images = images[[row for row, digest in enumerate(results) if isinstance(digest, bytes)]]
        return good, images, [digest for digest in results if isinstance(digest, bytes)]

    def _standing_in(self, index: int) -> tuple[int, Tensor]:
        """The image at `index`, or under "skip" at the next place that can be decoded; and that place."""
        for step in range(min(IN_A_ROW, len(self))):
            place = (index + step) % len(self)
            if self._broken is not None and self._broken[place]:
                continue
            try:
                with self._reader.open(self._kept[place]) as file:
                    return place, read_image(file, self._size, self._channels)
            except BROKEN as error:
                failure = f"{self._name(place)} cannot be decoded: {reason_of(error)}"
                gone = isinstance(error, OSError) and error.errno is not None  # the disk's fault: another time it may work
                if self._broken is None or gone:
                    hint = "check the disk" if gone else "repair it, take it away, or go on without it: --on-bad skip"
                    raise IntegrityError(f"{failure} (in {self._reader.shown})", hint) from None
                self._broken[place] = True
                log.warning("%s; the next good image stands in for it", failure)
        name = self._name(index)
        raise IntegrityError(f"{self._reader.shown}: none of {step + 1} images from {name} on can be decoded", "check --data")


def common_side(headers: Sequence[Header], shown: str) -> int:
    """The side in pixels that all images share. Raises UsageError if they differ or are not square."""
    sizes = Counter((header.width, header.height) for header in headers).most_common()
    (width, height), _ = sizes[0]
    if len(sizes) == 1 and width == height:
        return width
    found = _first([f"{w}x{h} ({times} of them)" for (w, h), times in sizes])
    raise UsageError(f"the images in {shown} are not squares of one size: found {found}", "say --size N to crop and resize them")


def too_small(header: Header, size: int) -> str | None:
    """Why an image is too small for `size`, None if it is not: it would be enlarged more than twice."""
    if 2 * min(header.width, header.height) >= size:
        return None
    return f"too small: {header.width}x{header.height} for size {size}"


def refused(bad: Sequence[Bad], total: int, shown: str) -> IntegrityError:
    """The error that names the first bad images and counts all of them."""
    first = _first([f"{name} ({reason})" for name, reason in bad])
    hint = "leave them out with --on-bad skip, or repair them" if len(bad) < total else "none is left: check --data"
    if any(reason in (OUTWARD, TO_FOLDER) for _, reason in bad):
        hint = "trust the links with --follow-links, or leave them out with --on-bad skip"
    return IntegrityError(f"{len(bad)} of {total} images in {shown} cannot be used: {first}", hint)


def _first(found: Sequence[str]) -> str:
    """The first few of a list, as messages show them."""
    return ", ".join(found[:NAMED]) + (", ..." if len(found) > NAMED else "")


def read_image(file: IO[bytes], size: int, channels: int) -> Tensor:
    """uint8 [C, size, size] of one image, [C, H, W] for size 0. Raises one of BROKEN, also where it is too small or too large."""
    with Image.open(file, formats=FORMATS) as image:
        reason = too_small(header_of(image), size)
        if reason:
            raise ValueError(reason)
        return to_square(image, size, channels)


def left_out_of(source: Source) -> dict[str, dict[str, list[list[str]] | list[str]]]:
    """Images that a source does not use (--on-bad skip), JSON-able: {} where it uses all.

    `bad`: [name, reason] of images left out; `replaced`: names of those that another stands in for.
    """
    if not isinstance(source, StoredImages) or not (source.bad or source.replaced):
        return {}
    return {"left_out": {"bad": [list(pair) for pair in source.bad], "replaced": source.replaced}}


def left_out_words(source: Source) -> list[str]:
    """Messages about the images that a source does not use: how many there are, and the first of them by name."""
    if not isinstance(source, StoredImages):
        return []
    bad, total = [f"{name} ({why})" for name, why in source.bad], len(source) + len(source.bad)
    kinds = (("left out", bad), ("broken, others stand in for them", source.replaced))
    return [f"{source.name}: {len(names)} of {total} images {what}: {_first(names)}" for what, names in kinds if names]


def cautions(source: Source) -> tuple[str, ...]:
    """Sentences on what makes a source a poor reference: images stored with loss, classes of very different sizes."""
    lines = []
    lossy = sum(name.lower().endswith(LOSSY) for name in source.names()) if isinstance(source, StoredImages) else 0
    if lossy:
        lines.append(
            f"warning: {lossy} of {len(source)} images of {source.name} are stored with loss (JPEG), which moves a distance"
        )
    if source.num_classes and isinstance(source, StoredImages):
        counts = torch.bincount(source.labels(), minlength=source.num_classes)
        if int(counts.max()) > 2 * int(counts.min()):
            lines.append(f"warning: classes of {source.name} have {int(counts.min())} to {int(counts.max())} images")
    return tuple(lines)


def images_of(source: Source, limit: int | None = None, batch: int = ONE_BY_ONE) -> Iterator[Tensor]:
    """Yields the images of a source in order, uint8 batches; `limit` None: all."""
    count = len(source) if limit is None else min(limit, len(source))
    return (images for _, images in one_by_one(lambda i: source.item(i)[0], range(count), batch))


def one_by_one(
    image: Callable[[int], Tensor], indices: Sequence[int], batch: int = ONE_BY_ONE
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Yields (indices, images) in batches of images that are read one by one, each of one shape."""
    for first in range(0, len(indices), batch):
        pairs = ((i, image(i)) for i in indices[first : first + batch])
        for _, alike in groupby(pairs, key=lambda pair: pair[1].shape):
            numbers, images = zip(*alike, strict=True)
            yield numbers, torch.stack(images)
