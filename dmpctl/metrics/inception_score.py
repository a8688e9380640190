"""Inception Score (Salimans et al. 2016): exp of the mean KL of each image's classes to those of its split."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmpctl.errors import NumericalError, UsageError
from dmpctl.rng import seed_of

SPLITS = 10


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation over `splits` splits, the smallest of which has `smallest` images."""

    value: float
    deviation: float
    splits: int
    smallest: int


def logits_to_score(logits: Tensor, split_size: int | None = None, seed: int = 0) -> InceptionScore:
    """Score of logits [N, K], in float64.

    `split_size`: contiguous splits of so many images in the order given, the last one shorter, as ADM's evaluator has them
    (images sorted by class then score far too low). None: ten splits of a permutation by `seed`, as the others have them.
    Raises UsageError for fewer images than splits, NumericalError for logits that are not finite.
    """
    if logits.ndim != 2 or len(logits) < SPLITS:
        raise UsageError(f"an Inception Score takes at least {SPLITS} images, found logits {list(logits.shape)}")
    if not torch.isfinite(logits).all():
        raise NumericalError("logits are not finite", "look at the images they come from")
    parts: Sequence[Tensor]
    if split_size is not None:
        parts = torch.split(logits, split_size)
    else:
        generator = torch.Generator().manual_seed(seed_of(seed, "inception score"))
        order = torch.randperm(len(logits), generator=generator)
        parts = [logits[part] for part in order.tensor_split(SPLITS)]
    scores = torch.tensor([_score(part) for part in parts], dtype=torch.float64)
    return InceptionScore(float(scores.mean()), float(scores.std(correction=0)), len(parts), min(map(len, parts)))


def _score(logits: Tensor) -> float:
    """exp E KL(p(y|x) || p(y)) of one split [n, K]."""
    log_p = logits.double().log_softmax(dim=1)
    log_marginal = torch.logsumexp(log_p, dim=0) - torch.tensor(len(log_p), dtype=torch.float64).log()
    return float((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp())
