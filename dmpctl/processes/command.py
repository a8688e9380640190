"""A command at work: its settings, its progress and its processes, which travel together through all that it calls."""

import shlex
import sys
from dataclasses import dataclass, replace
from typing import Self

import torch

from dmpctl.processes.ranks import Ranks, join, resolve_device
from dmpctl.settings.model import Settings
from dmpctl.types import Progress


@dataclass(frozen=True)
class Command:
    """A command at work in this process: its validated `settings`, where it shows `progress`, and the `ranks` it is one of."""

    settings: Settings
    progress: Progress
    ranks: Ranks

    @classmethod
    def begin(cls, settings: Settings, progress: Progress) -> Self:
        """Takes part in the group of processes that was started, or works alone. UsageError for a device that is not there."""
        return cls(settings, progress, join(settings.launch))

    @classmethod
    def alone(cls, settings: Settings, progress: Progress) -> Self:
        """Works by itself, whatever the other processes do: nothing that it calls waits for them."""
        return cls(settings, progress, Ranks(0, 1, resolve_device(settings.launch)))

    def by_itself(self) -> Self:
        """The rest of the work, which waits for no other process."""
        return replace(self, ranks=Ranks(0, 1, self.device))

    @property
    def device(self) -> torch.device:
        """The device that this process computes on."""
        return self.ranks.device

    @property
    def again(self) -> str:
        """The command line that was typed, to be typed again."""
        return again_command()


def again_command() -> str:
    """The command line that was typed, to be typed again."""
    return shlex.join(["dmpctl", *sys.argv[1:]])
