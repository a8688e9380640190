"""`dmpctl fid` of a file of statistics against another: no images, so no features, no standard error and no difference."""

from pathlib import Path
from typing import Any

from dmpctl.errors import ThresholdError, UsageError
from dmpctl.files import sha256_of
from dmpctl.measuring.scores import short
from dmpctl.measuring.verdict import failures_of
from dmpctl.metrics.frechet import FidEstimate, moments_to_fid
from dmpctl.metrics.statistics import SUFFIXES, Statistics, disagreements, read_statistics
from dmpctl.settings.measuring import Fid
from dmpctl.types import Report


def statistics_report(path: Path, options: Fid) -> Report:
    """The distance of two files of statistics. UsageError where they were made in different ways, or more is asked of them."""
    found = read_statistics(path)
    other = Path(options.reference or "").expanduser()
    if other.suffix not in SUFFIXES or not other.is_file():
        raise UsageError(
            f"{path} has statistics alone, which another file of statistics can be compared with",
            "name one as --reference: `dmpctl fid IMAGES --save-stats FILE` writes it",
        )
    if options.versus or options.fail_unless_better_than or set(options.wanted) - {"fid", "sfid"}:
        raise UsageError(f"{path} has statistics alone: they give fid and sfid, and no difference", "name the images themselves")
    reference = read_statistics(other, found.features.width)
    other_ways = [f"{key}: {one} and {two}" for key, one, two in disagreements(found.made, reference.made)]
    if other_ways:
        ways = "; ".join(other_ways)
        raise UsageError(f"{path} and {other} were made in different ways ({ways})", "make both with one --protocol")
    value = moments_to_fid(found.features, reference.features)
    number = "" if found.count is None else short(found.count)
    metrics = {f"fid{number}": {"value": value}}
    if "sfid" in options.wanted:
        if found.spatial is None or reference.spatial is None:
            raise UsageError("sfid needs spatial statistics on both sides", "leave sfid out of --metrics")
        metrics[f"sfid{number}"] = {"value": moments_to_fid(found.spatial, reference.spatial)}
    failures = failures_of(FidEstimate(value, None, found.count or 0, reference.count), None, options)
    data = {
        "metric": f"fid{number}",
        "value": value,
        "standard_error": None,
        "n": found.count,
        "n_reference": reference.count,
        "metrics": metrics,
        "images": _said(found),
        "reference": _said(reference),
        "failed": failures,
    }
    unknown = [file.path.name for file in (found, reference) if file.protocol is None]
    lines = [f"warning: {name} does not say by which protocol it was made" for name in unknown]
    rows = tuple({"metric": name, "value": f"{figures['value']:.4f}"} for name, figures in metrics.items())
    return Report(data, rows, (*lines, *failures), ThresholdError.exit_code if failures else 0)


def _said(found: Statistics) -> dict[str, Any]:
    return {"what": str(found.path), "sha256": sha256_of(found.path), "kind": found.kind, "n": found.count, **found.about}
