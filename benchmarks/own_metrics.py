"""Metrics of dmpctl beside torchmetrics, torch-fidelity and scipy on the same features: the difference, and seconds for each.

Usage: python -m benchmarks.own_metrics. Random features of Inception's width, no weights are needed; its numbers are in
docs/decisions/own-metrics.md.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial

import scipy.linalg
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

from dmpctl.metrics.frechet import moments_to_fid
from dmpctl.metrics.inception_score import logits_to_score
from dmpctl.metrics.kid import features_to_kid
from dmpctl.metrics.moments import features_to_moments
from dmpctl.metrics.prdc import precision_recall

WIDTH, CLASSES = 2048, 1008


def normal(count: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def timed(work: Callable[[], float]) -> tuple[float, float]:
    began = time.perf_counter()
    return float(work()), time.perf_counter() - began


def say(metric: str, library: str, own: Callable[[], float], theirs: Callable[[], float]) -> None:
    (value, own_seconds), (other, seconds) = timed(own), timed(theirs)
    figures = {"own": value, "theirs": other, "own_seconds": round(own_seconds, 2), "seconds": round(seconds, 2)}
    sys.stdout.write(json.dumps({"metric": metric, "library": library, **figures}) + "\n")
    sys.stdout.flush()


def frechet(count: int) -> None:
    x, y = normal(count, WIDTH, 1).double(), normal(count, WIDTH, 2, 0.05).double()
    means, covariances = (x.mean(0), y.mean(0)), (torch.cov(x.T), torch.cov(y.T))

    def of_scipy() -> float:
        root = scipy.linalg.sqrtm(covariances[0].numpy() @ covariances[1].numpy()).real.trace()
        return float((means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * root)

    def own() -> float:
        return moments_to_fid(features_to_moments([x]), features_to_moments([y]))

    say(f"fid {count}", "torchmetrics", own, lambda: _compute_fid(means[0], covariances[0], means[1], covariances[1]))
    say(f"fid {count}", "scipy sqrtm", own, of_scipy)


def inception_score() -> None:
    logits = normal(5_000, CLASSES, 3) * 3
    torch.manual_seed(0)
    metric = InceptionScore(torch.nn.Identity())
    metric.features = [logits]
    say("is 5000", "torchmetrics", lambda: logits_to_score(logits).value, lambda: metric.compute()[0])
    say("is 5000 deviation", "torchmetrics", lambda: logits_to_score(logits).deviation, lambda: metric.compute()[1])
    theirs = partial(isc_features_to_metric, logits)
    say("is 5000", "torch-fidelity", lambda: logits_to_score(logits).value, lambda: theirs()["inception_score_mean"])


def kernel_distance() -> None:
    x, y = normal(1_000, WIDTH, 4), normal(1_000, WIDTH, 5, 0.05)
    say("kid 1 subset", "torchmetrics", lambda: features_to_kid(x, y, 1, 1_000).value, lambda: poly_mmd(x, y))


def neighbours() -> None:
    real, generated = normal(3_000, WIDTH, 6), normal(3_000, WIDTH, 7)
    generated[:100] = real[:100]  # copies, as a generator that has learned its data by heart makes them
    given = {"prc_neighborhood": 3, "prc_batch_size": 2_048, "save_cpu_ram": True, "verbose": False}

    def theirs(name: str) -> float:
        return float(prc_features_to_metric(generated, real, **given)[name])

    say("precision 3000", "torch-fidelity", lambda: precision_recall(real, generated).precision, lambda: theirs("precision"))
    say("recall 3000", "torch-fidelity", lambda: precision_recall(real, generated).recall, lambda: theirs("recall"))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    frechet(1_000)
    frechet(4_000)
    inception_score()
    kernel_distance()
    neighbours()
