"""Full fine-tuning: every weight of a copy of the backbone is trained. The paper's comparison."""

import copy
from typing import Any, Self, cast

from torch import Tensor, nn

from dmpctl.settings.sections import Full
from dmpctl.types import Backbone, Plan, Routing


class FullPatch(nn.Module):
    """A copy of a backbone (an nn.Module that is a `types.Backbone`), trained in eval mode: no dropout, ever.

    Its tensors have the names that they have in the backbone: a saved patch is itself a backbone. A fresh one is its
    backbone, bit for bit; the backbone itself is not touched.
    """

    def __init__(self, backbone: nn.Module, settings: Full) -> None:
        super().__init__()
        self.settings = settings
        changed = copy.deepcopy(backbone).requires_grad_(True).eval()
        # the very dicts of the copy, so that names are its own and what moves or replaces a tensor here does so there
        self._parameters, self._buffers, self._modules = changed._parameters, changed._buffers, changed._modules
        self._non_persistent_buffers_set = changed._non_persistent_buffers_set
        self._changed = (cast(Backbone, changed),)  # in a tuple it is no submodule

    def train(self, mode: bool = True) -> Self:
        """The patch alone changes its mode: a backbone is always in eval mode, trained or not."""
        self.training = mode
        return self

    @property
    def time_only(self) -> bool:
        """False: no conditioning is looked at."""
        return False

    @property
    def added(self) -> int:
        """All weights of the backbone, as `BackboneSpec.parameters` counts them."""
        return sum(tensor.numel() for tensor in self.parameters())

    def merged(self) -> dict[str, Tensor]:
        """The changed backbone's state dict: no copy, detached."""
        return dict(self.state_dict())

    def noise_shape(self) -> None:
        """None: there is no gate."""

    def forward(self, c: Tensor, noise: Tensor | None = None) -> Plan:
        """`plan`, so that the module can be wrapped for many processes."""
        return self.plan(c, noise)

    def plan(self, c: Tensor, noise: Tensor | None = None) -> Plan:
        """The changed backbone in place of the frozen one; neither c nor noise has a part in it."""
        return Plan(backbone=self._changed[0])

    def param_groups(self) -> list[dict[str, Any]]:
        """All weights at one rate."""
        return [{"name": "backbone", "params": list(self.parameters()), "lr": self.settings.lr}]

    def penalty(self, routing: Routing | None) -> dict[str, Tensor]:
        """Empty: there is nothing to balance."""
        return {}
