"""A layout of encoded images (files, rows, members of shards): one subclass of `Reader` lists them and opens them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import IO

import torch
from torch import Tensor


class Reader(ABC):
    """Encoded images 0..n-1 in an order that never changes, and all that is known of them without decoding.

    A new layout is one subclass with `__len__`, `open` and `identity`, and those of the other methods whose default does not
    hold. `name`: what a run calls the images; `shown`: what messages call the place that they lie in; both printable.

    For the inventory: `unused` has names by kind of what lies beside and is not used, `assumed` sentences without a full
    stop, `labels_from` and `captions_from` say where these come from (None: there are none), `label_names` are the classes.
    """

    def __init__(self, name: str, shown: str) -> None:
        self.name, self.shown = name, shown
        self.unused: dict[str, list[str]] = {}
        self.assumed: list[str] = []
        self.labels_from: str | None = None
        self.captions_from: str | None = None
        self.label_names: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def open(self, index: int) -> IO[bytes]:
        """The bytes of one image. Raises one of scan.BROKEN."""

    @abstractmethod
    def identity(self, kept: Sequence[int], digests: Sequence[bytes] | None) -> Iterable[bytes]:
        """Everything that decides the images in use (`kept`) and their labels, for the fingerprint.

        `digests`: sha256 of each one's bytes; None: the bytes were not read, so that sizes and times of change stand for them.
        """

    def name_of(self, index: int) -> str:
        """Name of one image in messages, printable."""
        return f"row {index}"

    def wrong(self, index: int) -> str | None:
        """Why an image cannot be used, as far as listing it tells; None: it may be good."""
        return None

    def looked_at(self, good: Sequence[int]) -> Sequence[int]:
        """Those of these images whose headers are read at the start."""
        return good

    def labels(self, kept: Sequence[int]) -> tuple[Tensor | None, int]:
        """Labels int64 [n] of the images in use, and the number of classes (0: none).

        None instead of the labels: `label` tells them, image by image.
        """
        return torch.zeros(len(kept), dtype=torch.int64), 0

    def classes(self, kept: Sequence[int]) -> tuple[str, ...]:
        """Names of the classes in the order of their labels, where they can stand in for captions; () where they cannot."""
        return ()

    def label(self, index: int) -> int:
        """Label of one image; asked for only where `labels` gives none."""
        return 0

    def captions(self, index: int) -> tuple[str, ...]:
        """Captions of one image, in an order that never changes; () without."""
        return ()
