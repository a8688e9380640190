"""Weights of a small DiT, random, and files that hold them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.backbones.dit_weights import dit_metadata
from dmpctl.files import write_tensors
from dmpctl.types import ScheduleSpec

CONFIG = DiTConfig(4, 1, 2, 8, 2, 2, 3)
HEADS = 2
Tensors = dict[str, Tensor]


def random_state(config: DiTConfig = CONFIG, seed: int = 0) -> Tensors:
    """A state dict with random weights and the right position table."""
    model, draw = DiT(config), torch.Generator().manual_seed(seed)
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, generator=draw)
    return model.state_dict()


def save_dit(path: Path, tensors: Tensors, config: DiTConfig, schedule: ScheduleSpec, data: str | None) -> str:
    """Write a backbone that describes itself; returns the file's sha256."""
    return write_tensors(path, tensors, dit_metadata(config, schedule, data))


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def saved(path: Path, value: Any, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path
