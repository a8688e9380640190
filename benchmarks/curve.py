"""How a backbone of the digits converged: `python -m benchmarks.curve RUN OUT.json [--every N]`.

For the checkpoints of a `dmpctl pretrain` run: Fréchet distance of 5 000 images on the same sampling seeds, in pixels and
in the digit classifier's features, and the denoising loss. Writes OUT.json and OUT.png. What is done is kept.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.miniature import CPU, EXTRACTORS, sampled
from dmpctl.backbones.dit import DiTConfig
from dmpctl.backbones.dit_weights import Weights, digest_of, dit_from
from dmpctl.comparing.paired_loss import epsilon_errors
from dmpctl.data.bundled import Digits
from dmpctl.files import read_json, read_tensors, write_json
from dmpctl.images.stored import images_of
from dmpctl.measuring.features import extract
from dmpctl.metrics.frechet import Factor, features_to_fid
from dmpctl.metrics.moments import features_to_moments
from dmpctl.models.backbone import Loaded, freeze
from dmpctl.models.patched import Patched
from dmpctl.runs.checkpoint import complete, step_of
from dmpctl.types import ScheduleSpec, Silent


def backbone_at(checkpoint: Path) -> Patched:
    """The averaged backbone of one checkpoint."""
    about = read_json(checkpoint / "backbone.json")
    tensors, _ = read_tensors(checkpoint / "backbone.safetensors")
    weights = Weights(tensors, "a checkpoint", DiTConfig(**about["config"]), ScheduleSpec(**about["schedule"]))
    model = freeze(dit_from(weights))
    return Patched(Loaded(model, digest_of(tensors), str(checkpoint), "digits"))


def distances(model: Patched, reference: dict[str, Factor], count: int, seed: int) -> dict[str, float]:
    """Fréchet distance in each feature space."""
    images = sampled(model, count, seed)
    return {e.name: features_to_fid(extract(e, torch.split(images, 512)), reference[e.name]).value for e in EXTRACTORS}


def flatness(points: list[dict[str, Any]], name: str, noise: float) -> dict[str, float]:
    """First and second half of the last third: means, and their difference in units of the noise of one point."""
    last = [p[name] for p in points[-max(2, len(points) // 3) :]]
    early, late = mean(last[: len(last) // 2]), mean(last[len(last) // 2 :])
    return {"first_half": early, "second_half": late, "change": late - early, "noise_sd": noise, "points": len(last)}


def plot(path: Path, points: list[dict[str, Any]]) -> None:
    """One panel per measure against iterations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [*(e.name for e in EXTRACTORS), "loss"]
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, name in zip(figure.subplots(1, len(names)), names, strict=True):
        axis.plot([p["step"] for p in points], [p[name] for p in points], marker=".")
        axis.set(xlabel="iterations", title=name if name == "loss" else f"Fréchet distance, {name}", yscale="log")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curve", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--every", type=int, default=5_000)
    parser.add_argument("--images", type=int, default=5_000)
    args = parser.parse_args()
    source = Digits()
    reference = {e.name: Factor.of(features_to_moments([extract(e, images_of(source))])) for e in EXTRACTORS}
    before = read_json(args.out)["points"] if args.out.is_file() else []
    points: dict[int, dict[str, Any]] = {p["step"]: p for p in before}
    found = [c for c in complete(args.run / "checkpoints") if step_of(c) % args.every == 0]
    for checkpoint in found:
        step = step_of(checkpoint)
        if step in points:
            continue
        model = backbone_at(checkpoint)
        loss = float(epsilon_errors(model, source, CPU, 0, Silent())[0].mean())
        points[step] = {"step": step, "loss": loss, **distances(model, reference, args.images, 0)}
        sys.stderr.write(json.dumps(points[step]) + "\n")
        write_json(args.out, {"schema_version": 1, "images": args.images, "points": [points[s] for s in sorted(points)]})
    ordered = [points[s] for s in sorted(points)]
    others = [distances(backbone_at(found[-1]), reference, args.images, seed) for seed in (1, 2, 3, 4)]
    noise = {e.name: stdev(o[e.name] for o in others) for e in EXTRACTORS}
    flat = {name: flatness(ordered, name, sd) for name, sd in noise.items()}
    write_json(args.out, {"schema_version": 1, "images": args.images, "points": ordered, "noise_sd": noise, "last_third": flat})
    plot(args.out.with_suffix(".png"), ordered)


if __name__ == "__main__":
    main()
