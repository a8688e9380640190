"""The device that a command computes on."""

import torch

from dmpctl.errors import UsageError
from dmpctl.settings.sections import Launch


def resolve_device(launch: Launch) -> torch.device:
    """The device to use; UsageError where it is not there."""
    if launch.cpu or launch.device == "cpu":
        return torch.device("cpu")
    if launch.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(launch.device)
    there = torch.cuda.device_count() if device.type == "cuda" else int(torch.backends.mps.is_available())
    if there <= (device.index or 0):
        raise UsageError(f"--device {launch.device} is not there ({there} found)", "use --device cpu")
    return device
