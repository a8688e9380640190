"""What data costs: a folder of images, and latents that were encoded before."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.bench.case import Case
from benchmarks.bench.timing import interleaved
from dmpctl.codecs.vae import Vae
from dmpctl.data.folder import FolderReader
from dmpctl.images.stored import StoredImages
from dmpctl.models.encode import build_latents
from dmpctl.sampling.pictures import write_pngs
from dmpctl.types import Silent
from tests.latent_helpers import tiny_vae
from tests.random_inception import random_images

BATCH = 128


def folder_of(path: Path, count: int, side: int) -> Path:
    """`count` PNGs; the first 1 000 are drawn, the others are links to them under names of their own."""
    path.mkdir()
    own = min(count, 1000)
    write_pngs(path, range(own), random_images(own, side, side))
    for number in range(own, count):
        (path / f"{number:06d}.png").hardlink_to(path / f"{number % own:06d}.png")
    return path


def indexed(path: str) -> dict[str, float]:
    """In a process of its own: seconds, and MiB above what the imports take."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    count = len(StoredImages(FolderReader(path)))
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"files": count, "seconds": round(seconds, 2), "peak_mib": round(peak / 1024, 1)}


def index(folder: Path, count: int) -> dict[str, float]:
    path = folder_of(folder / "many", count, 64)
    code = f"import json; from benchmarks.bench.data import indexed; print(json.dumps(indexed({str(path)!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def latents(folder: Path, rounds: int, case: Case) -> dict[str, float]:
    source = StoredImages(FolderReader(folder_of(folder / "few", 512, 64)))
    codec = Vae(tiny_vae(folder / "vae"), "tiny")
    began = time.perf_counter()
    cache = build_latents(source, codec, folder / "cache", Silent())
    build = 2 * len(source) / (time.perf_counter() - began)  # images and mirrors
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(source), (BATCH,), generator=generator)
    mirrored = torch.rand(BATCH, generator=generator) < 0.5
    plain = StoredImages(FolderReader(folder / "few"))
    plain._held = None  # as a folder too large to be held in memory
    seconds = interleaved(
        {
            "gather": lambda: cache.gather(rows, mirrored),
            "decode": lambda: [plain.item(int(row)) for row in rows],
            "step": case.frozen_step,
        },
        rounds,
    )
    return {
        "cache_build_images_per_second": round(build, 1),
        "gather_seconds": round(seconds["gather"], 6),
        "gathered_samples_per_second": round(BATCH / seconds["gather"]),
        "decoded_samples_per_second": round(BATCH / seconds["decode"]),
        "gather_against_decode": round(seconds["decode"] / seconds["gather"], 1),
        "gather share of a step": seconds["gather"] / (seconds["step"] * BATCH / len(case.x0)),
    }


def measure(case: Case, files: int, rounds: int, folder: Path) -> dict[str, object]:
    """Seconds and memory to read the headers of so many PNGs; gathering a batch of latents against decoding as many PNGs."""
    return {"index": index(folder, files), "latents": latents(folder, rounds, case)}
