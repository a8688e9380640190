"""Every metric that `dmpctl fid` was asked for: a new one is a file in metrics/ and a case here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import assert_never

import torch
from pydantic import JsonValue

from dmpctl.errors import UsageError
from dmpctl.measuring.case import Case
from dmpctl.measuring.features import FeatureStore
from dmpctl.measuring.reference import Reference
from dmpctl.metrics.clip_score import ClipScore, ClipScorer, scores_to_clip_score
from dmpctl.metrics.frechet import FidEstimate, moments_to_fid
from dmpctl.metrics.inception_score import logits_to_score
from dmpctl.metrics.infinity import fid_infinity
from dmpctl.metrics.kid import features_to_kid
from dmpctl.metrics.moments import BLOCK, features_to_moments
from dmpctl.metrics.prdc import density_coverage, precision_recall
from dmpctl.settings.measuring import Metric
from dmpctl.types import Extractor
from dmpctl.words import plus_minus

Figures = Mapping[str, JsonValue]


@dataclass(frozen=True)
class Score:
    """One metric: its name with N, its figures as they are recorded, and the row of a table that people see."""

    name: str
    figures: Figures
    row: dict[str, str]


def metric_name(extractor: Extractor, n: int, metric: str = "fid") -> str:
    """A name that carries N: fid50k, sfid50k, fd-pixels-5k."""
    if extractor.name == "inception":
        return f"{metric}{short(n)}"
    return f"{'fd' if metric == 'fid' else metric}-{extractor.name}-{short(n)}"


def short(n: int) -> str:
    """A number of images as names have it: 50k, 2049."""
    return f"{n // 1000}k" if n % 1000 == 0 else str(n)


def scores_of(case: Case, estimate: FidEstimate, store: FeatureStore, reference: Reference) -> list[Score]:
    """Every metric that was asked for, the Fréchet distance first and the CLIP score last."""
    found = []
    for metric in sorted(case.options.wanted, key="clip-score".__eq__):
        figures, row = _score(metric, case, estimate, store, reference)
        name = metric_name(case.extractor, store.count, metric)
        found.append(Score(name, figures, {"metric": name, **row}))
    return found


def _score(
    metric: Metric, case: Case, estimate: FidEstimate, store: FeatureStore, reference: Reference
) -> tuple[Figures, dict[str, str]]:
    """Figures of one metric, and what its row says of them."""
    features, seed = store.features, case.command.settings.sampling.sample_seed
    match metric:
        case "fid":
            count = "n unknown" if reference.count is None else reference.count
            return asdict(estimate), {
                "value": f"{estimate.value:.4f}",
                "debiased": "" if estimate.debiased is None else f"{estimate.debiased:.4f}{plus_minus(estimate.standard_error)}",
                "images": str(estimate.n),
                "reference": f"{reference.record.name} ({count})",
            }
        case "sfid":
            if reference.spatial is None:
                raise UsageError("sfid needs spatial statistics of the reference", "leave sfid out of --metrics")
            value = moments_to_fid(features_to_moments(torch.split(store.spatial, BLOCK)), reference.spatial)
            return {"value": value}, {"value": f"{value:.4f}"}
        case "is":
            score = logits_to_score(store.logits, case.protocol.split_size, seed)
            return asdict(score), {"value": f"{score.value:.4f} ± {score.deviation:.4g} (sd over {score.splits} splits)"}
        case "pr":
            pr = precision_recall(reference.vectors(), features)
            return asdict(pr), {"value": f"precision {pr.precision:.4f}, recall {pr.recall:.4f} (k = {pr.neighbours})"}
        case "dc":
            dc = density_coverage(reference.vectors(), features)
            return asdict(dc), {"value": f"density {dc.density:.4f}, coverage {dc.coverage:.4f} (k = {dc.neighbours})"}
        case "kid":
            kid = features_to_kid(features, reference.vectors(), seed=seed)
            spread = f"sd {kid.deviation:.2g} over {kid.subsets} subsets of {kid.subset_size}"
            return asdict(kid), {"value": f"{kid.value:.6f}{plus_minus(kid.standard_error, '.2g')} ({spread})"}
        case "fid-infinity":
            line = fid_infinity(features, reference.features, seed, progress=case.command.progress)
            return asdict(line), {"value": f"{line.value:.4f} ± {line.standard_error:.4g} (R² {line.r_squared:.3f})"}
        case "clip-score":
            clip = _clip_score(case)
            row = {"metric": f"clip-score-{short(clip.n)}", "value": f"{clip.value:.4f}{plus_minus(clip.standard_error)}"}
            return asdict(clip) | {"clip": case.options.clip}, row
        case _:
            assert_never(metric)


def _clip_score(case: Case) -> ClipScore:
    """How well images of a run show what their captions say."""
    model = case.images.model
    if case.clip is None or model is None or model.prompts is None:  # refused before anything was measured
        raise ValueError("images without captions have no CLIP score")
    scorer, texts, scores = ClipScorer(case.clip, case.command.device), model.prompts.texts, []
    with case.command.progress.track("CLIP score", case.images.count) as task:
        for indices, part in case.images.read(range(case.images.count)):
            scores.append(scorer(part, [texts[k % len(texts)] for k in indices]))
            task.advance(len(part))
    return scores_to_clip_score(scores)


def noise_floor_of(reference: Reference, seed: int) -> Score:
    """One random half of the real images against the other: a perfect generator would score this with so few."""
    vectors = reference.vectors()
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))
    halves = [half.sort().values for half in order.tensor_split(2)]
    one, two = (features_to_moments(vectors[part] for part in torch.split(half, BLOCK)) for half in halves)
    value, n, others = moments_to_fid(one, two), *map(len, halves)
    row = {"metric": "noise floor", "value": f"{value:.4f}", "images": f"{n} real against {others}"}
    return Score("noise floor", {"value": value, "n": n, "n_reference": others}, row)
