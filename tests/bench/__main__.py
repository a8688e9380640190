"""Timings as JSON: medians of actions that are taken in turn in one process, and their ratios.

`python -m tests.bench [--shape DiT-S/2] [--batch 8] [--rounds 5] [--device cpu|cuda] [--precision no|bf16] [--compile] [--vae]`

- a step of DMP on a frozen backbone, of full fine-tuning, of the published code (tests/bench/published.py), each over a forward;
  the arithmetic's floor is 2 for a frozen step (a forward and an input gradient) and 3 for the others;
- gate and prompts alone, over a step;
- activations that a step keeps for its backward pass, and the GPU's peak memory;
- the dearest operations of a frozen step, as shares of it;
- one sampling step of a patched and of an unpatched backbone;
- `dmpctl --help` as a whole process.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dmpctl.backbones.dit import DiT, shape_config
from dmpctl.backbones.dit_weights import digest_of
from dmpctl.diffusion.objective import HybridObjective
from dmpctl.diffusion.schedule import NoiseSchedule
from dmpctl.engine.backbone import Loaded, freeze
from dmpctl.engine.build import build_patch
from dmpctl.engine.generate import denoiser_of
from dmpctl.engine.patched import Patched, predict_patched
from dmpctl.engine.speed import frozen_weights, to_bf16
from dmpctl.settings.methods import Dmp
from dmpctl.settings.sections import Sampling
from dmpctl.settings.training import Objective
from tests.bench.published import PublishedPatch, published_forward


def interleaved(
    actions: dict[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each action, taken in turn so that a drift of the machine hits all alike; two warm-ups each."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 2):
        for name, action in actions.items():
            finish(device)
            start = clock()
            action()
            finish(device)
            if number > 1:
                times[name].append(clock() - start)
    return {name: median(values) for name, values in times.items()}


def finish(device: str) -> None:
    """Wait until the device has done all that it was asked to."""
    if device == "cuda":
        torch.cuda.synchronize()


class Case:
    """One model and one batch, and the actions that are timed."""

    def __init__(self, name: str, batch: int, device: str = "cpu", precision: str = "no", compiled: bool = False) -> None:
        config = shape_config(name)
        if config is None:
            raise SystemExit(f"{name} is no shape")
        generator = torch.Generator().manual_seed(0)
        self.device, self.precision = device, precision
        self.backbone = DiT(config)
        self.backbone.initialise(generator)
        self.trained = DiT(config)  # as it is, or it would be compiled twice
        self.trained.load_state_dict(self.backbone.state_dict())
        spec = self.backbone.spec
        self.patch = build_patch(self.backbone, Dmp()).to(device)
        self.published = PublishedPatch(self.backbone).to(device)
        self.loaded = Loaded(freeze(self.backbone).to(device), digest_of(self.backbone.state_dict()), name, None)
        self.trained.to(device)
        if precision == "bf16":  # as under --backbone-dtype bf16
            to_bf16(self.backbone, frozen_weights(self.backbone))
        if compiled:
            for block in (*self.backbone.blocks, *self.trained.blocks):
                block.compile(fullgraph=True)
        self.schedule = NoiseSchedule.from_spec(spec.schedule).to(device)
        self.objective = HybridObjective(self.schedule, spec.learned_sigma, Objective())
        self.x0 = torch.randn(batch, *spec.latent_shape, generator=generator).to(device)
        self.noise = torch.randn(self.x0.shape, generator=generator).to(device)
        self.t = torch.randint(spec.schedule.steps, (batch,), generator=generator).to(device)
        self.x_t = self.schedule.add_noise(self.x0, self.t, self.noise)
        self.gate_noise = torch.randn(batch, *(self.patch.noise_shape() or ()), generator=generator).to(device)
        self.frozen = torch.optim.AdamW(self.patch.param_groups())
        self.full = torch.optim.AdamW(self.trained.parameters(), 1e-4)
        self.prompts = torch.optim.AdamW(self.published.parameters(), 1e-4)
        sampling = Sampling(sampler="ddim", steps=50)
        place = torch.device(device)
        self.denoisers = {
            name: denoiser_of(Patched(self.loaded, patch, {}), range(batch), sampling, place)
            for name, patch in (("patched", self.patch), ("unpatched", None))
        }

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")

    @torch.no_grad()
    def forward(self) -> Tensor:
        with self.autocast():
            return self.backbone.denoise(self.x_t, self.t, None)

    def loss(self, prediction: Tensor) -> Tensor:
        return self.objective(prediction.float(), self.x0, self.x_t, self.t, self.noise).loss.mean()

    def frozen_step(self) -> None:
        with self.autocast():
            prediction, routing = predict_patched(self.backbone, False, self.patch, self.x_t, self.t, None, self.gate_noise)
        sum(self.patch.penalty(routing).values(), self.loss(prediction)).backward()
        self.frozen.step()
        self.frozen.zero_grad()

    def gates_and_prompts(self) -> None:
        """All that a patch adds to a step, forward and backward, without a block; the gradient that comes back is at hand."""
        plan = self.patch(self.c, self.gate_noise)
        edited = [plan.edit(site, self.tokens) for site in range(len(self.backbone.spec.sites))]
        penalty = sum(self.patch.penalty(plan.routing).values())
        torch.autograd.backward([*edited, penalty], [self.tokens] * len(edited) + [torch.ones_like(penalty)])
        self.frozen.zero_grad()

    def full_step(self) -> None:
        with self.autocast():
            prediction = self.trained.denoise(self.x_t, self.t, None)
        self.loss(prediction).backward()
        self.full.step()
        self.full.zero_grad()

    def published_step(self) -> None:
        with self.autocast():
            prediction, importance = published_forward(self.trained, self.published, self.x_t, self.t)
        (self.loss(prediction) + importance).backward()
        self.prompts.step()
        self.prompts.zero_grad()
        self.trained.zero_grad()

    @torch.inference_mode()
    def sampling_step(self, which: str) -> None:
        with self.autocast():
            self.denoisers[which](self.x_t, torch.full_like(self.t, 500))

    def measure(self, rounds: int) -> dict[str, Any]:
        """Seconds of all actions, ratios and memory."""
        with torch.no_grad(), self.autocast():
            self.c = self.backbone.embed(self.t, None).float()
            self.tokens = self.backbone.x_embedder(self.x_t) + self.backbone.pos_embed
        steps: dict[str, Callable[[], object]] = {
            "forward": self.forward,
            "frozen_step": self.frozen_step,
            "full_step": self.full_step,
            "published_step": self.published_step,
            "gates_and_prompts": self.gates_and_prompts,
            "sampling_unpatched": lambda: self.sampling_step("unpatched"),
            "sampling_patched": lambda: self.sampling_step("patched"),
        }
        held = [*self.backbone.parameters(), *self.trained.parameters(), *self.patch.parameters(), *self.published.parameters()]
        memory = {n: saved_bytes(steps[n], held) / 2**20 for n in ("frozen_step", "full_step", "published_step")}
        seconds = interleaved(steps, rounds, self.device)
        ratios = {
            "frozen_step / forward": seconds["frozen_step"] / seconds["forward"],
            "full_step / forward": seconds["full_step"] / seconds["forward"],
            "frozen_step / published_step": seconds["frozen_step"] / seconds["published_step"],
            "gates_and_prompts / frozen_step": seconds["gates_and_prompts"] / seconds["frozen_step"],
            "sampling patched / unpatched": seconds["sampling_patched"] / seconds["sampling_unpatched"],
            "saved frozen / published": memory["frozen_step"] / memory["published_step"],
        }
        costs = top_costs(self.frozen_step, self.device)
        found: dict[str, Any] = {"seconds": seconds, "ratios": ratios, "saved_mib": memory, "frozen_step_costs": costs}
        if self.device == "cuda":
            found["peak_mib"] = {name: self.peak(steps[name]) for name in ("frozen_step", "full_step", "published_step")}
        return found

    def peak(self, action: Callable[[], object]) -> float:
        """MiB above what lies on the GPU before."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        finish(self.device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def top_costs(action: Callable[[], object], device: str, count: int = 8) -> dict[str, float]:
    """Share of a step that its dearest operations take by themselves, by torch's profiler."""
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else [])]
    with torch.profiler.profile(activities=kinds) as profile:
        action()
        finish(device)
    times = {
        event.key: float(event.self_device_time_total if device == "cuda" else event.self_cpu_time_total)
        for event in profile.key_averages()
    }
    total = sum(times.values())
    return {name: round(times[name] / total, 4) for name in sorted(times, key=lambda name: -times[name])[:count]}


def vae_seconds(batch: int, rounds: int, device: str, precision: str) -> float:
    """Seconds that Stable Diffusion's VAE (random weights) takes to encode 256x256 images, as the published step does."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = (
        AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **blocks).to(device).eval()
    )
    images = torch.rand(batch, 3, 256, 256, device=device)

    @torch.no_grad()
    def encode() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            vae.encode(images)

    return interleaved({"encode": encode}, rounds, device)["encode"]


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
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--vae", action="store_true")
    args = parser.parse_args()
    card = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    found = Case(args.shape, args.batch, args.device, args.precision, args.compile).measure(args.rounds)
    if args.vae:
        seconds = vae_seconds(args.batch, args.rounds, args.device, args.precision)
        step = found["seconds"]
        ratio = step["frozen_step"] / (step["published_step"] + seconds)
        found |= {"vae_seconds": seconds, "frozen_step / published_step with VAE": ratio}
    result = {**vars(args), "on": card, "torch": torch.__version__, **found, "help_seconds": help_seconds(args.rounds)}
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
