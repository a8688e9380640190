"""How sure a mean over training seeds is when all seeds are measured on the same images, noise and sampling seeds.

gain[s, i] = mean + seed s + image i (with its noise) + both: a crossed design, one number each. The mean over both varies as
seed / S + image / N + both / SN; the p value of seeds alone would be that of these very images (docs/decisions/crossed-seeds.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from scipy import stats

FEWEST_SEEDS = 3  # of two, the spread is too unsure for an interval that covers
MANY = 1e6  # degrees of freedom, where the number of images is not known


@dataclass(frozen=True)
class CrossedTest:
    """Mean; sd over seeds; its standard error over seeds and images; the part over images; and the two-sided t test of a mean
    of 0 with `df` degrees of freedom (Satterthwaite 1946). None: there is no such number.
    """

    mean: float | None = None
    sd: float | None = None
    standard_error: float | None = None
    image_error: float | None = None
    df: float | None = None
    t: float | None = None
    p: float | None = None


def crossed_test(values: Sequence[float], gains: Sequence[Sequence[float]] | None, errors: Sequence[float | None]) -> CrossedTest:
    """Returns the test of one value per seed. `gains`: what each image gave to it with each seed, [S, N].

    None, as in records older than these: `errors`, each value's own standard error over images, stand in for them, as if the
    images gave the same with every seed, which is the most that they can add. One of them None: no test.
    """
    if not values:
        return CrossedTest()
    average = mean(values)
    if len(values) < 2:
        return CrossedTest(average, image_error=errors[0])
    sd, known = stdev(values), [error for error in errors if error is not None]
    if len(known) < len(values) or len(values) < FEWEST_SEEDS:
        return CrossedTest(average, sd)
    seeds, parts = len(values), [(sd**2 / len(values), len(values) - 1.0)]  # (variance of the mean, its degrees of freedom)
    if gains is None:
        image = mean(error**2 for error in known)
        parts.append((image, MANY))
    else:
        table = torch.tensor(gains, dtype=torch.float64)
        images = table.shape[1]
        rest = table - table.mean(0) - table.mean(1, keepdim=True) + table.mean()
        image = float(table.mean(0).var()) / images
        both = float(rest.square().sum()) / ((seeds - 1) * (images - 1)) / (seeds * images)
        # what images give beside their noise with each seed, which the seeds' spread holds already; never below 0
        parts += [(image, images - 1.0), (-both, (seeds - 1.0) * (images - 1))] if image > both else []
    variance = sum(part for part, _ in parts)
    image_error = math.sqrt(image)
    if variance == 0:
        return CrossedTest(average, sd, 0.0, image_error, None, None, 0.0 if average else 1.0)
    df = variance**2 / sum(part**2 / free for part, free in parts)
    t = average / math.sqrt(variance)
    return CrossedTest(average, sd, math.sqrt(variance), image_error, df, t, float(2 * stats.t.sf(abs(t), df)))
