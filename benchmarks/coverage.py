"""How often the 95 % intervals that dmpctl prints hold the truth: 93 to 97 of 100 is what they should.

Usage: python -m benchmarks.coverage [--part fid|infinity|kid|loss|compare] [--repetitions 200]. One line per case as it is done;
the figures are in docs/fid.md. Truths: closed forms of Gaussians, and of real features those of the whole population of digits
that samples are drawn from with replacement.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from functools import cache

import torch
from scipy import stats
from torch import Tensor

from benchmarks.digit_features import DigitFeatures
from dmpctl.comparing.paired_loss import loss_difference
from dmpctl.data.bundled import Digits
from dmpctl.metrics.crossed import crossed_test
from dmpctl.metrics.features.pixels import Pixels
from dmpctl.metrics.frechet import Factor, moments_to_fid, paired_difference, paired_gains
from dmpctl.metrics.infinity import fid_infinity
from dmpctl.metrics.kid import features_to_kid
from dmpctl.metrics.moments import features_to_moments
from dmpctl.rng import seed_of

NORMAL = 1.959964
Interval = tuple[float, float, float]  # value, standard error, how many of them
Pair = tuple[Tensor, Tensor]  # features [N, D] of two generators on common seeds


def drawn(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))


def normal(count: int, width: int, *parts: int | str) -> Tensor:
    return torch.randn(count, width, generator=drawn(*parts), dtype=torch.float64)


class Gaussians:
    """Two generators that map common noise, one further off than the other, and real images whose spectrum falls 30-fold."""

    def __init__(self, width: int) -> None:
        self.name, self.width = f"Gaussian, {width} features", width
        spectrum = torch.logspace(0, -1.5, width, dtype=torch.float64)
        self.reference = Factor.of_covariance(torch.zeros(width, dtype=torch.float64), torch.diag(spectrum))
        scale, eye = torch.diag(spectrum.sqrt()), torch.eye(width, dtype=torch.float64)
        self._maps = [
            (scale @ (eye + far * normal(width, width, "map", far_name) / width**0.5), 0.8 * far * spectrum.sqrt())
            for far, far_name in ((0.35, "a"), (0.2, "b"))
        ]
        self.truth = [
            moments_to_fid(Factor.of_covariance(shift, matrix.T @ matrix), self.reference) for matrix, shift in self._maps
        ]

    def distance_scaled(self, scale: float) -> float:
        """The true distance of the first generator's features times a number."""
        matrix, shift = self._maps[0]
        sample = Factor.of_covariance(scale * shift, scale**2 * matrix.T @ matrix)
        return moments_to_fid(sample, self.reference)

    def pair(self, count: int, seed: int) -> Pair:
        z = normal(count, self.width, "pair", seed)
        a, b = (z @ matrix + shift for matrix, shift in self._maps)
        return a, b


class Spectra:
    """The hard case of a difference: one generator's spectrum is right, that of the other is flat, so their biases differ."""

    def __init__(self, width: int) -> None:
        self.name, self.width = f"Gaussian, {width} features, unlike spectra", width
        spectrum = torch.logspace(0.3, -3, width, dtype=torch.float64)
        flat = (spectrum + 0.012).sqrt()
        self.reference = Factor.of_covariance(torch.zeros(width, dtype=torch.float64), torch.diag(spectrum))
        self._scales = flat, spectrum.sqrt()
        zero = torch.zeros(width, dtype=torch.float64)
        self.truth = [moments_to_fid(Factor.of_covariance(zero, torch.diag(s.square())), self.reference) for s in self._scales]

    def pair(self, count: int, seed: int) -> Pair:
        z = normal(count, self.width, "spectra", seed)
        return z * self._scales[0], z * self._scales[1]


class RealDigits:
    """Features of real digits, blurred a little and a little less, against those of the digits as they are."""

    def __init__(self, extractor: Pixels | DigitFeatures) -> None:
        images = Digits().images()
        self.name, self.width = f"digits, {extractor.name} ({extractor.width} features)", extractor.width
        blurred = torch.nn.functional.avg_pool2d(images.float(), 3, 1, 1)
        self._sides = [extractor((images + share * (blurred - images)).round().byte()).double() for share in (0.35, 0.25)]
        self.reference = Factor.of(whole(extractor(images).double()))
        self.truth = [moments_to_fid(whole(side), self.reference) for side in self._sides]

    def pair(self, count: int, seed: int) -> Pair:
        rows = torch.randint(len(self._sides[0]), (count,), generator=drawn("digits", seed))
        return self._sides[0][rows], self._sides[1][rows]


