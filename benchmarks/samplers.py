"""Fréchet distance against the number of denoising steps: `python -m benchmarks.samplers [--images N] [--out FILE.json]`.

The bundled digits, and with `--base FILE --reference FOLDER` any other small backbone against any images; in pixels, for every
sampler at 10, 20, 50, 100 and 250 steps, over several sampling seeds. Prints Markdown: mean ± sd, and seconds per 1 000 images.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any, get_args

import torch

from dmpctl.data.source import open_source
from dmpctl.diffusion.samplers import Sampler
from dmpctl.images.stored import images_of
from dmpctl.measuring.features import extract
from dmpctl.metrics.features.pixels import Pixels
from dmpctl.metrics.frechet import Factor, features_to_fid
from dmpctl.metrics.moments import features_to_moments
from dmpctl.models.backbone import load_backbone
from dmpctl.models.patched import Patched
from dmpctl.sampling.generate import in_batches
from dmpctl.settings.measuring import Sampling
from dmpctl.settings.sections import Base, Data
from dmpctl.types import Silent

STEPS = (10, 20, 50, 100, 250)


def distance(model: Patched, reference: Factor, pixels: Pixels, count: int, sampler: str, steps: int, seed: int) -> float:
    """Fréchet distance of `count` images."""
    settings = Sampling(sampler=sampler, steps=steps, sample_seed=seed)
    batches = (images for _, images in in_batches(model, range(count), settings, torch.device("cpu"), Silent()))
    return features_to_fid(extract(pixels, batches), reference).value


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samplers", description=__doc__)
    parser.add_argument("--base", default="digits")
    parser.add_argument("--reference", default="digits")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    loaded = load_backbone(Base(base=args.base))
    model, (channels, size, _) = Patched(loaded), loaded.spec.latent_shape
    pixels = Pixels(channels, size)
    source = open_source(Data(data=args.reference), size, channels)
    reference = Factor.of(features_to_moments([extract(pixels, images_of(source))]))
    found: dict[str, dict[int, dict[str, Any]]] = {}
    lines = ["| sampler | " + " | ".join(f"{steps} steps" for steps in STEPS) + " |", "|---|" + "---|" * len(STEPS)]
    for sampler in get_args(Sampler):
        for steps in STEPS:
            began = time.perf_counter()
            values = [distance(model, reference, pixels, args.images, sampler, steps, seed) for seed in range(args.seeds)]
            seconds = (time.perf_counter() - began) / args.seeds / args.images * 1000
            found.setdefault(sampler, {})[steps] = {"values": values, "seconds_per_1000": seconds}
            sys.stderr.write(f"{sampler} {steps}: {values}, {seconds:.1f} sec per 1 000\n")
        cells = (found[sampler][steps]["values"] for steps in STEPS)
        lines.append(f"| {sampler} | " + " | ".join(f"{mean(v):.3f} ± {stdev(v):.3f}" for v in cells) + " |")
    sys.stdout.write("\n".join(lines) + "\n")
    if args.out is not None:
        args.out.write_text(json.dumps({**vars(args), "out": str(args.out), "found": found}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
