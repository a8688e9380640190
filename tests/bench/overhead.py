"""What dmpctl adds to a bare loop: `python -m tests.bench.overhead [--shape DiT-S/2] [--batch 8] [--device cuda] ...`, JSON.

- In one process, taken in turn: the arithmetic alone (forward, backward, AdamW of the patch, on noise that is at hand), and the
  whole trainer with order, noise, guards, average, log lines and a checkpoint per round: medians of seconds per step (of CPU
  time on a CPU).
- Seconds that training waits for a checkpoint (a copy in memory), against those that writing it takes.
- Whole processes: `dmpctl patch` of one step as it is, and through the launcher with two processes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from dmpctl.backbones.dit import DiT, DiTConfig, shape_config
from dmpctl.backbones.dit_weights import digest_of
from dmpctl.codecs.identity import Identity
from dmpctl.engine import patch
from dmpctl.engine.backbone import Loaded, freeze
from dmpctl.engine.launch import accelerator_for
from dmpctl.engine.rundir import RunDir
from dmpctl.engine.saver import Saver
from dmpctl.engine.train import Trainer
from dmpctl.types import Silent
from tests.bench.__main__ import interleaved
from tests.helpers import environment, settings_for

SIDE, COUNT = 32, 512


class Noise:
    """Random images in memory, as a source."""

    name, num_classes, mirror, fingerprint = "noise", 0, False, "0" * 64

    def __init__(self) -> None:
        self._images = torch.randint(256, (COUNT, 3, SIDE, SIDE), dtype=torch.uint8)

    def __len__(self) -> int:
        return COUNT

    def images(self) -> Tensor:
        return self._images

    def labels(self) -> Tensor:
        return torch.zeros(COUNT, dtype=torch.int64)

    def item(self, index: int) -> tuple[Tensor, int]:
        return self._images[index], 0


def backbone_of(shape: str) -> Loaded:
    """A fresh backbone of a published shape on 32x32 colour pixels."""
    config = shape_config(shape)
    if config is None:
        raise SystemExit(f"{shape} is no shape")
    model = DiT(DiTConfig(**{**vars(config), "input_size": SIDE, "channels": 3}))
    model.initialise(torch.Generator().manual_seed(0))
    return Loaded(freeze(model), digest_of(model.state_dict()), shape, None)


def steps(shape: str, batch: int, count: int, rounds: int, device: str, folder: Path) -> dict[str, float]:
    """Seconds per step of the bare loop and of the trainer, and what a checkpoint costs."""
    given = {"run": folder / "run", "batch_size": batch, "save_every": count, "log_every": 1, "ema": 0.99, "device": device}
    settings = settings_for("patch", **given)
    loaded, source = backbone_of(shape), Noise()
    loaded.model.to(device)
    session = patch.session_of(settings, loaded, Identity(), source)
    run = RunDir(folder / "run")
    run.path.mkdir()
    trainer = Trainer(session.subject, loaded.spec, Identity(), source, settings, run, accelerator_for(settings))
    held = trainer._noised(source.images()[:batch], source.labels()[:batch])
    optimizer = torch.optim.AdamW(session.subject.module.param_groups())

    def bare() -> None:
        for _ in range(count):
            prediction, routing = session.subject.predict(session.subject.module, held.x_t, held.t, None, held.gate_noise)
            loss = trainer.objective(prediction, held.x0, held.x_t, held.t, held.noise).loss.mean()
            sum(session.subject.penalty(routing).values(), loss).backward()
            optimizer.step()
            optimizer.zero_grad()

    def whole() -> None:
        train = trainer.settings.train.model_copy(update={"iters": trainer.step + count})
        trainer.settings = trainer.settings.model_copy(update={"train": train})
        trainer.train(Silent(), "")

    clock = time.perf_counter if device == "cuda" else time.process_time  # of the CPU: other programs may share it
    seconds = interleaved({"bare": bare, "trainer": whole}, rounds, device, clock)
    state, waits, writes = trainer._state(), [], []
    for _ in range(max(rounds, 5)):
        with Saver(folder / "saves", "patch", 2) as saver:
            began = time.perf_counter()
            saver.save(state, {}, session.subject.described)
            waits.append(time.perf_counter() - began)
            saver.finish()
            writes.append(time.perf_counter() - began)
    return {
        "bare_step": seconds["bare"] / count,
        "trainer_step": seconds["trainer"] / count,
        "trainer_over_bare": seconds["trainer"] / seconds["bare"],
        "checkpoint_waits": median(waits),
        "checkpoint_writes": median(writes),
        "wait_over_step": median(waits) / (seconds["bare"] / count),
    }


def commands(rounds: int, folder: Path) -> dict[str, float]:
    """Whole commands of one step: this process, and two started by the launcher."""
    times: dict[str, list[float]] = {"one_process": [], "launched_two": []}
    for number in range(rounds):
        for name, more in (("one_process", ()), ("launched_two", ("--num-processes", "2"))):
            run = str(folder / f"{name}{number}")
            line = ["patch", "--run", run, "--iters", "1", "--batch-size", "8", "--no-evaluate", "--cpu", *more]
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "dmpctl", *line], check=True, env=environment(), capture_output=True)
            times[name].append(time.perf_counter() - began)
    found = {name: median(values) for name, values in times.items()}
    return {**found, "launched_over_one": found["launched_two"] / found["one_process"]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.overhead", description=__doc__)
    parser.add_argument("--shape", default="DiT-S/2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = {
            **vars(args),
            "threads": torch.get_num_threads(),
            **steps(args.shape, args.batch, args.steps, args.rounds, args.device, Path(name)),
            **commands(args.rounds, Path(name)),
        }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
