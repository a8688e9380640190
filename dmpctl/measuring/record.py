"""The record of a measurement in a run's metrics/: all that fixes its numbers, its file's name, and the history of a run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from dmpctl.errors import MissingError
from dmpctl.files import make_folder, read_json, sha256_of_json, write_json
from dmpctl.measuring.case import Case
from dmpctl.measuring.reference import Reference
from dmpctl.measuring.scores import Score
from dmpctl.measuring.verdict import distance_verdict, distance_words
from dmpctl.metrics.frechet import FidEstimate, PairedDifference
from dmpctl.models.codec import codec_record
from dmpctl.models.patch_files import outputs_of
from dmpctl.runs.rundir import version_of
from dmpctl.sampling.generate import prompts_record
from dmpctl.types import Report

SCHEMA_VERSION = 2
PROTOCOL = ("protocol", "reference", "images", "sampling", "codec", "prompts")  # parts of a record that have to be alike
JsonObject = dict[str, JsonValue]


@dataclass(frozen=True)
class Measurement:
    """The figures found for a case. `gap`: the paired difference from --versus; it and `floor` None: not asked for."""

    case: Case
    reference: Reference
    estimate: FidEstimate
    scores: Sequence[Score]
    floor: Score | None
    gap: PairedDifference | None
    warnings: Sequence[str]
    failed: Sequence[str]

    def to_json(self) -> JsonObject:
        """Returns the keys that its file has, in order: the numbers, and all that fixes them."""
        case, images, model, gap = self.case, self.case.images, self.case.images.model, self.gap
        made: JsonObject = {"sampling": None, "codec": None, "patch": None}  # images without a model
        if model is not None:
            made = {
                "sampling": case.command.settings.sampling.model_dump(mode="json", exclude={"sample_batch"}),
                "codec": codec_record(model.codec).to_json(),
                **prompts_record(model),
                "patch": {
                    "step": model.step,
                    "weights": model.weights,
                    "patch_sha256": model.patch_sha256,
                    "backbone_sha256": model.backbone.digest,
                },
            }
        versus: JsonObject = {}
        if case.other is not None and gap is not None:
            difference = {key: value for key, value in asdict(gap).items() if key not in ("a", "b")}
            versus = {
                "what": case.other.name,
                "distance": asdict(gap.b),
                **difference,
                "verdict": distance_verdict(gap),
            }
        return {
            "metric": self.scores[0].name,
            **asdict(self.estimate),
            "metrics": {score.name: dict(score.figures) for score in self.scores},
            "schema_version": SCHEMA_VERSION,
            "protocol": {
                "name": case.protocol.name,
                "extractor": case.extractor.fingerprint,
                "shape": list(images.shape),
                "published_images": case.protocol.images,  # None: as many as there are
                "inception_score_split_size": case.protocol.split_size,
            },
            "reference": self.reference.record.to_json(),
            "images": {"what": images.name, "n": images.count, **({} if model else {"identity": dict(images.identity)})},
            "data": case.inventories,
            **made,
            "arithmetic": {"features": "float32", "moments": "float64", "tf32": False, "device": str(case.command.device)},
            "versions": {name: version_of(name) for name in ("dmpctl", "torch", "torch-fidelity", "timm")},
            **({} if self.floor is None else {"noise_floor": dict(self.floor.figures)}),
            **({"versus": versus} if versus else {}),
            "warnings": list(self.warnings),
            "failed": list(self.failed),
        }

    def write(self) -> Path:
        """Writes it into the run that was measured, with the time; replaces what was measured there in the same way.

        Its file is named by what people look for, and a digest of all the rest: of what was asked for too, so that a plain
        measurement does not take the place of one with more metrics.
        """
        case, settings, found = self.case, self.case.command.settings, self.to_json()
        asked = settings.fid.model_dump(mode="json", include={"metrics", "noise_floor", "versus", "fail_unless_better_than"})
        digest = sha256_of_json({"asked": asked, **{key: found.get(key) for key in (*PROTOCOL, "patch")}})[:8]
        sampling, step = settings.sampling, 0 if case.images.model is None else case.images.model.step
        made = f"{step:07d}-{sampling.sampler}-{sampling.steps}-cfg{sampling.cfg:g}-seed{sampling.sample_seed}"
        folder = make_folder(outputs_of(case.path) / "metrics")
        path = folder / f"{self.scores[0].name}-{made}-{digest}.json"
        write_json(path, {**found, "measured": datetime.now(UTC).isoformat(timespec="milliseconds")})
        return path


def sampling_words(values: Mapping[str, Any] | None) -> str:
    """How images were sampled, for people; empty where nothing was."""
    if not values:
        return ""
    return f"{values['sampler']} {values['steps']}, cfg {values['cfg']:g}, seed {values['sample_seed']}"


def history(run: Path) -> Report:
    """Everything that was measured of a run, oldest first. MissingError where nothing was."""
    folder = outputs_of(run) / "metrics"
    found = [(path, read_json(path, SCHEMA_VERSION)) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
    records = [{**record, "file": path.name} for path, record in found if "metrics" in record and "protocol" in record]
    compared = [(path, record) for path, record in found if path.name.startswith("comparison-") and record.get("patched")]
    if not records and not compared:
        raise MissingError(f"nothing was measured of {run}", f"measure it: dmpctl fid {run}")
    records.sort(key=lambda record: str(record.get("measured")))
    rows = tuple(_row(record) for record in records)
    kinds = {json.dumps({key: record.get(key) for key in PROTOCOL}, sort_keys=True) for record in records}
    mixed = () if len(kinds) < 2 else (f"these are {len(kinds)} different protocols: compare numbers of one only",)
    ended = tuple(_compared_row(path, record, side) for path, record in compared for side in ("backbone", "patched"))
    return Report(
        {"run": str(run), "measurements": records, "comparisons": [each for _, each in compared]}, (*ended, *rows), mixed
    )


def _compared_row(path: Path, record: Mapping[str, Any], side: str) -> dict[str, str]:
    """One side of the comparison that ended `dmpctl patch`."""
    estimate, sampling = record[side], record["protocol"]["sampling"]
    return {
        "metric": f"{record['metric']} ({side})",
        "value": distance_words(estimate["value"], estimate.get("debiased"), estimate["standard_error"]),
        "step": path.stem.rpartition("-")[2].lstrip("0"),
        "sampler": f"{sampling['sampler']} {sampling['steps']}, cfg {sampling['cfg']}",
        "protocol": f"of dmpctl patch, {record['protocol']['images']} images",
        "reference": "training images",
        "measured": "",
    }


def _row(record: Mapping[str, Any]) -> dict[str, str]:
    sampling = record["sampling"] or {}
    return {
        "metric": record["metric"],
        "value": distance_words(record["value"], record.get("debiased"), record["standard_error"]),
        "step": str((record["patch"] or {}).get("step", "")),
        "sampler": f"{sampling.get('sampler', '')} {sampling.get('steps', '')}, cfg {sampling.get('cfg', '')}",
        "protocol": record["protocol"]["name"],
        "reference": str(record["reference"]["name"]),
        "measured": str(record.get("measured", ""))[:16],
    }
