"""Ways to compute the same arithmetic faster: compiled blocks, frozen weights in the format they are computed in."""

import torch
from torch import Tensor, nn

from dmpctl.backbones.sites import Hooked
from dmpctl.errors import UsageError
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Launch


def compile_blocks(network: nn.Module, launch: Launch) -> None:
    """Under --compile: each block as one graph, compiled when it is first run; what happens between blocks stays as it is."""
    if launch.compile:
        for _, block in blocks_of(network):
            if isinstance(network, Hooked):  # edits enter by hooks, which stay outside
                block.forward = torch.compile(block.forward, fullgraph=True)
            else:
                block.compile(fullgraph=True)


def blocks_of(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of a backbone with their names, in the order in which they run."""
    names: tuple[str, ...] = network.block_names  # type: ignore[assignment]
    return [(name, network.get_submodule(name)) for name in names]


def cast_frozen(network: nn.Module, settings: Settings) -> None:
    """Under --backbone-dtype bf16: weights of the linear layers in the blocks, which autocast would cast in every step.

    Nothing is computed otherwise, bit for bit. UsageError without --precision bf16, where it would be.
    """
    if settings.base.backbone_dtype == "float32":
        return
    if settings.train.precision != "bf16":
        raise UsageError("--backbone-dtype bf16 goes with --precision bf16", "add it, or leave --backbone-dtype out")
    layers = frozen_linears(network)
    if not layers:
        raise UsageError("--backbone-dtype bf16 is for a frozen backbone, and here it is trained", "leave it out")
    for linear in layers.values():
        for tensor in linear.parameters():
            tensor.data = tensor.data.to(torch.bfloat16)


def state_as_cast(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of this network as --backbone-dtype bf16 will leave it."""
    state: dict[str, Tensor] = network.state_dict()
    held = [f"{name}.{key}" for name, linear in frozen_linears(network).items() for key, _ in linear.named_parameters()]
    return state | {name: state[name].to(torch.bfloat16) for name in held}


def frozen_linears(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers in the blocks of which nothing is trained, by name."""
    return {
        f"{block}.{layer}": linear
        for block, module in blocks_of(network)
        for layer, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and not any(tensor.requires_grad for tensor in linear.parameters())
    }
