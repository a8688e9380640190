"""A state dict out of what other people's training wraps around it: entries of a checkpoint, and prefixes inside its names."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dmpctl.errors import IntegrityError, UsageError

ANCHOR = "x_embedder.proj.weight"  # every DiT in the published layout has it
# Modules that wrap another one: torch.compile, DDP (also AveragedModel, DeepSpeed), FSDP, activation checkpoints, Fabric.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
COUNTERS = ("n_averaged", "initted", "step")  # numbers that AveragedModel and ema_pytorch keep beside weights
ENTRIES = ("ema", "model", "state_dict", "module")  # of checkpoints, the first that holds a model is taken
DEPTH = 4  # of dictionaries in dictionaries


@dataclass(frozen=True)
class Wrapped:
    """One model in a file. `entry` and `prefix`: where it lies; `beside`: how many tensors of that entry are not its own."""

    tensors: dict[str, Tensor]
    entry: str
    prefix: str
    average: bool
    beside: int

    @property
    def words(self) -> str:
        """Where it lies, for people."""
        where = f"its '{self.entry}' entry" if self.entry else "the file"
        return where + (f", below '{self.prefix}'" if self.prefix else "")

    @property
    def rank(self) -> int:
        first = self.entry.partition(".")[0]
        return ENTRIES.index(first) if first in ENTRIES else len(ENTRIES)


def unwrapped(path: Path, value: object, which: Literal["ema", "raw"] | None) -> Wrapped:
    """The state dict of a DiT in a checkpoint, its names as published: the average where there is one, or `which`.

    IntegrityError where there is none, or several that nothing tells apart; UsageError for weights that it does not hold.
    """
    everything = list(_models(value))
    if not everything:
        raise _no_dit(path, value)
    wanted = [found for found in everything if which is None or found.average == (which == "ema")]
    if not wanted:
        what = "average of its weights" if which == "ema" else "last weights beside their average"
        raise UsageError(f"{path} holds no {what}", "leave --weights out")
    best = min((not found.average, found.rank) for found in wanted)
    chosen = [found for found in wanted if (not found.average, found.rank) == best]
    if len(chosen) > 1:
        raise IntegrityError(
            f"{path} holds several models: {' and '.join(found.words for found in chosen)}", "save the one that is meant alone"
        )
    return chosen[0]


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their names without wrappers, and without counters; IntegrityError where two names become one."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if bare in COUNTERS and tensor.numel() == 1:
            continue
        if bare in found:
            raise IntegrityError(
                f"two tensors are called {bare} once their wrappers are taken off", "save one of the models alone"
            )
        found[bare] = tensor
    return found


def _models(node: object, entry: str = "", depth: int = 0) -> Iterator[Wrapped]:
    """Every DiT in dictionaries inside of dictionaries."""
    if not isinstance(node, dict) or depth > DEPTH:
        return
    own = {name: value for name, value in node.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if any(name.endswith(ANCHOR) for name in own):
        counted = any(name.rpartition(".")[2] == "n_averaged" for name in own)
        bare = plain(own)
        for prefix in [name.removesuffix(ANCHOR) for name in bare if name.endswith(ANCHOR)]:
            mine = {name.removeprefix(prefix): value for name, value in bare.items() if name.startswith(prefix)}
            average = counted or bool(re.search(r"(^|[._])(ema|averaged?|shadow)([._]|$)", f"{entry}.{prefix}"))
            yield Wrapped(mine, entry, prefix.rstrip("."), average, len(bare) - len(mine))
    for name, value in node.items():
        if isinstance(name, str):
            yield from _models(value, f"{entry}.{name}" if entry else name, depth + 1)


def _no_dit(path: Path, value: object) -> IntegrityError:
    """The failure for a file without a DiT: what it holds in its place."""
    names = list(_names(value))
    if isinstance(value, dict) and "shadow_params" in value:
        hint = "copy it into the model (ema.copy_to) and save that"
        return IntegrityError(f"{path} holds an average without names (shadow_params, diffusers' EMAModel)", hint)
    if any("flat_param" in name for name in names):
        hint = "save a full state dict (FullStateDictConfig), not FSDP's own"
        return IntegrityError(f"{path} holds flat parameters of FSDP ({names[0]})", hint)
    if not names:
        return IntegrityError(f"{path} holds no state dict (found {type(value).__name__})")
    if any(name.startswith("transformer_blocks.") for name in names):
        hint = "name the folder with its config.json: --base FOLDER"
        return IntegrityError(f"{path} holds a model in the layout of diffusers, not a DiT in the published one", hint)
    what = f"it lacks {ANCHOR!r}; its names begin with {names[0]!r}"
    return IntegrityError(f"{path} holds no DiT in the published layout: {what}", "name a checkpoint of a DiT or SiT")


def _names(node: Any, depth: int = 0) -> Iterator[str]:
    """Names of the tensors in a file."""
    if isinstance(node, dict) and depth <= DEPTH:
        for name, value in node.items():
            if isinstance(value, Tensor) and isinstance(name, str):
                yield name
            yield from _names(value, depth + 1)
