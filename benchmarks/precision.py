"""Error budgets of docs/precision.md: `python -m benchmarks.precision [--images N]`, JSON.

On crops of scikit-learn's two photographs, with random Inception weights: how far features move, in units of their own
standard deviation over images, and a Fréchet distance in their first 64 numbers, by what should not matter and by what does.
"""

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from dmpctl.metrics.features.inception import PREPROCESSINGS, Inception
from dmpctl.metrics.features.protocols import Preprocessing
from dmpctl.metrics.frechet import moments_to_fid
from dmpctl.metrics.moments import features_to_moments
from tests.random_inception import write_random_inception

SIDE, FIRST = 64, 64


def crops(count: int, seed: int) -> Tensor:
    """Random crops uint8 [count, 3, 64, 64] of two photographs."""
    photographs, generator = load_sample_images().images, np.random.default_rng(seed)
    found = []
    for number in range(count):
        photograph = photographs[number % 2]
        top, left = (int(generator.integers(0, size - SIDE)) for size in photograph.shape[:2])
        found.append(torch.tensor(photograph[top : top + SIDE, left : left + SIDE]).permute(2, 0, 1))
    return torch.stack(found)


def jpeg(images: Tensor, quality: int) -> Tensor:
    """The same after a JPEG file."""
    found = []
    for image in images:
        data = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(data, "JPEG", quality=quality)
        found.append(torch.tensor(np.asarray(Image.open(data))).permute(2, 0, 1))
    return torch.stack(found)


def in_float64(extractor: Inception, images: Tensor) -> Tensor:
    """Features of the same network with every number in float64, and back."""
    x = PREPROCESSINGS["adm"][1](images).double()
    with torch.inference_mode():
        for layer in extractor._layers:
            x = layer.double()(x)
    for layer in extractor._layers:
        layer.float()
    return x.flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    count = parser.parse_args().images
    real, made = crops(count, 0), crops(count, 1)
    with tempfile.TemporaryDirectory() as folder:
        weights = write_random_inception(Path(folder) / "random.pth")
        extractors = {kind: Inception(weights, pinned=False, preprocessing=kind) for kind in PREPROCESSINGS}
    adm = extractors["adm"]

    def features(images: Tensor, kind: Preprocessing = "adm", batch: int = 16) -> Tensor:
        return torch.cat([extractors[kind](part) for part in torch.split(images, batch)])

    reference, base = features_to_moments([features(real)[:, :FIRST]]), features(made)
    spread = base.std(dim=0)
    alive = spread > 0.01 * spread.mean()  # random weights leave some features at zero
    spread = spread[alive]
    variants = {
        "batches of 1 instead of 16": features(made, batch=1),
        "float64 instead of float32": torch.cat([in_float64(adm, part) for part in torch.split(made, 16)]).float(),
        "JPEG, quality 95": features(jpeg(made, 95)),
        "JPEG, quality 75": features(jpeg(made, 75)),
        "resize and range of pytorch-fid": features(made, "pytorch-fid"),
        "resize of clean-fid": features(made, "clean"),
    }
    plain = moments_to_fid(features_to_moments([base[:, :FIRST]]), reference)
    found = {
        name: {
            "largest_feature_change_in_sd": float(((values - base)[:, alive].abs() / spread).max()),
            "mean_feature_change_in_sd": float(((values - base)[:, alive].abs() / spread).mean()),
            "distance_change": moments_to_fid(features_to_moments([values[:, :FIRST]]), reference) - plain,
        }
        for name, values in variants.items()
    }
    sys.stdout.write(json.dumps({"images": count, "distance": plain, "variants": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
