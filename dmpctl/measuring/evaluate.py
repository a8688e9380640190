"""`dmpctl fid`: how far images are from real ones, by a stated protocol, how sure that is, and what a pipeline makes of it."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dmpctl.errors import ThresholdError, UsageError
from dmpctl.measuring.extraction import build_extractor, features_in, protocol_for
from dmpctl.measuring.feature_store import FeatureStore
from dmpctl.measuring.image_sets import ImageSet, open_images_of
from dmpctl.measuring.measured import clip_score_of, measured, named, noise_floor_of
from dmpctl.measuring.record import (
    distance_verdict,
    failures_of,
    history,
    metric_name,
    metrics_file,
    plus_minus,
    record_of,
    refuse_unpaired,
    short,
    write_record,
)
from dmpctl.measuring.reference import Reference, features_wanted, find_reference, open_reference
from dmpctl.measuring.statistics_files import statistics_report
from dmpctl.metrics.clip_score import ClipScorer
from dmpctl.metrics.features.protocols import MetricProtocol
from dmpctl.metrics.frechet import (
    FidEstimate,
    PairedDifference,
    paired_difference,
)
from dmpctl.metrics.statistics import SUFFIXES, is_statistics
from dmpctl.models.patch_files import load_result, outputs_of
from dmpctl.models.patched import Patched
from dmpctl.processes.ranks import Ranks, join
from dmpctl.settings.model import Settings
from dmpctl.store.addresses import address_in
from dmpctl.store.cache import cache_dir
from dmpctl.store.locate import locate
from dmpctl.types import Extractor, Progress, Report

BACKBONE = "backbone"  # as --versus: a run's own backbone without its patch
FEW = 10_000  # images, below which a distance is mostly a statement about N
MODELS = (".safetensors", ".pt")  # files that are models, where they are no statistics


def fid(settings: Settings, what: str, progress: Progress) -> Report:
    """Measure WHAT; for a run, recorded in its metrics/. The report fails (exit 6) where a threshold was not met."""
    ranks = join(settings.launch)
    path, options, device = Path(what).expanduser(), settings.fid, ranks.device
    if options.show:
        return history(path)
    if path.suffix in SUFFIXES and path.is_file() and is_statistics(path):
        return statistics_report(path, settings)
    images = open_images_of(path, _model(path, settings, progress), settings, device)
    name = options.reference or (images.model.trained_on if images.model else None)
    if name is None:
        raise UsageError(f"nothing says what to compare {what} with", "add --reference digits or --reference DIR")
    real = find_reference(name, images.shape, settings)
    protocol, extractor = protocol_for(options, images.shape), build_extractor(options, images.shape, device)
    _refuse_small(images.count, extractor, settings)
    _refuse_others_metrics(images, extractor, settings)
    clip = locate(options.clip, "clip", settings) if "clip-score" in options.wanted else None
    other = _versus(images, path, settings, device, progress)
    unsure = None if other is None else refuse_unpaired(images, other)
    if settings.console.dry_run:
        planned = {"dry_run": True, "n": images.count, "extractor": extractor.fingerprint, "protocol": protocol.name}
        return Report(planned, (), (f"would compare {images.count} images", "dry run: nothing was written"))
    if ranks.world > 1:
        wanted = features_wanted(real, extractor, protocol.name, settings)
        _extract_together(path, images, other, wanted, extractor, settings, progress, ranks)
        if not ranks.is_main:  # what is left is no collective
            return Report({})
    reference = open_reference(real, images.shape, extractor, protocol.name, settings, progress)
    store = _features(path, images, extractor, settings, progress)
    record = record_of(images, reference, extractor, protocol, settings, str(device))
    found, rows = measured(store, reference, extractor, protocol, settings)
    if clip is not None:
        score = clip_score_of(images, ClipScorer(clip, device), progress)
        found["clip-score"] = asdict(score) | {"clip": options.clip}
        name = f"clip-score-{short(images.count)}"
        rows.append({"metric": name, "value": f"{score.value:.4f}{plus_minus(score.standard_error)}"})
    warnings = [
        *images.warnings,
        *reference.warnings,
        *_other_size(images, real),
        *_warnings(found["fid"], store, extractor, protocol),
    ]
    metric = metric_name(extractor, images.count)
    data: dict[str, Any] = {"metric": metric, **asdict(found["fid"]), "metrics": named(found, extractor, images), **record}
    if options.noise_floor:
        data["noise_floor"], row = noise_floor_of(reference, settings)
        rows.append(row)
    gap = None
    if other is not None:
        gap = _difference(path, store, other, reference, extractor, settings, progress)
        data["versus"] = {"what": other.name, **_json(gap)}
        rows.append(_gap_row(other, gap))
        warnings += [unsure] if unsure else []
    data["warnings"] = warnings
    failures = failures_of(found["fid"], gap, settings.fid)
    data["failed"] = failures
    lines = [*warnings]
    if gap is not None:
        lines.append(f"{data['versus']['verdict']}: {images.name} against {other.name if other else ''}")
    if images.model is not None:
        target = metrics_file(path, metric, record, images.model, settings)
        write_record(target, data)
        lines.append(f"recorded in {target}")
    else:
        store.remove()  # what was measured is no run, whose features would be looked for again
    return Report(data, tuple(rows), (*lines, *failures), ThresholdError.exit_code if failures else 0)


def _model(path: Path, settings: Settings, progress: Progress) -> Patched | None:
    """The model that a path stands for, with the captions of its images; None for images."""
    made = (
        path.suffix in MODELS
        or address_in(path) is not None
        or any((path / name).is_file() for name in ("config.json", "patch.json"))
    )
    if not made:
        return None
    model = load_result(path, settings.result.result_weights).with_codec(settings)
    return model.with_prompts(settings, settings.fid.max_images, progress)


def _features(
    path: Path, images: ImageSet, extractor: Extractor, settings: Settings, progress: Progress, ranks: Ranks | None = None
) -> FeatureStore:
    """Features of WHAT: kept in a run, else in the cache until they are measured."""
    wanted = settings.fid.wanted
    root = cache_dir() / "features" if images.model is None else outputs_of(path) / "metrics" / "features"
    return features_in(root, images, extractor, progress, "is" in wanted, "sfid" in wanted, ranks)


def _extract_together(
    path: Path,
    images: ImageSet,
    other: ImageSet | None,
    real: ImageSet | None,
    extractor: Extractor,
    settings: Settings,
    progress: Progress,
    ranks: Ranks,
) -> None:
    """All features that will be asked for, shared out over the processes; the main one then finds them made.

    UsageError over several machines: rows in one file, written from several, are not safe on every network disk.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world)) != ranks.world:
        raise UsageError("fid runs on one machine, with all of its GPUs", "leave --nnodes out")
    if real is not None:
        spatial = "sfid" in settings.fid.wanted
        features_in(cache_dir() / "features", real, extractor, progress, spatial=spatial, ranks=ranks)
    _features(path, images, extractor, settings, progress, ranks)
    if other is not None:
        _features(path, other, extractor, _distance_only(settings), progress, ranks)


