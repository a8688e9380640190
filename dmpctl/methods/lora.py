"""LoRA (Hu et al. 2022): W + (alpha / rank)·B·A in chosen linear layers of the blocks, through peft."""

import copy
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from dmpctl.errors import UsageError
from dmpctl.methods.base import ChangedBackbone
from dmpctl.rng import seed_of
from dmpctl.settings.methods import Lora
from dmpctl.types import Backbone

ADAPTER = "default"  # peft's name for an adapter that was given none; it is not part of the saved names


class LoraPatch(ChangedBackbone):
    """Adapters A [rank, in] and B [out, rank] in float32, for a backbone (an nn.Module that is a `types.Backbone`).

    peft puts them into a second structure over the very tensors of the backbone, which stays as it is. They are named
    as peft saves them (`blocks.0.attn.qkv.lora_A.weight`). B is zero at the start: a fresh one is its backbone, bit for bit.
    rank·(in + out) numbers for every target layer.
    """

    group: ClassVar[str] = "lora"

    def __init__(self, backbone: nn.Module, settings: Lora, seed: int = 0) -> None:
        """UsageError for a rank that no target layer can have."""
        linears = cast(Backbone, backbone).linears
        ends = tuple(dict.fromkeys(end for target in settings.targets.split(",") for end in linears[target]))
        refuse_rank(backbone, ends, settings.rank)
        changed = injected(over_the_same_tensors(backbone), ends, settings, seed)
        super().__init__(changed, settings.lr)
        self._frozen = (backbone,)  # in a tuple it is no submodule
        for name, layer in adapted(changed):
            for part in ("lora_A", "lora_B"):
                register(self, f"{name}.{part}", getattr(layer, part)[ADAPTER])

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """The backbone's state dict, with W + (alpha / rank)·B·A (summed in float32) in the target layers."""
        tensors: dict[str, Tensor] = dict(self._frozen[0].state_dict())
        for name, layer in adapted(self.changed):
            weight = tensors[f"{name}.weight"]
            tensors[f"{name}.weight"] = (weight.float() + layer.get_delta_weight(ADAPTER)).to(weight.dtype)
        return tensors


def refuse_rank(backbone: nn.Module, ends: tuple[str, ...], rank: int) -> None:
    """UsageError for a rank over the smaller side of a target layer: it would add numbers but no freedom."""
    dotted = tuple(f".{end}" for end in ends)  # what peft matches with
    for name, layer in backbone.named_modules():
        if name.endswith(dotted) and isinstance(layer, nn.Linear):
            most = min(layer.in_features, layer.out_features)
            if rank > most:
                sides = f"{layer.in_features} x {layer.out_features}"
                raise UsageError(f"--rank {rank} is more than {name} can have, which is {sides}", f"use --rank {most} or less")


def over_the_same_tensors(backbone: nn.Module) -> nn.Module:
    """Other modules over the backbone's own tensors: one that is moved or replaced here is so there, too."""
    shared = [held for module in backbone.modules() for held in (module._parameters, module._buffers)]
    return copy.deepcopy(backbone, {id(held): held for held in shared})


def injected(model: nn.Module, ends: tuple[str, ...], settings: Lora, seed: int) -> nn.Module:
    """`model` with peft's adapters in it, the same for the same seed; the global random state is left as it was."""
    from peft import LoraConfig, inject_adapter_in_model  # it costs seconds

    alpha = settings.rank if settings.alpha is None else settings.alpha
    # peft hands alpha on as it is: only its annotation wants a whole one
    config = LoraConfig(r=settings.rank, lora_alpha=cast(int, alpha), target_modules=list(ends), lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, "start", "lora"))  # not torch.manual_seed, which seeds GPUs too
        model = inject_adapter_in_model(config, model, ADAPTER)
    for _, layer in adapted(model):
        layer.lora_A.float()
        layer.lora_B.float()
    return model.eval()


def adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and peft layer of every linear layer with adapters."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def register(root: nn.Module, name: str, module: nn.Module) -> None:
    """Make `module` a submodule of `root` under a dotted name, through containers that hold nothing else."""
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(last, module)
