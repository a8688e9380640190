"""What is written down of a measurement (R27), how two of them may be compared, and the history of a run."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dmpctl.errors import MissingError, UsageError
from dmpctl.files import make_folder, read_json, sha256_of_json, write_json
from dmpctl.measuring.image_sets import ImageSet
from dmpctl.measuring.reference import Reference
from dmpctl.metrics.features.protocols import MetricProtocol
from dmpctl.metrics.frechet import CONFIDENCE, FidEstimate, PairedDifference, verdict
from dmpctl.models.codec import codec_record
from dmpctl.models.patch_files import outputs_of
from dmpctl.models.patched import Patched
from dmpctl.runs.rundir import version_of
from dmpctl.sampling.generate import prompts_record
from dmpctl.settings.measuring import Fid
from dmpctl.settings.model import Settings
from dmpctl.types import Extractor, Report

SCHEMA_VERSION = 2
PROTOCOL = ("protocol", "reference", "images", "sampling", "codec", "prompts")  # parts of a record that have to be alike


def metric_name(extractor: Extractor, n: int, metric: str = "fid") -> str:
    """A name that carries N: fid50k, sfid50k, fd-pixels-5k."""
    if extractor.name == "inception":
        return f"{metric}{short(n)}"
    return f"{'fd' if metric == 'fid' else metric}-{extractor.name}-{short(n)}"


def short(n: int) -> str:
    """A number of images as names have it: 50k, 2049."""
    return f"{n // 1000}k" if n % 1000 == 0 else str(n)


def plus_minus(error: float | None) -> str:
    """A standard error behind a value; nothing where there is none."""
    return "" if error is None else f" ± {error:.4g}"


def sampling_words(values: Mapping[str, Any] | None) -> str:
    """How images were sampled, for people; empty where nothing was."""
    if not values:
        return ""
    return f"{values['sampler']} {values['steps']}, cfg {values['cfg']:g}, seed {values['sample_seed']}"


def record_of(
    images: ImageSet, reference: Reference, extractor: Extractor, protocol: MetricProtocol, settings: Settings, device: str
) -> dict[str, Any]:
    """All that fixes a number beside the number itself, JSON-able."""
    model = images.model
    return {
        "schema_version": SCHEMA_VERSION,
        "protocol": {
            "name": protocol.name,
            "extractor": extractor.fingerprint,
            "shape": list(images.shape),
            "published_images": protocol.images,
            "inception_score_split_size": protocol.split_size,
        },
        "reference": reference.record,
        "images": {"what": images.name, "n": images.count, **({} if model else {"identity": dict(images.identity)})},
        "sampling": settings.sampling.model_dump(mode="json", exclude={"sample_batch"}) if model else None,
        "codec": codec_record(model.codec).to_json() if model else None,
        **(prompts_record(model) if model else {}),
        "patch": _patch_of(model),
        "arithmetic": {"features": "float32", "moments": "float64", "tf32": False, "device": device},
        "versions": {name: version_of(name) for name in ("dmpctl", "torch", "torch-fidelity", "timm")},
    }


def _patch_of(model: Patched | None) -> dict[str, Any] | None:
    if model is None:
        return None
    return {
        "step": model.step,
        "weights": model.weights,
        "patch_sha256": model.patch_sha256,
        "backbone_sha256": model.backbone.digest,
    }


def refuse_unpaired(images: ImageSet, other: ImageSet) -> str | None:
    """UsageError, with the list of what differs, unless image k of both comes from the same seed; a warning where no one says."""
    if images.shape != other.shape or images.count != other.count:
        raise UsageError(
            f"{images.name} ({images.count} images {list(images.shape)}) and {other.name} ({other.count} images "
            f"{list(other.shape)}) do not pair up",
            "make as many images of both, with the same seeds",
        )
    if images.seeds is None or other.seeds is None:
        return "warning: nothing says that these two sets come from the same seeds; if they do not, their difference is less sure"
    one, two = _flat(images.seeds), _flat(other.seeds)
    differing = [f"{key}: {one.get(key)} and {two.get(key)}" for key in one | two if one.get(key) != two.get(key)]
    if differing:
        raise UsageError(f"{images.name} and {other.name} were sampled differently ({'; '.join(differing)})", "sample both alike")
    return None


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value) if isinstance(value, Mapping) else {key: value}
    return found


def failures_of(estimate: FidEstimate, gap: PairedDifference | None, options: Fid) -> list[str]:
    """One sentence for every threshold that was not met; under --strict one that lies within 2 standard errors is not."""
    found = []
    if options.fail_above is not None:
        error = (estimate.standard_error or 0.0) if options.strict else 0.0
        if estimate.value + 2 * error > options.fail_above:
            unsure = f" within 2 standard errors ({error:.4g})" if estimate.value <= options.fail_above else ""
            found.append(f"failed: the distance {estimate.value:.4f} is above --fail-above {options.fail_above:g}{unsure}")
    if options.fail_unless_better_than is not None and gap is not None:
        error = (gap.standard_error or 0.0) if options.strict else 0.0
        if gap.value + 2 * error >= 0:
            unsure = f" within 2 standard errors ({error:.4g})" if gap.value < 0 else ""
            found.append(f"failed: not better than {options.fail_unless_better_than}: {gap.value:+.4f}{unsure}")
    if options.strict and found == [] and None in (estimate.standard_error, gap.standard_error if gap else 0.0):
        found.append("failed: --strict needs a standard error, which takes more images than features")
    return found


def distance_verdict(difference: float, standard_error: float | None, caution: str = "") -> str:
    """What a paired difference says in plain words, at a stated confidence; `caution`: what else should be thought of."""
    if standard_error is None:
        return "no verdict: a standard error takes more images than features"
    word = verdict(difference, standard_error)
    return f"{word} ({100 * CONFIDENCE:.0f} % confidence over the sampling of images{caution})"


def metrics_file(run: Path, name: str, record: Mapping[str, Any], model: Patched, settings: Settings) -> Path:
    """Where a measurement of a run is kept: by what people look for, and a digest of all the rest.

    What was asked for is in it, so that a plain measurement does not take the place of one with more metrics.
    """
    sampling = settings.sampling
    asked = settings.fid.model_dump(mode="json", include={"metrics", "noise_floor", "versus", "fail_unless_better_than"})
    digest = sha256_of_json({"asked": asked, **{key: record.get(key) for key in (*PROTOCOL, "patch")}})[:8]
    made = f"{model.step:07d}-{sampling.sampler}-{sampling.steps}-cfg{sampling.cfg:g}-seed{sampling.sample_seed}"
    return outputs_of(run) / "metrics" / f"{name}-{made}-{digest}.json"


def write_record(path: Path, data: Mapping[str, Any]) -> None:
    """Write it with the time; what was measured there before in the same way is replaced."""
    make_folder(path.parent)
    write_json(path, {**data, "measured": datetime.now(UTC).isoformat(timespec="milliseconds")})


def history(run: Path) -> Report:
    """Everything that was measured of a run, oldest first. MissingError where nothing was."""
    folder = outputs_of(run) / "metrics"
    found = [(path, read_json(path)) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
    records = [{**record, "file": path.name} for path, record in found if "metrics" in record and "protocol" in record]
    if not records:
        raise MissingError(f"nothing was measured of {run}", f"measure it: dmpctl fid {run}")
    records.sort(key=lambda record: str(record.get("measured")))
    rows = tuple(_row(record) for record in records)
    return Report({"run": str(run), "measurements": records}, rows, _other_protocols(records))


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


def _other_protocols(records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """A sentence where rows of the table may not be compared with each other."""
    kinds = {json.dumps({key: record.get(key) for key in PROTOCOL}, sort_keys=True) for record in records}
    if len(kinds) < 2:
        return ()
    return (f"these are {len(kinds)} different protocols: compare numbers of one only",)
