"""Timings as JSON, medians and ratios from one process: `python -m tests.bench [--rounds N] [--batch B]`.

- frozen step over forward, DiT-S/2 on 32x32x4 latents (the arithmetic's floor is 2: a forward and an input gradient);
- the same for a step that trains the whole backbone, for scale;
- activations that a frozen step and a full step keep for their backward pass;
- `dmpctl --help`, as a whole process.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from statistics import median

import torch
from torch import Tensor

from dmpctl.backbones.dit import DiT, shape_config
from dmpctl.diffusion.objective import HybridObjective
from dmpctl.diffusion.schedule import NoiseSchedule
from dmpctl.engine.build import build_patch, freeze
from dmpctl.engine.patched import predict_patched
from dmpctl.settings.methods import Dmp
from dmpctl.settings.sections import Objective


def interleaved(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each action, taken in turn so that a drift of the machine hits all alike; one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


class Case:
    """One model and one batch, and the actions that are timed."""

    def __init__(self, name: str, batch: int) -> None:
        config = shape_config(name)
        if config is None:
            raise SystemExit(f"{name} is no shape")
        generator = torch.Generator().manual_seed(0)
        self.backbone = DiT(config)
        self.backbone.initialise(generator)
        spec = self.backbone.spec
        self.patch = build_patch(self.backbone, Dmp())
        self.schedule = NoiseSchedule.from_spec(spec.schedule)
        self.objective = HybridObjective(self.schedule, spec.learned_sigma, Objective())
        self.x0 = torch.randn(batch, *spec.latent_shape, generator=generator)
        self.noise = torch.randn(self.x0.shape, generator=generator)
        self.t = torch.randint(spec.schedule.steps, (batch,), generator=generator)
        self.x_t = self.schedule.add_noise(self.x0, self.t, self.noise)
        self.gate_noise = torch.randn(batch, *(self.patch.noise_shape() or ()), generator=generator)
        self.frozen = torch.optim.AdamW(self.patch.param_groups())
        self.full = torch.optim.AdamW(self.backbone.parameters(), 1e-4)

    @torch.no_grad()
    def forward(self) -> Tensor:
        return freeze(self.backbone).denoise(self.x_t, self.t, None)

    def frozen_step(self) -> None:
        freeze(self.backbone)
        prediction, routing = predict_patched(self.backbone, False, self.patch, self.x_t, self.t, None, self.gate_noise)
        loss = self.objective(prediction, self.x0, self.x_t, self.t, self.noise).loss.mean()
        sum(self.patch.penalty(routing).values(), loss).backward()
        self.frozen.step()
        self.frozen.zero_grad()

    def full_step(self) -> None:
        self.backbone.requires_grad_(True)
        prediction = self.backbone.denoise(self.x_t, self.t, None)
        self.objective(prediction, self.x0, self.x_t, self.t, self.noise).loss.mean().backward()
        self.full.step()
        self.full.zero_grad()


def saved_bytes(action: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Bytes of activations that autograd keeps for one step, each storage counted once and the weights left out."""
    held = {weight.untyped_storage().data_ptr() for weight in weights}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        action()
    return sum(seen.values())


def help_seconds(rounds: int) -> float:
    """Median wall seconds of `dmpctl --help` as a whole process."""
    command = [sys.executable, "-m", "dmpctl", "--help"]
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--shape", default="DiT-S/2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    case = Case(args.shape, args.batch)
    weights = sum(p.numel() * p.element_size() for p in case.backbone.parameters())
    held = [*case.backbone.parameters(), *case.patch.parameters()]
    memory = {"frozen_step": saved_bytes(case.frozen_step, held), "full_step": saved_bytes(case.full_step, held)}
    seconds = interleaved({"forward": case.forward, "frozen_step": case.frozen_step, "full_step": case.full_step}, args.rounds)
    result = {
        "shape": args.shape,
        "batch": args.batch,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "frozen_step_over_forward": seconds["frozen_step"] / seconds["forward"],
        "full_step_over_forward": seconds["full_step"] / seconds["forward"],
        "saved_mib": {name: size / 2**20 for name, size in memory.items()},
        "weights_mib": weights / 2**20,
        "help_seconds": help_seconds(args.rounds),
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
