"""`--fsdp`: the weights of a backbone shared out over the processes, block by block, through torch's FSDP2.

For backbones that do not fit into one device. A patch itself is small and whole on every process.
"""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn

from dmpctl.engine.ranks import Ranks
from dmpctl.engine.speed import blocks_of
from dmpctl.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from dmpctl.engine.train import Subject

ENTRIES = ("denoise", "embed", "embed_time")  # what is called of a backbone beside its forward


def shard(subject: "Subject", ranks: Ranks) -> list[dict[str, Any]]:
    """Share out the subject's network; returns its parameter groups, with what is sharded in them in place of what was.

    UsageError for one process, and for a method whose network cannot be shared out.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    network, module = subject.network, subject.module
    if not subject.shardable:
        raise UsageError("--fsdp shares out a backbone, which LoRA has tied its own weights to", "leave --fsdp out")
    if ranks.world == 1:
        raise UsageError("--fsdp shares weights out over several processes, this is one", "add --num-processes, or leave it out")
    names = {id(tensor): name for name, tensor in module.named_parameters()}
    network.to(ranks.device)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for _, block in blocks_of(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    for entry in ENTRIES:
        register_fsdp_forward_method(network, entry)
    tensors = dict(module.named_parameters())
    return [{**group, "params": [tensors[names[id(tensor)]] for tensor in group["params"]]} for group in subject.groups]


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
