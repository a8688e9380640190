"""`--fsdp`: the weights of a backbone shared out over the processes, block by block, through torch's FSDP2.

For backbones that do not fit into one device. A patch itself is small and whole on every process.
"""

from dmpctl.errors import UsageError
from dmpctl.methods.lora import LoraPatch
from dmpctl.models.speed import blocks_of
from dmpctl.processes.ranks import Ranks
from dmpctl.runs.records import Description
from dmpctl.training.subject import Subject

ENTRIES = ("denoise", "embed", "embed_time")  # methods of a backbone that are called beside its forward


def shard(subject: Subject[Description], ranks: Ranks) -> None:
    """Share out the subject's network: its parameters are other tensors from then on.

    UsageError for one process, and for LoRA.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    network = subject.network
    if isinstance(subject.patch, LoraPatch):
        raise UsageError("--fsdp shares out a backbone, which LoRA has tied its own weights to", "leave --fsdp out")
    if ranks.world == 1:
        raise UsageError("--fsdp shares weights out over several processes, this is one", "add --num-processes, or leave it out")
    network.to(ranks.device)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for _, block in blocks_of(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    for entry in ENTRIES:
        register_fsdp_forward_method(network, entry)
