"""Tensors that lie shared out over processes (FSDP2), and whole again."""

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(module: nn.Module) -> bool:
    """Whether some of its own parameters are shared out."""
    return any(_is_shared(tensor) for tensor in module.parameters())


def _is_shared(tensor: Tensor) -> "TypeGuard[DTensor]":
    """A tensor is not, where nothing has imported what shares it out: that costs a good half of a second."""
    there = sys.modules.get("torch.distributed.tensor")
    return there is not None and isinstance(tensor, there.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with what other processes have of it, detached; a collective where it is shared out."""
    tensor = tensor.detach()
    return tensor.full_tensor() if _is_shared(tensor) else tensor


def shared_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor shared out as another one is, on its device."""
    if _is_shared(like):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)
