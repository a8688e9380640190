"""What full fine-tuning and LoRA share: a patch that runs a changed backbone in place of the frozen one, and edits no token."""

from typing import Any, ClassVar, Self, cast

from torch import Tensor, nn

from dmpctl.types import Backbone, Plan, Routings


class ChangedBackbone(nn.Module):
    """`changed` (an nn.Module that is a `types.Backbone`) is what is run; what is trained, a subclass registers.

    All of it is trained at `lr`, in one group named `group`.
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

    @property
    def time_only(self) -> bool:
        """False: no conditioning is looked at."""
        return False

    @property
    def added(self) -> int:
        """Numbers that are trained, all of them needed afterwards."""
        return sum(tensor.numel() for tensor in self.parameters())

    def noise_shape(self) -> None:
        """None: there is no gate."""

    def forward(self, c: Tensor, noise: Tensor | None = None) -> Plan:
        """`plan`, so that the module can be wrapped for many processes."""
        return self.plan(c, noise)

    def plan(self, c: Tensor, noise: Tensor | None = None) -> Plan:
        """The changed backbone in place of the frozen one; neither c nor noise has a part in it."""
        return Plan(backbone=cast(Backbone, self.changed))

    def param_groups(self) -> list[dict[str, Any]]:
        """All that is trained at one rate."""
        return [{"name": self.group, "params": list(self.parameters()), "lr": self.lr}]

    def penalty(self, routing: Routings) -> dict[str, Tensor]:
        """Empty: there is nothing to balance."""
        return {}
