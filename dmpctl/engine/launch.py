"""How a command runs: on which device, through accelerate, and what makes two runs the same experiment."""

import os
import shlex
import sys
from typing import Any

import torch
from accelerate import Accelerator

from dmpctl.engine.build import resolve_device
from dmpctl.errors import UsageError
from dmpctl.settings.model import Settings


def accelerator_for(settings: Settings) -> Accelerator:
    """The accelerator that training goes through, even on one CPU; UsageError for more than one process, or fp16 there."""
    world = settings.launch.num_processes or int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        raise UsageError(f"{world} processes were asked for, this version trains in one", "leave --num-processes out")
    device = resolve_device(settings.launch)
    if settings.train.precision == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU, this is a CPU", "use --precision bf16, or no")
    if settings.launch.deterministic:
        torch.use_deterministic_algorithms(True)
    return Accelerator(cpu=device.type == "cpu", mixed_precision=settings.train.precision)


def again_command() -> str:
    """The command line that was typed, to be typed again."""
    return shlex.join(["dmpctl", *sys.argv[1:]])


def science_of(settings: Settings) -> dict[str, Any]:
    """Flat values that make a run this experiment: a change of one of them is refused on resume.

    More iterations at a constant rate are the same experiment taken further, so --iters counts only under a decay.
    """
    found = settings.science()
    if settings.train.lr_schedule == "constant":
        found.pop("iters", None)
    return found
