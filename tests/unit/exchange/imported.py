"""Checkpoints as other people publish them, of the golden weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.exchange.importer import import_file
from dmpctl.files import read_tensors
from dmpctl.types import Report, Silent
from tests.helpers import settings_for

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = ("uncond-soft", "class-topk")
Tensors = dict[str, Tensor]


def golden_state(name: str) -> tuple[Tensors, dict[str, Any]]:
    """The golden weights of a case, backbone and patch, and the config they were made with."""
    tensors, metadata = read_tensors(GOLDEN / f"{name}.weights.safetensors")
    return tensors, json.loads(metadata["config"])


def published(about: Mapping[str, Any]) -> dict[str, Any]:
    """A config in the words of the published code, for a golden case."""
    patch = {"num_tokens": about["num_prompts"], "topk": about["topk"], "type": "add", "pt_depth": about["prompt_depth"]}
    return {
        "general": {"schedule_name": "cosine", "image_size": 64, "topk": 0.25, "lr": 1e-4, "wrong": None},
        "models": {"name": "DiT-B/2", "param": {"num_classes": about["num_classes"], "num_heads": 4}, "vp": patch},
    }


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def imported(path: Path, run: Path, **given: Any) -> Report:
    return import_file(settings_for("import", import_run=run, **given), path, Silent())


def optimizer_state(state: Tensors) -> dict[str, Any]:
    """What torch's AdamW saves, after a step on some of these tensors."""
    parameters = [torch.nn.Parameter(state[name].clone()) for name in sorted(state)[:2]]
    optimizer = torch.optim.AdamW(parameters)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    return optimizer.state_dict()


def small(seed: int, config: DiTConfig) -> Tensors:
    model = DiT(config)
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, generator=torch.Generator().manual_seed(seed))
    return model.state_dict()
