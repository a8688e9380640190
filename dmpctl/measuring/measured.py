"""What `dmpctl fid` measures on features and images: every metric that was asked for, and the rows that people see."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from dmpctl.errors import UsageError
from dmpctl.measuring.feature_store import FeatureStore
from dmpctl.measuring.image_sets import ImageSet
from dmpctl.measuring.record import metric_name, plus_minus
from dmpctl.measuring.reference import Reference
from dmpctl.metrics.clip_score import ClipScore, ClipScorer, scores_to_clip_score
from dmpctl.metrics.features.protocols import MetricProtocol
from dmpctl.metrics.frechet import GROUPS, FidEstimate, features_to_fid, moments_to_fid
from dmpctl.metrics.inception_score import logits_to_score
from dmpctl.metrics.infinity import fid_infinity
from dmpctl.metrics.kid import features_to_kid
from dmpctl.metrics.moments import BLOCK, features_to_moments
from dmpctl.metrics.prdc import density_coverage, precision_recall
from dmpctl.settings.model import Settings
from dmpctl.types import Extractor, Progress


def measured(
    store: FeatureStore, reference: Reference, extractor: Extractor, protocol: MetricProtocol, settings: Settings
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Every metric that was asked for, by its name, and the rows that people see."""
    features, seed = store.features, settings.sampling.sample_seed
    debias = store.count > max(extractor.width, 2 * GROUPS - 1)
    estimate = features_to_fid(features, reference.features, debias=debias)
    found: dict[str, Any] = {"fid": estimate}
    rows = [_row("fid", extractor, estimate, reference)]
    for metric in (metric for metric in settings.fid.wanted[1:] if metric != "clip-score"):
        match metric:
            case "sfid":
                if reference.spatial is None:
                    raise UsageError("sfid needs spatial statistics of the reference", "leave sfid out of --metrics")
                value = moments_to_fid(features_to_moments(torch.split(store.spatial, BLOCK)), reference.spatial)
                found[metric] = {"value": value}
                shown = f"{value:.4f}"
            case "is":
                score = logits_to_score(store.logits, protocol.split_size, seed)
                found[metric], shown = asdict(score), f"{score.value:.4f} ± {score.deviation:.4g} (sd over {score.splits} splits)"
            case "pr":
                pr = precision_recall(reference.vectors(), features)
                found[metric], shown = asdict(pr), f"precision {pr.precision:.4f}, recall {pr.recall:.4f} (k = {pr.neighbours})"
            case "dc":
                dc = density_coverage(reference.vectors(), features)
                found[metric], shown = asdict(dc), f"density {dc.density:.4f}, coverage {dc.coverage:.4f} (k = {dc.neighbours})"
            case "kid":
                kid = features_to_kid(features, reference.vectors(), seed=seed)
                found[metric], shown = asdict(kid), f"{kid.value:.6f} ± {kid.deviation:.2g} (sd over {kid.subsets} subsets)"
            case _:
                line = fid_infinity(features, reference.features, seed)
                found[metric], shown = asdict(line), f"{line.value:.4f} ± {line.standard_error:.4g} (R² {line.r_squared:.3f})"
        rows.append({"metric": metric_name(extractor, store.count, metric), "value": shown})
    return found, rows


def clip_score_of(images: ImageSet, scorer: ClipScorer, progress: Progress) -> ClipScore:
    """How well images of a run show what their captions say."""
    model = images.model
    if model is None or model.prompts is None:  # refused before anything was measured
        raise ValueError("images without captions have no CLIP score")
    texts, scores = model.prompts.texts, []
    with progress.track("CLIP score", images.count) as task:
        for indices, part in images.read(range(images.count)):
            scores.append(scorer(part, [texts[k % len(texts)] for k in indices]))
            task.advance(len(part))
    return scores_to_clip_score(scores)


def named(found: Mapping[str, Any], extractor: Extractor, images: ImageSet) -> dict[str, Any]:
    """The metrics under names that carry N."""
    plain = {key: asdict(value) if isinstance(value, FidEstimate) else value for key, value in found.items()}
    return {metric_name(extractor, images.count, key): value for key, value in plain.items()}


def _row(metric: str, extractor: Extractor, estimate: FidEstimate, reference: Reference) -> dict[str, str]:
    return {
        "metric": metric_name(extractor, estimate.n, metric),
        "value": f"{estimate.value:.4f}{plus_minus(estimate.standard_error)}",
        "debiased": "" if estimate.debiased is None else f"{estimate.debiased:.4f}",
        "images": str(estimate.n),
        "reference": f"{reference.record['name']} ({'n unknown' if reference.count is None else reference.count})",
    }


def noise_floor_of(reference: Reference, settings: Settings) -> tuple[dict[str, Any], dict[str, str]]:
    """One random half of the real images against the other: what a perfect generator would score with so few."""
    vectors = reference.vectors()
    generator = torch.Generator().manual_seed(settings.sampling.sample_seed)
    order = torch.randperm(len(vectors), generator=generator)
    halves = [half.sort().values for half in order.tensor_split(2)]
    one, two = (features_to_moments(vectors[part] for part in torch.split(half, BLOCK)) for half in halves)
    found = {"value": moments_to_fid(one, two), "n": len(halves[0]), "n_reference": len(halves[1])}
    return found, {
        "metric": "noise floor",
        "value": f"{found['value']:.4f}",
        "images": f"{found['n']} real against {found['n_reference']}",
    }
