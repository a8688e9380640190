"""One thing to be trained: a patch on a frozen backbone, or a backbone itself."""

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from torch import Tensor, nn

from dmpctl.methods.base import ChangedBackbone
from dmpctl.models.backbone import BackboneModule
from dmpctl.models.build import PatchModule
from dmpctl.models.patched import predict_patched, routing_of
from dmpctl.runs.records import Description
from dmpctl.types import ParamGroup, Routings

D_co = TypeVar("D_co", bound=Description, covariant=True)


@dataclass(frozen=True)
class Subject(Generic[D_co]):
    """A patch on the frozen backbone `model`; `patch` None: the backbone itself, trained at `lr`.

    `described` goes into {kind}.json beside the weights.
    """

    model: BackboneModule
    patch: PatchModule | None
    described: D_co
    lr: float = 0.0

    @property
    def kind(self) -> Literal["patch", "backbone"]:
        """Name of the files that hold the weights."""
        return "backbone" if self.patch is None else "patch"

    @property
    def module(self) -> nn.Module:
        """The module whose parameters are trained."""
        return self.model if self.patch is None else self.patch

    @property
    def network(self) -> nn.Module:
        """The backbone that is run: the one given, or a changed one."""
        return self.patch.changed if isinstance(self.patch, ChangedBackbone) else self.model

    def param_groups(self) -> list[ParamGroup]:
        """The trained parameters with their learning rates."""
        if self.patch is None:
            return [{"name": "backbone", "params": list(self.model.parameters()), "lr": self.lr}]
        return self.patch.param_groups()

    def predict(
        self, module: nn.Module, x_t: Tensor, t: Tensor, cond: Tensor | None, gate_noise: Tensor | None
    ) -> tuple[Tensor, Routings]:
        """Prediction and routing for x_t at timesteps t [B]; `module` is `self.module`, or it wrapped for many processes."""
        if self.patch is None:
            return module(x_t, t, cond), None
        return predict_patched(self.model, self.patch.time_only, module, x_t, t, cond, gate_noise)

    def route(self, module: nn.Module, t: Tensor, cond: Tensor | None, gate_noise: Tensor | None) -> Routings:
        """The routing that `predict` would give; no block is run."""
        if self.patch is None:
            return None
        return routing_of(self.model, self.patch.time_only, module, t, cond, gate_noise)

    def penalty(self, routing: Routings) -> dict[str, Tensor]:
        """Weighted balance losses by name, each a scalar; a backbone alone has nothing to balance."""
        return {} if self.patch is None else self.patch.penalty(routing)
