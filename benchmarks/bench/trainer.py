"""What dmpctl adds to a bare loop: order, noise, guards, average, log lines, checkpoints."""

import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench.timing import interleaved
from dmpctl.backbones.dit import DiT, DiTConfig, shape_config
from dmpctl.backbones.dit_weights import digest_of
from dmpctl.codecs.identity import Identity
from dmpctl.models.backbone import Loaded, freeze
from dmpctl.runs.checkpoint import Saver
from dmpctl.runs.rundir import RunDir
from dmpctl.training import patch
from dmpctl.training.trainer import Trainer
from tests.helpers import settings_for, trainer_of

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


class Timed(Trainer):
    """Notes how long it logs."""

    logging = 0.0

    def _log(self, *given: Any) -> None:
        began = time.perf_counter()
        super()._log(*given)
        self.logging += time.perf_counter() - began


def measure(shape: str, batch: int, count: int, rounds: int, device: str, folder: Path) -> dict[str, Any]:
    """`count` steps of the arithmetic alone (on noise that is at hand) and of the whole trainer, in turn, 32x32 pixels.

    Of the trainer, the share of time that it waits for data and that it writes a log line in every step; what a checkpoint
    takes in the background and for how long training waits for it.
    """
    given = {"run": folder / "run", "batch_size": batch, "save_every": count, "log_every": 1, "ema": 0.99, "device": device}
    settings = settings_for("patch", **given)
    loaded, source = backbone_of(shape), Noise()
    loaded.model.to(device)
    session = patch.session_of(settings, loaded, Identity(), source)
    run = RunDir(folder / "run")
    run.path.mkdir()
    trainer = trainer_of(session, settings, run, Timed)
    held = trainer._noised(trainer.inputs.drawn(0, source.images()[:batch], source.labels()[:batch]))
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
        trainer.train()

    seconds = interleaved({"bare": bare, "trainer": whole}, rounds, device)
    lines = run.metrics.lines()
    state, waits, writes = trainer._state(), [], []
    for _ in range(max(rounds, 5)):
        with Saver(folder / "saves", "patch", 2) as saver:
            began = time.perf_counter()
            saver.save(state, {}, session.subject.described)
            waits.append(time.perf_counter() - began)
            saver.finish()
            writes.append(time.perf_counter() - began)
    step = seconds["trainer"] / count
    return {
        "seconds": {
            "bare step": seconds["bare"] / count,
            "trainer step": step,
            "checkpoint waits": median(waits),
            "checkpoint writes": median(writes),
        },
        "trainer / bare": seconds["trainer"] / seconds["bare"],
        "data wait share": mean(line["data_wait"] for line in lines),
        "log share": trainer.logging / sum(1 / line["steps_per_sec"] for line in lines),
        "checkpoint share at --save-every 5000": median(waits) / (5000 * step),
    }
