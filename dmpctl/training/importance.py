"""The density of timesteps that a run trains on (`--timestep-sampling importance`), measured once and kept in the run."""

from collections.abc import Callable, Mapping

import torch

from dmpctl.diffusion.timesteps import TimestepDensity
from dmpctl.errors import UsageError
from dmpctl.files import read_json, write_json
from dmpctl.processes.command import Command
from dmpctl.runs.rundir import RunDir
from dmpctl.types import Progress

SCHEMA_VERSION = 1
Profile = Callable[[torch.device, Progress], Mapping[int, float]]  # error of a frozen backbone at some timesteps
NAME = "timesteps.json"  # in the run directory


def timestep_density(run: RunDir, profile: Profile | None, steps: int, command: Command) -> TimestepDensity | None:
    """None for uniform timesteps; else the density over `steps` that `profile` gave when the run was begun.

    UsageError where there is no frozen backbone to ask.
    """
    if command.settings.objective.timestep_sampling == "uniform":
        return None
    if profile is None:
        raise UsageError(
            "--timestep-sampling importance asks a frozen backbone where its error is, and pretraining has none",
            "leave it out, or patch a trained backbone",
        )
    path = run.path / NAME
    if command.ranks.is_main and not path.is_file():
        errors = profile(command.device, command.progress)
        write_json(path, {"schema_version": SCHEMA_VERSION, "errors": {str(t): error for t, error in errors.items()}})
    command.ranks.wait()
    errors = {int(t): float(error) for t, error in read_json(path, SCHEMA_VERSION)["errors"].items()}
    return TimestepDensity.from_errors(errors, steps)
