"""Conditions that a backbone takes beside the timestep: classes as they are, or captions as the states of a text encoder.

Data gives a number to each image, its class or one of its captions; here the numbers become what the backbone takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmpctl.batches.caption_states import CaptionNumbers, ConditionCache, captions_fingerprint
from dmpctl.codecs.text import TextEncoder
from dmpctl.data.bundled import Digits
from dmpctl.data.source import open_source
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.images.captions import Captioned
from dmpctl.images.inventory import told
from dmpctl.images.stored import StoredImages
from dmpctl.models.encode import build_conditions
from dmpctl.processes.ranks import resolve_device
from dmpctl.rng import seed_of
from dmpctl.runs.records import EncoderRecord
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Data
from dmpctl.store.cache import cache_dir
from dmpctl.store.locate import locate, named
from dmpctl.texts import lines_of, read_user_text
from dmpctl.types import BackboneSpec, Progress, Silent, Source

SILENT = Silent()


@dataclass(frozen=True)
class Labels:
    """Classes. `null`: the label that means "no class"; None where there is none."""

    null: int | None

    def of(self, numbers: Tensor) -> Tensor:
        """int64 [B] as they are."""
        return numbers

    def nothing(self) -> Tensor | None:
        """The null condition [1]."""
        return None if self.null is None else torch.tensor([self.null])


@dataclass(frozen=True)
class Captions:
    """Captions that are encoded, each different one once: caption i lies in row `rows[i]`, the null caption behind all."""

    cache: ConditionCache
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def null(self) -> int:
        """The number of the caption that says nothing."""
        return len(self)

    def of(self, numbers: Tensor) -> Tensor:
        """Text conditions float32 [B, T, D + 1] (`types.text_parts`) of captions int64 [B]."""
        states, mask = self.cache.gather(self.rows[numbers])
        return torch.cat([states.float(), mask.unsqueeze(-1).float()], dim=-1)

    def nothing(self) -> Tensor:
        """The null condition [1, T, D + 1]."""
        return self.of(torch.tensor([self.null]))


Conditions = Labels | Captions


def encoder_record(encoder: TextEncoder | None) -> EncoderRecord | None:
    """Returns the record of a text encoder that is stored with a backbone or a patch; None without one."""
    if encoder is None:
        return None
    how = {} if encoder.cleaning == "none" else {"cleaning": encoder.cleaning}
    return EncoderRecord(name=encoder.name, fingerprint=encoder.revision, tokens=encoder.max_length, **how)


def open_encoder(settings: Settings, spec: BackboneSpec | None, recorded: EncoderRecord | None) -> TextEncoder | None:
    """The encoder of a backbone's captions; None for a backbone without. No weights are loaded before the first caption.

    `spec` None: the backbone is still to be trained. `recorded`: `encoder_record` of the one it was trained with, None: unknown.
    UsageError where nothing says which, or its states have another width; IntegrityError where it is another than recorded.
    """
    if spec is not None and spec.text is None:
        return None
    given = settings.text.text_encoder
    name = given or (recorded.name if recorded else None)
    if name is None:
        raise UsageError("nothing says which encoder reads its captions", "add --text-encoder clip-l, pixart-t5 or a folder")
    tokens = settings.text.text_tokens or (recorded.tokens if recorded else None)
    folder = locate(name, "text", settings).absolute()
    lasting = name if name in named("text") else str(folder)  # a user's own row means nothing without its file
    trained = recorded is not None and recorded.fingerprint is not None
    device, cleaning = resolve_device(settings.launch), recorded.cleaning if recorded and trained else None
    encoder = TextEncoder(folder, lasting, tokens, device, cleaning)
    if spec is not None and spec.text is not None and encoder.width != spec.text.width:
        raise UsageError(
            f"the text encoder {name} gives states of width {encoder.width}, the backbone takes {spec.text.width}",
            "name the one it was trained with: --text-encoder",
        )
    if recorded and given is None and recorded.fingerprint not in (None, encoder.revision):
        raise IntegrityError(
            f"the text encoder {name} has sha256 {encoder.revision}, the backbone was trained with {recorded.fingerprint}",
            "name the right one: --text-encoder FOLDER",
        )
    return encoder


def encoded(
    texts: Sequence[str], encoder: TextEncoder, settings: Settings, progress: Progress, again: str = "the same command"
) -> Captions:
    """These captions and the null caption, encoded once and kept in the cache."""
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    cache = build_conditions(tuple(row_of), encoder, cache_dir(), progress, batch=settings.text.text_batch, again=again)
    return Captions(cache, torch.tensor([*(row_of[text] for text in texts), len(cache)]))


def captions_of(source: Source, index: int, most: int | None = None) -> tuple[str, ...]:
    """The captions of an image, or the name of its class where the data has classes in their place; `most` None: all.

    UsageError where it has neither.
    """
    found = source.captions(index) if isinstance(source, Captioned) else ()
    if found:
        return found[:most]
    names = source.classes if isinstance(source, Digits | StoredImages) else ()
    if len(names) < 2:  # the name of the one folder says nothing of its images
        hint = "name the column: --caption-column, or put the images into one folder per class"
        raise UsageError(f"{source.name} has no captions", hint)
    return (names[source.item(index)[1]],)


def training_conditions(
    spec: BackboneSpec, encoder: TextEncoder | None, source: Source, settings: Settings, progress: Progress, again: str
) -> tuple[Conditions | None, CaptionNumbers | None]:
    """Returns the conditions that training gives to the backbone, and each image's number in each epoch (None: its label)."""
    if encoder is None:
        return (Labels(spec.null_class) if spec.num_classes else None), None
    each = [captions_of(source, index, settings.text.captions_per_image) for index in range(len(source))]
    table = encoded([text for texts in each for text in texts], encoder, settings, progress, again)
    return table, CaptionNumbers([len(texts) for texts in each], settings.run.seed)


