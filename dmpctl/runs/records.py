"""Typed records of the JSON files beside weights: patch.json, backbone.json, and the codec and text encoder they name.

A record is made once, checked when it is read, and passed on as an object.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from dmpctl.errors import IntegrityError
from dmpctl.files import json_to_bytes, read_json
from dmpctl.settings.methods import Method
from dmpctl.types import BackboneSpec, Cleaning, Inference, ScheduleSpec

Which = Literal["ema", "raw"]  # of the trained weights: their average, or the last ones


class Record(BaseModel):
    """Content of a JSON file. Keys that this version does not know are kept, and absent ones stay absent."""

    model_config = ConfigDict(frozen=True, extra="allow")
    newest: ClassVar[int] = 1  # schema_version that this code writes
    left_out: ClassVar[tuple[str, ...]] = ()  # keys that are not written where they are None
    hint: ClassVar[str | None] = None  # for a file that lacks keys

    @model_validator(mode="before")
    @classmethod
    def _lacks_everything(cls, value: object) -> object:
        """Something else in place of an object is reported like an empty one: by the names that it lacks."""
        return value if isinstance(value, Mapping | BaseModel) else {}

    def to_json(self) -> dict[str, JsonValue]:
        """Returns the keys that the file has, in its order, as plain values."""
        written = self.model_dump(mode="json", exclude_unset=True)  # a default was never written, so it is not written now
        return {key: value for key, value in written.items() if value is not None or key not in self.left_out}

    def to_bytes(self) -> bytes:
        """Returns the content of the file."""
        return json_to_bytes(self.to_json())


R = TypeVar("R", bound=Record)


def read_record(path: Path, kind: type[R]) -> R:
    """Returns the record in a JSON file.

    MissingError without the file; IntegrityError for a newer schema_version, and where a key is missing or does not fit.
    """
    return as_record(read_json(path, kind.newest), kind, str(path))


def as_record(value: object, kind: type[R], what: str) -> R:
    """Returns `value` as a record. IntegrityError, which calls it `what`, where a key is missing or does not fit."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        wrong = sorted(error.errors(include_url=False), key=lambda each: len(each["loc"]))
    missing = [each["loc"] for each in wrong if each["type"] == "missing"]
    if missing:
        *where, _ = missing[0]
        names = ", ".join(str(place[-1]) for place in missing if list(place[:-1]) == where)
        raise IntegrityError(f"{what} lacks {names}" + (f" of its {'.'.join(map(str, where))}" if where else ""), kind.hint)
    place = wrong[0]["loc"]
    if place[0] == "method":  # its second part is the kind of method, which the settings of that kind do not repeat
        place = place[2:] or place[:1]
    raise IntegrityError(f"{what} does not fit this dmpctl: {'.'.join(map(str, place))}: {wrong[0]['msg']}")


class CodecRecord(Record):
    """The codec that latents were made with. `fingerprint`: sha256 of its weights and config, None: its name alone is known."""

    name: str
    fingerprint: str | None
    scale: float


class EncoderRecord(Record):
    """The text encoder that captions were read with; `fingerprint` (sha256) and `tokens` (per caption) None: not recorded.

    `cleaning`: how captions were prepared for it (`codecs.text`).
    """

    name: str
    fingerprint: str | None = None
    tokens: int | None = None
    cleaning: Cleaning = "none"


class DataRecord(Record):
    """The images that a patch was trained on; None: unknown. `columns`: options that name columns of a table."""

    name: str | None
    fingerprint: str | None = None
    columns: dict[str, str] = {}


class BackboneRecord(Record):
    """The one backbone that a patch fits: how to find it (`base`, `weights` as in --base, --weights), and what it must be."""

    base: str
    weights: Path | None
    sha256: str
    latent_shape: tuple[int, int, int]
    sites: int
    schedule: ScheduleSpec
    num_classes: int = 0
    parameters: int = 0

    def mismatch(self, spec: BackboneSpec) -> str | None:
        """Returns how a backbone of this `spec` differs in shape or schedule, None where it does not."""
        found = {"latent_shape": list(spec.latent_shape), "sites": len(spec.sites), "schedule": asdict(spec.schedule)}
        for key, named in self.model_dump(mode="json", include=set(found)).items():
            if named != found[key]:
                return f"{key.replace('_', ' ')} {named}, this one has {found[key]}"
        return None


class Description(Record):
    """A description of weights before they are trained. A checkpoint adds step, weights and sha256.

    `codec`, `text`: of the training; None: pixels as they are, no captions.
    """

    left_out = ("config", "model", "images", "codec", "text", "imported")
    schema_version: int = 1


class PatchDescription(Description):
    """A patch: its method, what it was trained on, and the one backbone that it fits. Percent: of the backbone."""

    dmpctl: str = ""
    method: Annotated[Method, Field(discriminator="method")]
    added_parameters: int = 0
    added_percent: float = 0.0
    backbone: BackboneRecord
    data: DataRecord
    codec: CodecRecord | None = None
    text: EncoderRecord | None = None

    @property
    def added_words(self) -> str:
        """Size of the patch for people: `6,554,112 parameters (+1.43 %)`."""
        return f"{self.added_parameters:,} parameters (+{self.added_percent:.2f} %)"


class PatchRecord(PatchDescription):
    """patch.json. `imported`: file and sha256 that it came from, None for a patch that was trained here."""

    step: int
    weights: Which | None = None
    imported: dict[str, str] | None = None
    sha256: str


class BackboneDescription(Description):
    """A backbone: `config` of a DiT, or `model`, diffusers' config of another network; `images`: how many it was trained on;
    `inference`: of a scheduler file."""

    config: dict[str, JsonValue] | None = None
    model: dict[str, JsonValue] | None = None
    schedule: ScheduleSpec
    inference: Inference | None = None
    data: str | None
    images: int | None = None
    codec: CodecRecord | None = None
    text: EncoderRecord | None = None


class PretrainedRecord(BackboneDescription):
    """backbone.json. `imported`: file and sha256 that it came from, None for a backbone that was trained here."""

    step: int = 0
    weights: Which | None = None
    imported: dict[str, str] | None = None
    sha256: str | None = None
