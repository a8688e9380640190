"""`dmpctl fid`: how far images are from real ones, by a stated protocol, how sure that is, and what a pipeline makes of it."""

from dataclasses import replace
from pathlib import Path

from dmpctl.errors import ThresholdError
from dmpctl.measuring.case import Case, open_case
from dmpctl.measuring.features import FeatureStore
from dmpctl.measuring.record import Measurement, history
from dmpctl.measuring.reference import Reference, open_reference
from dmpctl.measuring.scores import noise_floor_of, scores_of
from dmpctl.measuring.statistics_files import statistics_report
from dmpctl.measuring.verdict import distance_verdict, failures_of
from dmpctl.metrics.frechet import FidEstimate, PairedDifference, features_to_fid, paired_difference
from dmpctl.metrics.statistics import SUFFIXES, is_statistics
from dmpctl.processes.command import Command
from dmpctl.settings.model import Settings
from dmpctl.types import Progress, Report
from dmpctl.words import plus_minus

UNSURE = "warning: nothing says that these two sets come from the same seeds; if they do not, their difference is less sure"
FEW = 10_000  # images, below which a distance is mostly a statement about N


def fid(settings: Settings, what: str, progress: Progress) -> Report:
    """Measures WHAT; for a run, recorded in its metrics/. The report fails (exit 6) where a threshold was not met."""
    command, path = Command.begin(settings, progress), Path(what).expanduser()
    if settings.fid.show:
        return history(path)
    if path.suffix in SUFFIXES and path.is_file() and is_statistics(path):
        return statistics_report(path, settings.fid)
    case = open_case(what, command)
    if settings.console.dry_run:
        planned = {"n": case.images.count, "extractor": case.extractor.fingerprint, "protocol": case.protocol.name}
        planned |= {"data": case.inventories}
        would = f"would compare {case.images.count} images"
        return Report({"dry_run": True, **planned}, (), (would, "dry run: nothing was written"))
    if command.ranks.world > 1:
        case.share_out()
        if not command.ranks.is_main:  # what is left is no collective
            return Report({})
        case = replace(case, command=command.by_itself())
    reference = open_reference(case.real, case.images.shape, case.extractor, case.protocol.name, case.command)
    features = case.features(case.images, case.options.wanted)
    estimate = features_to_fid(features.features, reference.features, True, case.command.progress)
    scores = scores_of(case, estimate, features, reference)
    floor = noise_floor_of(reference, settings.sampling.sample_seed) if case.options.noise_floor else None
    gap = _difference(case, features, reference)
    warnings = _warnings(case, estimate, features, reference)
    failed = failures_of(estimate, gap, case.options)
    found = Measurement(case, reference, estimate, scores, floor, gap, warnings, failed)
    rows, lines = [score.row for score in (*scores, *([floor] if floor else []))], [*warnings]
    if case.other is not None and gap is not None:
        rows.append(_gap_row(case.other.name, gap))
        lines.append(f"{distance_verdict(gap)}: {case.images.name} against {case.other.name}")
    if case.images.model is not None:
        lines.append(f"recorded in {found.write()}")
    else:
        features.remove()  # images without a run: their features would not be looked for again
    return Report(found.to_json(), tuple(rows), (*lines, *failed), ThresholdError.exit_code if failed else 0)


def _difference(case: Case, features: FeatureStore, reference: Reference) -> PairedDifference | None:
    """The paired difference from the images of --versus, None where it was not asked for."""
    if case.other is None:
        return None
    theirs = case.features(case.other)
    found = paired_difference(features.features, theirs.features, reference.features, case.command.progress)
    if case.other.model is None:
        theirs.remove()
    return found


def _gap_row(other: str, gap: PairedDifference) -> dict[str, str]:
    return {
        "metric": "difference (paired)",
        "value": f"{gap.a.value - gap.b.value:+.4f}",
        "debiased": "" if gap.p_value is None else f"{gap.value:+.4f}{plus_minus(gap.standard_error)}, p = {gap.p_value:.2g}",
        "reference": f"from {other}",
    }


def _warnings(case: Case, estimate: FidEstimate, features: FeatureStore, reference: Reference) -> list[str]:
    """Sentences on the images, the reference, and how far the distance can be trusted."""
    usual, extractor, images, other = case.protocol.images, case.extractor, case.images, case.other
    lines = [*images.warnings, *reference.warnings]
    if not isinstance(case.real, Path) and case.real.shape[1:] != images.shape[1:]:
        ours, theirs = ("x".join(map(str, side.shape[1:])) for side in (images, case.real))
        lines.append(f"warning: the images are {ours}, those of the reference {theirs}: each is resized from its own side")
    if usual is not None and estimate.n != usual:
        few = ", and fewer images give a larger distance" if estimate.n < usual else ""
        lines.append(f"warning: {estimate.n} images; published numbers use {usual}{few}")
    elif estimate.n < FEW and extractor.name != "pixels":
        lines.append(f"warning: {estimate.n} images are few: the distance says more about their number than about them")
    if estimate.standard_error is None:
        lines.append(f"warning: no standard error with {estimate.n} images for {extractor.width} features")
    if not getattr(extractor, "known", True):
        lines.append("warning: these weights are not pinned by a published hash; compare with the same file's numbers only")
    if features.duplicates:
        lines.append(f"warning: {features.duplicates} of {features.count} images are copies of another one")
    return lines if other is None or None not in (images.seeds, other.seeds) else [*lines, UNSURE]
