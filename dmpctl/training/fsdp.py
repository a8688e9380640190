"""`--fsdp`: the weights of a backbone shared out over the processes, block by block, through torch's FSDP2.

For backbones that do not fit into one device. A patch itself is small and whole on every process.
"""

from typing import TYPE_CHECKING

from dmpctl.errors import UsageError
from dmpctl.models.speed import blocks_of
from dmpctl.processes.ranks import Ranks
from dmpctl.types import ParamGroup

if TYPE_CHECKING:
    from dmpctl.training.subject import Subject

ENTRIES = ("denoise", "embed", "embed_time")  # what is called of a backbone beside its forward


def shard(subject: "Subject", ranks: Ranks) -> list[ParamGroup]:
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
