"""Where the time and the memory of an FID go."""

import resource
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.bench.timing import interleaved
from dmpctl.metrics.features.inception import Inception
from dmpctl.metrics.frechet import Factor, features_to_fid, moments_to_fid
from dmpctl.metrics.moments import FeatureMoments, features_to_moments
from tests.random_inception import random_images, write_random_inception

WIDTH = 2048


def extraction(folder: Path, count: int, rounds: int) -> dict[str, object]:
    """images/s of three extractors on the same images, and what the moments of the features take beside them."""
    from pytorch_fid import inception as theirs
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    weights = write_random_inception(folder / "random.pth")
    own = Inception(weights, pinned=False)
    fidelity = FeatureExtractorInceptionV3("bench", ["2048"], feature_extractor_weights_path=str(weights))
    with patch.object(theirs, "load_state_dict_from_url", lambda *_, **__: torch.load(weights, weights_only=True)):
        pytorch_fid = theirs.InceptionV3([theirs.InceptionV3.BLOCK_INDEX_BY_DIM[WIDTH]]).eval()
    x, moments = random_images(count, 256, 256), FeatureMoments.empty(WIDTH)
    features = own(x)

    def of_pytorch_fid() -> object:
        with torch.no_grad():
            return pytorch_fid(x.float() / 255)

    actions = {
        "dmpctl": lambda: own(x),
        "torch-fidelity": lambda: fidelity(x),
        "pytorch-fid": of_pytorch_fid,
        "moments": lambda: moments.add(features),
    }
    seconds = interleaved(actions, rounds)
    rate = {name: count / value for name, value in seconds.items() if name != "moments"}
    return {
        "images_per_second": {name: round(value, 3) for name, value in rate.items()},
        "against_torch_fidelity": round(rate["dmpctl"] / rate["torch-fidelity"], 3),
        "against_pytorch_fid": round(rate["dmpctl"] / rate["pytorch-fid"], 3),
        "moments_share": round(seconds["moments"] / seconds["dmpctl"], 5),
    }


def trace_term(rounds: int) -> dict[str, object]:
    """Seconds of both ways, and how far apart they are."""
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5
    one, two = (features_to_moments([torch.randn(3 * WIDTH, WIDTH, generator=generator).double() @ mix]) for _ in range(2))
    found: dict[str, float] = {}

    def own() -> None:
        found["own"] = moments_to_fid(one, two)

    def published() -> None:
        s1, s2 = one.covariance().numpy(), two.covariance().numpy()
        shift = (one.mean - two.mean).numpy()
        found["sqrtm"] = float(shift @ shift + np.trace(s1) + np.trace(s2) - 2 * np.trace(sqrtm(s1 @ s2).real))

    cached = Factor.of(two)
    seconds = interleaved({"own": own, "reference factored": lambda: moments_to_fid(one, cached), "sqrtm": published}, rounds)
    return {
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "ratio": round(seconds["own"] / seconds["sqrtm"], 3),
        "difference": abs(found["own"] - found["sqrtm"]),
    }


def peak_memory(folder: Path, count: int) -> float:
    """Peak resident memory in MiB of one process that measures `count` features from a memory map, pages of the map left out."""
    path = folder / f"{count}.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, WIDTH))
    generator = np.random.default_rng(0)
    for first in range(0, count, 1000):
        array[first : first + 1000] = generator.standard_normal((min(1000, count - first), WIDTH), dtype=np.float32)
    array.flush()
    code = f"from benchmarks.bench.fid import measured; print(measured({str(path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    path.unlink()
    return float(done.stdout.strip().splitlines()[-1])


def measured(path: str) -> float:
    """MiB of memory of its own (anonymous) at the peak: what a map holds is the kernel's to take back."""
    features = torch.from_numpy(np.load(path, mmap_mode="r+"))
    reference = features_to_moments(torch.split(features[:5000], 1000))
    features_to_fid(features, reference)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    mapped = int(status["RssFile"].split()[0])
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - mapped) / 1024, 1)


def measure(images: int, rounds: int, folder: Path) -> dict[str, object]:
    """Extraction against torch-fidelity's and pytorch-fid's own, the trace term against `sqrtm`, memory for two sizes."""
    return {
        "extraction": extraction(folder, images, rounds),
        "trace_term": trace_term(1),
        "peak_memory_mib": {str(count): peak_memory(folder, count) for count in (10_000, 50_000)},
    }