def whole(population: Tensor) -> Factor:
    """A whole population [N, D] as it is, whose covariance is over N."""
    moments = features_to_moments([population])
    return Factor.of_covariance(moments.mean, moments.scatter / moments.count)


Case = Gaussians | Spectra | RealDigits


@cache
def cases() -> tuple[Case, ...]:
    return Gaussians(16), Gaussians(64), Gaussians(256), Spectra(64), RealDigits(Pixels(1, 8)), RealDigits(DigitFeatures())


def covered(found: list[Interval], truth: float) -> str:
    """One line: coverage, mean, spread of the values, mean standard error."""
    hits = [abs(value - truth) <= critical * error for value, error, critical in found]
    values = torch.tensor([value for value, _, _ in found], dtype=torch.float64)
    mean_error = sum(error for _, error, _ in found) / len(found)
    words = f"truth {truth:.4f}, mean {values.mean():.4f}, sd {values.std():.4f}, error {mean_error:.4f}"
    return f"{100 * sum(hits) / len(hits):5.1f} %   {words}"


def fid(repetitions: int) -> Iterator[str]:
    """Debiased distance and debiased paired difference."""
    for case in cases():
        for times in (2.1, 3.1, 5, 10, 25):
            count = math.ceil(times * case.width)
            if count > 1_700:
                continue
            one, two = list[Interval](), list[Interval]()
            for seed in range(repetitions):
                gap = paired_difference(*case.pair(count, seed), case.reference)
                two.append((gap.value, gap.standard_error or 0.0, NORMAL))
                if gap.a.debiased is not None and gap.a.standard_error is not None:
                    one.append((gap.a.debiased, gap.a.standard_error, NORMAL))
            if one:
                yield f"{case.name:40} N {count:5}  distance    {covered(one, case.truth[0])}"
            yield f"{case.name:40} N {count:5}  difference  {covered(two, case.truth[0] - case.truth[1])}"


def infinity(repetitions: int) -> Iterator[str]:
    for case in cases():
        for times in (4, 10, 25):
            count = math.ceil(times * case.width)
            if count > 2_000 or case.width > 64:
                continue
            found = list[Interval]()
            for seed in range(repetitions):
                line = fid_infinity(case.pair(count, seed)[0], case.reference, seed)
                found.append((line.value, line.standard_error, NORMAL))
            yield f"{case.name:40} N {count:5}  FID-infinity {covered(found, case.truth[0])}"


def kid(repetitions: int) -> Iterator[str]:
    """Against samples of the real side, too; truth of Gaussians: the mean of samples 1 000 times as many."""
    width = 16
    for shift in (0.0, 0.1, 0.4):
        truth = _true_kid(width, shift)
        for count, others in ((200, 200), (200, 1_000), (1_500, 600), (3_000, 3_000)):
            found = list[Interval]()
            for seed in range(repetitions):
                x, y = normal(count, width, "kid", seed) + shift, normal(others, width, "real", seed)
                # few subsets of few images: each of the paths, at a price that 200 repetitions can pay
                one = features_to_kid(x, y, 20, min(count, others, 300), seed)
                found.append((one.value, one.standard_error, NORMAL))
            yield f"Gaussian, 16 features, shift {shift:<12} N {count:5}, {others} real  KID {covered(found, truth)}"


def _true_kid(width: int, shift: float) -> float:
    """E (x y / D + 1)^3 of normal vectors, E[(x.y)^2] = D + m etc. written out: x ~ N(m, I), y ~ N(k, I)."""

    def kernel(m: float, k: float) -> float:  # every coordinate has these means
        dot, second = width * m * k, width * (1 + m * m + k * k)
        third = 3 * dot * second + dot**3 + 6 * width * m * k
        return third / width**3 + 3 * (second + dot**2) / width**2 + 3 * dot / width + 1

    return kernel(shift, shift) + kernel(0.0, 0.0) - 2 * kernel(shift, 0.0)


