"""Verdicts in words: what a paired difference says, and which thresholds were not met."""

from dmpctl.metrics.frechet import CONFIDENCE, FidEstimate, PairedDifference, verdict
from dmpctl.settings.measuring import Fid


def distance_verdict(difference: float, standard_error: float | None, caution: str = "") -> str:
    """Verdict on a paired difference of distances, with its confidence; `caution`: what else should be thought of."""
    if standard_error is None:
        return "no verdict: a standard error takes more images than features"
    word = verdict(difference, standard_error)
    return f"{word} ({100 * CONFIDENCE:.0f} % confidence over the sampling of images{caution})"


def loss_verdict(difference: float, standard_error: float, images: int) -> str:
    """Verdict on a difference of paired losses, which are taken on the training images."""
    return f"{verdict(difference, standard_error)} ({100 * CONFIDENCE:.0f} % confidence over the {images} training images)"


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
