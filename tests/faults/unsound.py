"""What no layer may take, and no reader may run."""

from collections.abc import Callable

import torch
from torch import Tensor

State = dict[str, Tensor]


class Bad:
    """Unpickling this would run a command."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        import os

        return os.system, ("true",)


def spoilt(state: State, name: str, how: str) -> State:
    tensor = state[name].clone()
    match how:
        case "nan" | "inf":
            tensor.view(-1)[3] = float(how)
        case "int":
            tensor = tensor.round().to(torch.int32)
        case "complex":
            tensor = tensor.to(torch.complex64)
        case "too large":
            tensor = tensor.double() + 1e200
        case "strides":
            tensor = torch.zeros(1).expand(tensor.shape)
    return state | {name: tensor}
