"""Prompt tuning (Jia et al. 2022): the same prompts at every timestep, without a gate. The paper's comparison."""

from typing import Any

import torch
from torch import Tensor

from dmpctl.methods.prompts import PromptModule, PromptShape, prompt_edit
from dmpctl.settings.methods import PromptTuning
from dmpctl.types import Plan, Routings


class PromptPatch(PromptModule):
    """Prompts [L, N, D], added to or prepended before the tokens of L blocks as they are; zero or random at the start.

    It is DMP with a uniform gate and a gate scale of N, bit for bit.
    """

    def __init__(self, shape: PromptShape, settings: PromptTuning, seed: int = 0) -> None:
        super().__init__(shape, settings.prompt_init, seed)
        self.shape, self.settings = shape, settings

    @property
    def time_only(self) -> bool:
        """False: no conditioning is looked at."""
        return False

    @property
    def added(self) -> int:
        """L·N·D."""
        return self.shape.parameters()

    def merged(self) -> None:
        """None: no weight of the backbone changes."""

    def noise_shape(self) -> None:
        """None: there is no gate."""

    def forward(self, c: Tensor, noise: Tensor | None = None) -> Plan:
        """`plan`, so that the module can be wrapped for many processes."""
        return self.plan(c, noise)

    def plan(self, c: Tensor, noise: Tensor | None = None) -> Plan:
        """The edit of all blocks; neither c nor noise has a part in it."""
        with torch.autocast(c.device.type, enabled=False):
            prompts = self.all_prompts().unbind()
        return Plan(prompt_edit(self.shape, self.settings.position, prompts.__getitem__))

    def param_groups(self) -> list[dict[str, Any]]:
        """Prompts at their rate."""
        return [{"name": "prompts", "params": self.prompt_parameters(), "lr": self.settings.prompt_lr}]

    def penalty(self, routing: Routings) -> dict[str, Tensor]:
        """Empty: there is nothing to balance."""
        return {}
