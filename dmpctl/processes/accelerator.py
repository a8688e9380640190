"""The accelerator that training goes through, and the precision that it computes in."""

import os

import torch
from accelerate import Accelerator

from dmpctl.errors import UsageError
from dmpctl.processes.ranks import join
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Launch


def accelerator_for(settings: Settings) -> Accelerator:
    """The accelerator that training goes through, even on one CPU: in all processes of this command at once.

    UsageError for fp16 on a CPU, and where accelerate does not see the processes that were started.
    """
    ranks = join(settings.launch)
    if settings.train.precision == "fp16" and ranks.device.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU, this is a CPU", "use --precision bf16, or no")
    allow_tf32(settings.launch)
    if settings.launch.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    accelerator = Accelerator(cpu=ranks.device.type == "cpu", mixed_precision=settings.train.precision)
    if accelerator.num_processes != ranks.world:  # two worlds of one would both write
        raise UsageError(f"{ranks.world} processes were started, accelerate sees {accelerator.num_processes}", "add --cpu")
    return accelerator


def allow_tf32(launch: Launch) -> None:
    """TF32 in matrix products and convolutions of float32 on a GPU, or not at all."""
    wanted = launch.tf32 and not launch.deterministic
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    torch.backends.cudnn.allow_tf32 = wanted
