"""The miniature result: DMP against its bundled backbone on the digits, over several training seeds.

`python -m benchmarks.miniature OUT --seeds 1 2 3 4 5` trains each seed with the default recipe (--set name=value changes it:
for tuning, on other seeds), then measures, on common sampling seeds: Fréchet distance in pixels and in the features of
a small digit classifier, and the paired loss. It writes OUT/miniature.json and prints a table. What is done is kept.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import ttest_1samp

from benchmarks.digit_features import DigitFeatures
from dmpctl.comparing.paired_loss import epsilon_errors, loss_difference
from dmpctl.data.bundled import Digits
from dmpctl.files import write_json
from dmpctl.images.stored import images_of
from dmpctl.measuring.features import extract
from dmpctl.metrics.features.pixels import Pixels
from dmpctl.metrics.frechet import Factor, features_to_fid, paired_difference
from dmpctl.metrics.moments import features_to_moments
from dmpctl.models.patch_files import load_patch
from dmpctl.models.patched import Patched
from dmpctl.sampling.generate import generate
from dmpctl.settings.layers import resolve
from dmpctl.settings.measuring import Sampling
from dmpctl.training.patch import patch
from dmpctl.types import Silent

CPU = torch.device("cpu")
SAMPLER = Sampling(sampler="ddim", steps=50)
EXTRACTORS = (Pixels(1, 8), DigitFeatures())


def sampled(model: Patched, count: int, seed: int) -> torch.Tensor:
    """`count` images of a model, uint8 [N, 1, 8, 8]."""
    settings = SAMPLER.model_copy(update={"sample_seed": seed})
    return torch.cat([generate(model, range(i, min(i + 500, count)), settings, CPU) for i in range(0, count, 500)])


def noise(reference: dict[str, Factor], plain: Patched, count: int, seeds: list[int]) -> dict[str, Any]:
    """What differs without any change: other sampling seeds of the backbone, and real images drawn again."""
    generator = torch.Generator().manual_seed(0)
    real = Digits().images()
    found: dict[str, Any] = {}
    others = [sampled(plain, count, seed) for seed in seeds]
    again = [real[torch.randint(len(real), (count,), generator=generator)] for _ in range(5)]
    for extractor in EXTRACTORS:
        distances = [
            [features_to_fid(extract(extractor, torch.split(i, 512)), reference[extractor.name]).value for i in s]
            for s in (others, again)
        ]
        found[extractor.name] = {"backbone_other_seeds": distances[0], "real_resampled": distances[1]}
    return found


def measure(model: Patched, before: torch.Tensor, reference: dict[str, Factor], count: int) -> dict[str, Any]:
    """A patched model beside its backbone's images `before`."""
    after = sampled(model, count, 0)
    found: dict[str, Any] = {}
    for extractor in EXTRACTORS:
        a, b = (extract(extractor, torch.split(images, 512)) for images in (after, before))
        difference = paired_difference(a, b, reference[extractor.name])
        found[extractor.name] = {
            "backbone": difference.b.value,
            "patched": difference.a.value,
            "difference": difference.value,
            "standard_error": difference.standard_error,
        }
    return found


def paired(model: Patched, seed: int) -> dict[str, float]:
    """Paired loss of a patched model against its backbone."""
    source = Digits()
    errors, steps = epsilon_errors(model.unpatched(), source, CPU, seed, Silent())
    found = loss_difference(errors, epsilon_errors(model, source, CPU, seed, Silent())[0], steps)
    return {
        "backbone": found.backbone,
        "patched": found.patched,
        "difference": found.difference,
        "standard_error": found.standard_error,
    }


def summary(seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and sd over training seeds of each measure's difference, and a t test of its mean against zero."""
    found = {}
    for name in ("paired_loss", *(e.name for e in EXTRACTORS)):
        values = [seed[name]["difference"] for seed in seeds.values() if name in seed]
        if values:
            p_value = float(ttest_1samp(values, 0).pvalue) if len(values) > 1 else None
            found[name] = {
                "mean": mean(values),
                "sd": stdev(values) if len(values) > 1 else None,
                "p_value": p_value,
                "seeds": len(values),
            }
            found[name] |= {
                "backbone": mean(s[name]["backbone"] for s in seeds.values()),
                "patched": mean(s[name]["patched"] for s in seeds.values()),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.miniature", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--loss-only", action="store_true", help="only the paired loss, with another noise: for tuning")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    changes: dict[str, Any] = dict(item.split("=", 1) for item in args.set)
    source = Digits()
    reference = {e.name: Factor.of(features_to_moments([extract(e, images_of(source))])) for e in EXTRACTORS}
    before: torch.Tensor | None = None
    seeds: dict[str, dict[str, Any]] = {}
    floor: dict[str, Any] = {}
    for seed in args.seeds:
        run = (args.out / f"seed-{seed}").absolute()
        given = {"run": run, "seed": seed, "evaluate": False, "quiet": True, **changes}
        patch(resolve("patch", given).settings, Silent())
        model = load_patch(run)
        found: dict[str, Any] = {"paired_loss": paired(model, 1000 if args.loss_only else 0)}
        if not args.loss_only:
            if before is None:
                before = sampled(model.unpatched(), args.images, 0)
                floor = noise(reference, model.unpatched(), args.images, [1, 2, 3])
            found |= measure(model, before, reference, args.images)
        seeds[str(seed)] = found
        sys.stderr.write(f"seed {seed}: {json.dumps(found)}\n")
    result = {
        "schema_version": 1,
        "set": changes,
        "images": args.images,
        "seeds": seeds,
        "summary": summary(seeds),
        "noise": floor,
    }
    write_json(args.out / "miniature.json", result)
    sys.stdout.write(json.dumps({"set": changes, "summary": result["summary"]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