@dataclass(frozen=True)
class Prompts:
    """The captions of generated images: image k has caption k modulo their count. `about`: how they were found, JSON-able."""

    captions: Captions
    texts: tuple[str, ...]
    about: Mapping[str, Any]


def prompts_for(
    settings: Settings, data: Source | Data | None, count: int, progress: Progress = SILENT
) -> tuple[list[str], dict[str, Any]]:
    """Captions of `count` images to be made, fewer where there are no more, and how they were found, JSON-able.

    --prompt, the lines of a file, or the first caption of images of --prompts (else of `data`) in an
    order that the sampling seed decides, no image twice. UsageError where there is nothing to take them from.
    """
    given = settings.prompting
    if given.prompt is not None:
        return [given.prompt], {"from": "--prompt", "prompt": given.prompt}
    if given.prompts_from is not None:
        path = Path(given.prompts_from).expanduser()
        if path.is_file() and path.suffix in ("", ".txt"):
            texts = _lines(path)[:count]
            return texts, {"from": str(path.absolute()), "captions": len(texts), "sha256": captions_fingerprint(texts)}
        if path.suffix == ".txt":
            raise MissingError(f"there is no file {path}", "name a file with one prompt on each line, or data such as coco-val")
        data = settings.data.model_copy(update={"data": given.prompts_from})
    if data is None:
        raise UsageError("nothing says what the images shall show", "add --prompt TEXT or --prompts FILE")
    source = open_source(data, None, None, settings) if isinstance(data, Data) else data
    if isinstance(data, Data):
        told(source, progress)
    order = torch.randperm(
        len(source), generator=torch.Generator().manual_seed(seed_of(settings.sampling.sample_seed, "prompts"))
    )
    texts = [captions_of(source, index, 1)[0] for index in order[:count].tolist()]
    about = {"from": source.name, "fingerprint": source.fingerprint, "order": "by the sampling seed, no image twice"}
    return texts, {**about, "captions": len(texts), "sha256": captions_fingerprint(texts)}


def _lines(path: Path) -> list[str]:
    texts = lines_of(read_user_text(path))
    if not texts:
        raise UsageError(f"{path} holds no prompt", "write one prompt on each line")
    return texts
