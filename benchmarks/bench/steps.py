"""A training step, what it is made of, and the same step as others take it."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.bench.case import Case
from benchmarks.bench.timing import interleaved, peak_mib, saved_bytes, top_costs

STEPS = ("frozen_step", "full_step", "published_step")


def measure(case: Case, rounds: int, vae: bool) -> dict[str, Any]:
    """Seconds of a forward pass and of three kinds of step, as ratios; MiB that a step keeps; where its time goes.

    The arithmetic's floor is 2 forward passes for a frozen step (one, and the gradient of its inputs) and 3 for the others.
    """
    actions: dict[str, Callable[[], object]] = {
        "forward": case.forward,
        "frozen_step": case.frozen_step,
        "full_step": case.full_step,
        "published_step": case.published_step,
        "gates_and_prompts": case.gates_and_prompts,
    }
    models = (case.backbone, case.trained, case.patch, case.published)
    held = [parameter for model in models for parameter in model.parameters()]
    memory = {name: saved_bytes(actions[name], held) / 2**20 for name in STEPS}
    if vae:
        actions["vae_encode"] = vae_encode(case)
    seconds = interleaved(actions, rounds, case.device)
    step = seconds["frozen_step"]
    ratios = {
        "frozen_step / forward": step / seconds["forward"],
        "full_step / forward": seconds["full_step"] / seconds["forward"],
        "frozen_step / published_step": step / seconds["published_step"],
        "gates_and_prompts / frozen_step": seconds["gates_and_prompts"] / step,
        "saved frozen / published": memory["frozen_step"] / memory["published_step"],
    }
    if vae:
        ratios["frozen_step / published_step with VAE"] = step / (seconds["published_step"] + seconds["vae_encode"])
    found: dict[str, Any] = {"seconds": seconds, "ratios": ratios, "saved_mib": memory}
    if case.device == "cuda":
        found["peak_mib"] = {name: peak_mib(actions[name], case.device) for name in STEPS}
    return found | {"frozen_step_costs": top_costs(case.frozen_step, case.device)}


def vae_encode(case: Case) -> Callable[[], object]:
    """Stable Diffusion's VAE (random weights) on as many 256x256 images as the batch has: part of every published step."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **blocks)
    vae.to(case.device).eval()
    images = torch.rand(len(case.x0), 3, 256, 256, device=case.device)

    @torch.no_grad()
    def encode() -> None:
        with case.autocast():
            vae.encode(images)

    return encode
