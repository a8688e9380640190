"""The two kinds of patches: a module that edits tokens, or none of them, and one that runs a changed backbone."""

from abc import ABC, abstractmethod
from typing import ClassVar, Self, cast

from torch import Tensor, nn

from dmpctl.types import Backbone, ParamGroup, Plan, Routings


class PatchBase(nn.Module, ABC):
    """A `types.Patch` without a gate that changes no weight of the backbone; a method overrides where it differs."""

    @property
    def time_only(self) -> bool:
        """False: `plan` takes the whole conditioning."""
        return False

    @property
    def added(self) -> int:
        """Numbers that are trained, all of them needed afterwards."""
        return sum(tensor.numel() for tensor in self.parameters())

    def merged(self) -> dict[str, Tensor] | None:
        """None: no weight of the backbone changes."""
        return None

    def noise_shape(self) -> tuple[int, ...] | None:
        """None: there is no gate, and so no gate noise."""
        return None

    def forward(self, c: Tensor, noise: Tensor | None = None) -> Plan:
        """`plan`, so that the module can be wrapped for many processes."""
        return self.plan(c, noise)

    @abstractmethod
    def plan(self, c: Tensor, noise: Tensor | None = None) -> Plan:
        """Plan for conditioning c [B, D]; without a gate neither c nor noise has a part in it."""

    @abstractmethod
    def param_groups(self) -> list[ParamGroup]:
        """Exactly the patch's parameters, in groups of one learning rate each."""

    def penalty(self, routing: Routings) -> dict[str, Tensor]:
        """Empty: there is nothing to balance."""
        return {}


class ChangedBackbone(PatchBase):
    """A patch that runs `changed`, an nn.Module that is a `types.Backbone`, in place of the frozen backbone, and edits no token.

    A subclass registers what is trained: all of it at `lr`, in one group named `group`.
    """

    group: ClassVar[str]

    def __init__(self, changed: nn.Module, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self._changed = (changed,)  # in a tuple it is no submodule

    @property
    def changed(self) -> nn.Module:
        """The backbone that is run."""
        return self._changed[0]

    def train(self, mode: bool = True) -> Self:
        """The patch alone changes its mode: a backbone is always in eval mode, trained or not; no dropout, ever."""
        self.training = mode
        return self

    def plan(self, c: Tensor, noise: Tensor | None = None) -> Plan:
        """The changed backbone in place of the frozen one."""
        return Plan(backbone=cast(Backbone, self.changed))

    def param_groups(self) -> list[ParamGroup]:
        """One group of all that is trained."""
        return [{"name": self.group, "params": list(self.parameters()), "lr": self.lr}]
