"""Timings as JSON: `python -m benchmarks.bench [PART ...] [--shape DiT-S/2] [--batch 8] [--device cuda --precision bf16] ...`

Medians of actions that are taken in turn in one process, and their ratios. Parts, one file each; none named: all of them.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from benchmarks.bench import data, fid, sampling, startup, steps, trainer
from benchmarks.bench.case import Case


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="steps, sampling, trainer, startup, data, fid")
    parser.add_argument("--shape", default="DiT-S/2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--backbone-dtype", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--vae", action="store_true", help="steps: against a published step with its VAE encode, too")
    parser.add_argument("--count", type=int, default=8, help="trainer: training steps per round")
    parser.add_argument("--files", type=int, default=70_000, help="data: PNGs in the folder")
    parser.add_argument("--images", type=int, default=8, help="fid: images at once")
    args = parser.parse_args()
    rounds = args.rounds
    case = cache(lambda: Case(args.shape, args.batch, args.device, args.precision, args.compile, args.backbone_dtype))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts: dict[str, Callable[[], object]] = {
            "steps": lambda: steps.measure(case(), rounds, args.vae),
            "sampling": lambda: sampling.measure(case(), rounds),
            "trainer": lambda: trainer.measure(args.shape, args.batch, args.count, rounds, args.device, folder),
            "startup": lambda: startup.measure(rounds, folder),
            "data": lambda: data.measure(case(), args.files, rounds, folder),
            "fid": lambda: fid.measure(args.images, rounds, folder),
        }
        if unknown := set(args.parts) - set(parts):
            parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
        found = {part: parts[part]() for part in args.parts or parts}
    card = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    sys.stdout.write(json.dumps({**vars(args), "on": card, "torch": torch.__version__, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
