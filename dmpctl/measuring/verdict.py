"""Verdicts in words: what a paired difference says, and which thresholds were not met."""

from dmpctl.metrics.frechet import CONFIDENCE, FOR_A_DIFFERENCE, FOR_AN_INTERVAL, FidEstimate, PairedDifference, verdict
from dmpctl.settings.measuring import Fid
from dmpctl.words import plus_minus

# Smallest change that a verdict names: FIDs that differ by less, from one training seed, are inconclusive: another seed moves
# them by as much.
LEAST_DISTANCE = 0.013


def distance_verdict(gap: PairedDifference, caution: str = "") -> str:
    """Verdict on a paired difference of distances, its size and confidence; `caution`: what else should be thought of."""
    if gap.standard_error is None:
        return f"no verdict: a difference takes more than {FOR_A_DIFFERENCE} images per feature"
    certain = f"{100 * CONFIDENCE:.0f} % confidence over the sampling of images{caution}"
    return in_words(gap.value, gap.standard_error, gap.b.value, LEAST_DISTANCE, certain)


def in_words(difference: float, error: float, before: float, least: float, certain: str) -> str:
    """A verdict on a difference from what was `before`, its size and confidence; `least`: the smallest share that is named."""
    word = verdict(difference, error, least * abs(before))
    if word == "too small a change to name":
        certain += f"; under {100 * least:g} % one training seed is inconclusive"
    size = f": {percent(difference / abs(before))}" if before else ""
    return f"{word}{size} ({certain})"


def percent(share: float) -> str:
    """`-0.0016 %`: a share with two digits, whatever its size."""
    return f"{100 * share:+.2g} %" if abs(share) < 1 else f"{100 * share:+.0f} %"


def distance_words(value: float, debiased: float | None, error: float | None) -> str:
    """A distance as it is published, and the interval that covers the true one: debiased, with its standard error."""
    return f"{value:.4f}" if debiased is None else f"{value:.4f} (debiased {debiased:.4f}{plus_minus(error)})"


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
        found.append(f"failed: --strict needs a standard error, which takes more than {FOR_AN_INTERVAL} images per feature")
    return found
