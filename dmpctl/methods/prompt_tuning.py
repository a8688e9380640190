"""Prompt tuning (Jia et al. 2022): prompts that do not depend on the timestep, without a gate. The paper's comparison."""

import torch
from torch import Tensor, nn

from dmpctl.methods.base import PatchBase
from dmpctl.methods.prompts import PromptShape, prompt_edit, start_normal
from dmpctl.settings.methods import PromptMethod
from dmpctl.types import ParamGroup, Plan

RANDOM_STD = 0.02  # standard deviation of prompts with --prompt-init random


class PromptPatch(PatchBase):
    """Prompts of L patched blocks, added to their tokens or prepended before them; float32 whatever the backbone's dtype.

    `prompt_embeddings` [L, (E,) N, D]; with a rank r instead `prompt_rows` [L, (E,) N, r] and `prompt_columns`
    [L, (E,) r, D], whose product they are. A zero start has zero columns, as rows of zeros too would never move;
    `seed`: of any other start. It is DMP with a uniform gate and a gate scale of N, bit for bit.
    """

    shape: PromptShape
    settings: PromptMethod
    prompt_embeddings: nn.Parameter
    prompt_rows: nn.Parameter
    prompt_columns: nn.Parameter

    def __init__(self, shape: PromptShape, settings: PromptMethod, seed: int = 0) -> None:
        super().__init__()
        self.shape, self.settings = shape, settings
        count, width, rank, std = shape.prompts, shape.width, shape.rank, RANDOM_STD if settings.prompt_init == "random" else 0.0
        if rank is None:
            self.prompt_embeddings = self._started(seed, "prompts", std, count, width)
        else:  # the product's variance is r times the product of the two variances
            self.prompt_rows = self._started(seed, "prompt rows", rank**-0.5, count, rank)
            self.prompt_columns = self._started(seed, "prompt columns", std, rank, width)

    def _started(self, seed: int, purpose: str, std: float, *matrix: int) -> nn.Parameter:
        """A parameter [L, (E,) *matrix]; standard deviation 0: zeros."""
        shape = (*self.shape.stack, *matrix)
        parameter = nn.Parameter(torch.zeros(shape))
        if std:
            with torch.no_grad():
                parameter.copy_(start_normal(seed, purpose, std, *shape))
        return parameter

    def all_prompts(self) -> Tensor:
        """Prompts [L, (E,) N, D] of all patched blocks; call it where autocast is off."""
        return self.prompt_embeddings if self.shape.rank is None else self.prompt_rows @ self.prompt_columns

    def prompts_of(self, number: int) -> Tensor:
        """Rows that gate weights multiply at the `number`-th patched block: [N, D], with sets [E, N * D]."""
        return self.all_prompts()[number].flatten(1)

    def prompt_parameters(self) -> list[nn.Parameter]:
        """The parameters that hold the prompts."""
        return [self.prompt_embeddings] if self.shape.rank is None else [self.prompt_rows, self.prompt_columns]

    def plan(self, c: Tensor, noise: Tensor | None = None) -> Plan:
        """The edit of all blocks by the prompts as they are."""
        with torch.autocast(c.device.type, enabled=False):
            prompts = self.all_prompts().unbind()
        return Plan(prompt_edit(self.shape, self.settings.position, prompts.__getitem__))

    def param_groups(self) -> list[ParamGroup]:
        """Prompts at their rate."""
        return [{"name": "prompts", "params": self.prompt_parameters(), "lr": self.settings.prompt_lr}]
