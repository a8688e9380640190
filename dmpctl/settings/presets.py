"""Recipes: values that fill what no flag, variable or file gave."""

from typing import Any

# Ham et al. 2025, "Published recipe", with the balance of the published code (importance per sample, k = N soft).
DMP: dict[str, Any] = {
    "prompts": None,
    "position": "add",
    "prompt_depth": None,
    "gate": "soft",
    "gate_scale": 1.0,
    "gate_noise": True,
    "balance": "per-sample",
    "importance_weight": 1.0,
    "load_weight": 1.0,
    "prompt_lr": 1e-4,
    "gate_lr": 1e-3,
    "loss_weight": "constant",
    "iters": 50_000,
    "batch_size": 128,
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.0,
    "lr_schedule": "constant",
    "warmup": 0,
    "ema": 0.0,
    "hflip": True,
}

# For the bundled backbone: 8x8 digits on one core in minutes.
DIGITS: dict[str, Any] = {
    "iters": 4_000,
    "batch_size": 128,
    "prompt_lr": 1e-2,
    "gate_lr": 1e-3,
    "balance": "shazeer",
    "importance_weight": 0.01,
    "ema": 0.999,
    "hflip": False,
    "save_every": 500,
    "log_every": 50,
    "sampler": "ddim",
    "steps": 50,
}

PRESETS: dict[str, dict[str, Any]] = {"dmp": DMP, "digits": DIGITS}


def chosen_preset(preset: str, base: str) -> str | None:
    """The preset that `preset` stands for with the backbone `base`: auto is digits for the bundled one, else None."""
    if preset == "auto":
        return "digits" if base == "digits" else None
    return preset if preset in PRESETS else None
