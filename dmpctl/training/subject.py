"""One thing to be trained: a patch on a frozen backbone, or a backbone itself."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from dmpctl.runs.records import Description
from dmpctl.types import ParamGroup, Routings

Predict = Callable[[nn.Module, Tensor, Tensor, "Tensor | None", "Tensor | None"], tuple[Tensor, "Routings"]]


Route = Callable[[nn.Module, Tensor, "Tensor | None", "Tensor | None"], "Routings"]


@dataclass(frozen=True)
class Subject:
    """What is trained.

    `network` is the backbone that is run. `predict(module, x_t, t, cond, gate_noise)` gives the prediction and the routing,
    `route(module, t, cond, gate_noise)` the routing alone; `gate_noise_shape` is one sample's gate noise, None if there is
    none; `described` goes into {kind}.json beside the weights; `shardable`: --fsdp can share the network out.
    """

    kind: str
    module: nn.Module
    network: nn.Module
    groups: list[ParamGroup]
    predict: Predict
    route: Route
    penalty: Callable[[Routings], dict[str, Tensor]]
    gate_noise_shape: tuple[int, ...] | None
    described: Description
    shardable: bool = True