def _distance_only(settings: Settings) -> Settings:
    return settings.model_copy(update={"fid": settings.fid.model_copy(update={"metrics": "fid"})})


def _versus(images: ImageSet, path: Path, settings: Settings, device: torch.device, progress: Progress) -> ImageSet | None:
    """The other side of a paired difference, None where none was asked for."""
    name = settings.fid.versus or settings.fid.fail_unless_better_than
    if name is None:
        return None
    if name == BACKBONE:
        if images.model is None or images.model.patch is None:
            raise UsageError(f"--versus {BACKBONE} needs a run with a patch, {images.name} has none")
        return replace(open_images_of(path, images.model.unpatched(), settings, device), name=f"{images.name} without its patch")
    other = Path(name).expanduser()
    return open_images_of(other, _model(other, settings, progress), settings, device)


def _difference(
    path: Path,
    store: FeatureStore,
    other: ImageSet,
    reference: Reference,
    extractor: Extractor,
    settings: Settings,
    progress: Progress,
) -> PairedDifference:
    theirs = _features(path, other, extractor, _distance_only(settings), progress)
    gap = paired_difference(store.features, theirs.features, reference.features)
    if other.model is None:
        theirs.remove()
    return gap


def _json(gap: PairedDifference) -> dict[str, Any]:
    found = asdict(gap)
    return {
        "distance": found.pop("b"),
        **{key: value for key, value in found.items() if key != "a"},
        "verdict": distance_verdict(gap.value, gap.standard_error),
    }


def _gap_row(other: ImageSet, gap: PairedDifference) -> dict[str, str]:
    p = "" if gap.p_value is None else f"p = {gap.p_value:.2g}"
    return {
        "metric": "difference (paired)",
        "value": f"{gap.value:+.4f}{plus_minus(gap.standard_error)}",
        "debiased": p,
        "reference": f"from {other.name}",
    }


def _refuse_small(count: int, extractor: Extractor, settings: Settings) -> None:
    if count <= extractor.width and not settings.fid.allow_small:
        raise UsageError(
            f"{count} images are too few for {extractor.width} features: the distance would be mostly bias",
            f"compare more than {extractor.width} images, or add --allow-small",
        )


def _refuse_others_metrics(images: ImageSet, extractor: Extractor, settings: Settings) -> None:
    if "clip-score" in settings.fid.wanted:
        if images.model is None or images.model.prompts is None:
            raise UsageError("clip-score is of a text-conditional run, whose captions are known", "leave it out of --metrics")
        if images.shape[0] != 3:
            raise UsageError("clip-score is of colour images", "leave it out of --metrics")
    if {"is", "sfid"} & set(settings.fid.wanted) and extractor.name != "inception":
        raise UsageError(f"is and sfid are Inception's, the extractor is {extractor.name}", "leave them out of --metrics")


def _other_size(images: ImageSet, real: ImageSet | Path) -> list[str]:
    if isinstance(real, Path) or real.shape[1:] == images.shape[1:]:
        return []
    sides = ["x".join(map(str, found.shape[1:])) for found in (images, real)]
    return [f"warning: the images are {sides[0]}, those of the reference {sides[1]}: each is resized from its own side"]


def _warnings(estimate: FidEstimate, store: FeatureStore, extractor: Extractor, protocol: MetricProtocol) -> list[str]:
    lines = []
    if protocol.images is not None and estimate.n != protocol.images:
        few = ", and fewer images give a larger distance" if estimate.n < protocol.images else ""
        lines.append(f"warning: {estimate.n} images; published numbers use {protocol.images}{few}")
    elif estimate.n < FEW and extractor.name != "pixels":
        lines.append(f"warning: {estimate.n} images are few: the distance says more about their number than about them")
    if estimate.standard_error is None:
        lines.append(f"warning: no standard error with {estimate.n} images for {extractor.width} features")
    if not getattr(extractor, "known", True):
        lines.append("warning: these weights are not pinned by a published hash; compare with the same file's numbers only")
    if store.duplicates:
        lines.append(f"warning: {store.duplicates} of {store.count} images are copies of another one")
    return lines