def loss(repetitions: int) -> Iterator[str]:
    """The paired loss over images, whose gains are skewed like squares."""
    for count in (100, 500, 2_000):
        found = list[Interval]()
        for seed in range(repetitions):
            before = normal(25, count, "before", seed).square() * normal(1, count, "image", seed).exp()
            after = before * (1 + 0.02 * normal(25, count, "after", seed)) - 0.001 * normal(1, count, "gain", seed).square()
            gap = loss_difference(before, after, list(range(25)))
            found.append((gap.difference, gap.standard_error, NORMAL))
        yield f"{'paired loss':40} N {count:5}  {covered(found, -0.001)}"


def compare(repetitions: int) -> Iterator[str]:
    """Mean over S seeds on N common images; a Fréchet difference of S generators on common noise."""
    for seeds in (3, 5, 10):
        for share in (0.0, 0.3, 1.0, 3.0):  # sd of seeds in standard errors over images
            for both in (0.0, 1.0):  # sd of what an image gives with one seed alone
                count, ours, bound, old = 500, list[Interval](), list[Interval](), list[Interval]()
                for seed in range(repetitions):
                    table = share / count**0.5 * normal(seeds, 1, "s", seed, seeds) + normal(1, count, "i", seed, seeds)
                    table = table + both * normal(seeds, count, "si", seed, seeds)
                    values, errors = table.mean(1).tolist(), (table.std(1) / count**0.5).tolist()
                    ours.append(_tested(crossed_test(values, table.tolist(), errors)))
                    bound.append(_tested(crossed_test(values, None, errors)))
                    old.append((sum(values) / seeds, stats.sem(values), float(stats.t.ppf(0.975, seeds - 1))))
                words = f"{seeds:2} seeds, {count} images, seeds {share:3} of images, both {both}"
                for name, found in (("compare", ours), ("without gains", bound), ("over seeds alone", old)):
                    yield f"{words:40}  {name:17} {covered(found, 0.0)}"
    yield from _compared_distances(repetitions)


def _compared_distances(repetitions: int) -> Iterator[str]:
    """Fréchet difference of generators that training seeds made unlike, from one backbone, all on common noise."""
    width, images, seeds = 32, 640, 5
    case = Gaussians(width)
    for share in (0.0005, 0.005, 0.03):
        truth = _mean_truth(case, share)
        found, old = list[Interval](), list[Interval]()
        for seed in range(repetitions):
            backbone, _ = case.pair(images, seed)
            trained = (_trained(backbone, share, seed, training) for training in range(seeds))
            gaps = [paired_gains(each, backbone, case.reference) for each in trained]
            values, gains = [gap.value for gap, _ in gaps], [each.tolist() for _, each in gaps if each is not None]
            found.append(_tested(crossed_test(values, gains, [gap.standard_error for gap, _ in gaps])))
            old.append((sum(values) / seeds, float(stats.sem(values)), float(stats.t.ppf(0.975, seeds - 1))))
        for name, some in (("compare", found), ("over seeds alone", old)):
            words = f"{seeds} seeds, distance of {images} images, sd {share}"
            yield f"{words:40}  {name:17} {covered(some, truth)}"


def _trained(features: Tensor, share: float, *seed: int) -> Tensor:
    """Returns features as a trained backbone would make them: all that is off gets smaller, and by how much is the seed's."""
    return features * (0.99 + share * float(normal(1, 1, "trained", *seed)))


def _mean_truth(case: Gaussians, share: float) -> float:
    """Mean over seeds of the true difference: E over s of the distance of s x, s ~ N(0.99, share), by quadrature."""
    before, total, points = case.truth[0], 0.0, 201
    for quantile in (torch.arange(points, dtype=torch.float64) + 0.5) / points:
        scale = 0.99 + share * float(stats.norm.ppf(float(quantile)))
        total += case.distance_scaled(scale) - before
    return total / points


def _tested(test: object) -> Interval:
    mean, error, df = (getattr(test, name) for name in ("mean", "standard_error", "df"))
    return mean, error, float(stats.t.ppf(0.975, df))


PARTS: dict[str, Callable[[int], Iterator[str]]] = {
    "loss": loss, "compare": compare, "kid": kid, "fid": fid, "infinity": infinity,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--repetitions", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name, part in PARTS.items():
        if given.part in (None, name):
            for line in part(given.repetitions):
                sys.stdout.write(line + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
