"""The record of a measurement in a run's metrics/: all that fixes its numbers, its file's name, and the history of a run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, JsonValue

from dmpctl.errors import MissingError
from dmpctl.files import make_folder, read_json, sha256_of_json, write_json
from dmpctl.measuring.case import Case
from dmpctl.measuring.reference import Reference, ReferenceRecord
from dmpctl.measuring.scores import Score
from dmpctl.measuring.verdict import distance_verdict
from dmpctl.metrics.frechet import FidEstimate, PairedDifference
from dmpctl.models.codec import codec_record
from dmpctl.models.patch_files import outputs_of
from dmpctl.models.patched import Patched
from dmpctl.runs.rundir import version_of
from dmpctl.sampling.generate import prompts_record
from dmpctl.types import Report
from dmpctl.words import plus_minus

SCHEMA_VERSION = 2
PROTOCOL = ("protocol", "reference", "images", "sampling", "codec", "prompts")  # parts of a record that have to be alike
JsonObject = dict[str, JsonValue]


class ProtocolRecord(BaseModel, frozen=True):
    """How images become a number. `published_images`: how many published numbers use, None: as many as there are."""

    name: str
    extractor: str
    shape: tuple[int, int, int]
    published_images: int | None
    inception_score_split_size: int | None


class ModelRecord(BaseModel, frozen=True):
    """The model whose images were measured; None: no patch."""

    step: int
    weights: str | None
    patch_sha256: str | None
    backbone_sha256: str


class VersusRecord(BaseModel, frozen=True):
    """The paired difference from `what`, whose own distance is `distance`; negative: the measured images are closer."""

    what: str
    distance: FidEstimate
    value: float
    standard_error: float | None
    z: float | None
    p_value: float | None
    n: int
    n_reference: int | None
    verdict: str

    @classmethod
    def of(cls, what: str, gap: PairedDifference) -> "VersusRecord":
        """The record of a difference, with its verdict in words."""
        words = distance_verdict(gap.value, gap.standard_error)
        return cls(what=what, distance=gap.b, verdict=words, **{k: v for k, v in asdict(gap).items() if k not in ("a", "b")})


class Measurement(BaseModel, frozen=True):
    """One measurement; keys that were not set are absent in its file. `value` to `debiased` are the distance's."""

    metric: str
    value: float
    standard_error: float | None
    n: int
    n_reference: int | None
    debiased: float | None
    metrics: dict[str, JsonObject]
    schema_version: int
    protocol: ProtocolRecord
    reference: ReferenceRecord
    images: JsonObject
    sampling: JsonObject | None
    codec: JsonObject | None
    prompts: JsonObject = {}
    text: JsonObject | None = None
    patch: ModelRecord | None
    arithmetic: JsonObject
    versions: JsonObject
    noise_floor: JsonObject = {}
    versus: VersusRecord | None = None
    warnings: list[str]
    failed: list[str]

    @classmethod
    def of(
        cls,
        case: Case,
        reference: Reference,
        estimate: FidEstimate,
        scores: Sequence[Score],
        floor: Score | None,
        versus: VersusRecord | None,
        warnings: list[str],
        failed: list[str],
    ) -> "Measurement":
        """The record of what was found, with all that fixes it."""
        model, images = case.images.model, case.images
        sampling = case.command.settings.sampling.model_dump(mode="json", exclude={"sample_batch"})
        optional = prompts_record(model) if model else {}
        optional |= {} if floor is None else {"noise_floor": floor.figures}
        optional |= {} if versus is None else {"versus": versus}
        return cls(
            metric=scores[0].name,
            **asdict(estimate),
            metrics={score.name: dict(score.figures) for score in scores},
            schema_version=SCHEMA_VERSION,
            protocol=ProtocolRecord(
                name=case.protocol.name,
                extractor=case.extractor.fingerprint,
                shape=images.shape,
                published_images=case.protocol.images,
                inception_score_split_size=case.protocol.split_size,
            ),
            reference=reference.record,
            images={"what": images.name, "n": images.count, **({} if model else {"identity": dict(images.identity)})},
            sampling=sampling if model else None,
            codec=codec_record(model.codec).to_json() if model else None,
            patch=model_record(model) if model else None,
            arithmetic={"features": "float32", "moments": "float64", "tf32": False, "device": str(case.command.device)},
            versions={name: version_of(name) for name in ("dmpctl", "torch", "torch-fidelity", "timm")},
            warnings=warnings,
            failed=failed,
            **optional,
        )

    def to_json(self) -> JsonObject:
        """The keys that its file has, in order."""
        return self.model_dump(mode="json", exclude_unset=True)

    def write(self, case: Case) -> Path:
        """Writes it into the run that was measured, with the time; replaces what was measured there in the same way."""
        path = self.file(case)
        make_folder(path.parent)
        write_json(path, {**self.to_json(), "measured": datetime.now(UTC).isoformat(timespec="milliseconds")})
        return path

    def file(self, case: Case) -> Path:
        """Its file in the run: named by what people look for, and a digest of all the rest.

        The digest covers what was asked for, so that a plain measurement does not take the place of one with more metrics.
        """
        settings, found = case.command.settings, self.to_json()
        asked = settings.fid.model_dump(mode="json", include={"metrics", "noise_floor", "versus", "fail_unless_better_than"})
        digest = sha256_of_json({"asked": asked, **{key: found.get(key) for key in (*PROTOCOL, "patch")}})[:8]
        sampling, step = settings.sampling, 0 if self.patch is None else self.patch.step
        made = f"{step:07d}-{sampling.sampler}-{sampling.steps}-cfg{sampling.cfg:g}-seed{sampling.sample_seed}"
        return outputs_of(case.path) / "metrics" / f"{self.metric}-{made}-{digest}.json"


def model_record(model: Patched) -> ModelRecord:
    """The record of a model whose images are measured."""
    return ModelRecord(
        step=model.step, weights=model.weights, patch_sha256=model.patch_sha256, backbone_sha256=model.backbone.digest
    )


def sampling_words(values: Mapping[str, Any] | None) -> str:
    """How images were sampled, for people; empty where nothing was."""
    if not values:
        return ""
    return f"{values['sampler']} {values['steps']}, cfg {values['cfg']:g}, seed {values['sample_seed']}"


def history(run: Path) -> Report:
    """Everything that was measured of a run, oldest first. MissingError where nothing was."""
    folder = outputs_of(run) / "metrics"
    found = [(path, read_json(path)) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
    records = [{**record, "file": path.name} for path, record in found if "metrics" in record and "protocol" in record]
    if not records:
        raise MissingError(f"nothing was measured of {run}", f"measure it: dmpctl fid {run}")
    records.sort(key=lambda record: str(record.get("measured")))
    rows = tuple(_row(record) for record in records)
    kinds = {json.dumps({key: record.get(key) for key in PROTOCOL}, sort_keys=True) for record in records}
    mixed = () if len(kinds) < 2 else (f"these are {len(kinds)} different protocols: compare numbers of one only",)
    return Report({"run": str(run), "measurements": records}, rows, mixed)


def _row(record: Mapping[str, Any]) -> dict[str, str]:
    sampling = record["sampling"] or {}
    return {
        "metric": record["metric"],
        "value": f"{record['value']:.4f}{plus_minus(record['standard_error'])}",
        "step": str((record["patch"] or {}).get("step", "")),
        "sampler": f"{sampling.get('sampler', '')} {sampling.get('steps', '')}, cfg {sampling.get('cfg', '')}",
        "protocol": record["protocol"]["name"],
        "reference": str(record["reference"]["name"]),
        "measured": str(record.get("measured", ""))[:16],
    }
