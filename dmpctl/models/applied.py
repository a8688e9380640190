"""A patch on somebody else's model of diffusers, which goes on being called as it was: by a pipeline, or by hand."""

import inspect
import warnings
from typing import Any

import torch
from torch import nn

from dmpctl.backbones.diffusers_folder import wrapped
from dmpctl.backbones.dit_weights import digest_of
from dmpctl.errors import IntegrityError, UsageError
from dmpctl.models.patched import Patched, conditioning_of

KEPT = "_dmpctl_patch"  # attribute of a patched model
PARTS = ("transformer", "unet")  # of a pipeline


class AppliedPatch:
    """Before each call of `model`: the edit that its arguments ask for. `remove` ends that."""

    def __init__(self, model: nn.Module, patched: Patched) -> None:
        """IntegrityError where the patch is of other weights or another shape, UsageError for one that changes weights."""
        if patched.patch is None or patched.patch.merged() is not None:
            raise UsageError("only prompts can be applied to a model in memory", "merge it: dmpctl export RUN --to merged")
        self._backbone, self._patch = wrapped(model), patched.patch
        self._signature = inspect.signature(model.forward)
        _refuse_other(model, self._backbone.spec.sites, patched)
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def remove(self) -> None:
        """Give the model back as it was."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = self._signature.bind(*args, **kwargs).arguments
        t, cond = self._backbone.told(arguments)
        self._patch.to(t.device)
        with torch.no_grad():
            c = conditioning_of(self._backbone, self._patch.time_only, t, cond)
            self._backbone.put_in_force(self._patch.plan(c).edit)

    def _end(self, *_: object) -> None:
        self._backbone.put_in_force(None)


def _refuse_other(model: nn.Module, sites: tuple[Any, ...], patched: Patched) -> None:
    own = patched.backbone
    if sites != own.spec.sites:
        raise IntegrityError("the patch was trained on a backbone of another shape", f"use the one it names: {own.origin}")
    if {tensor.dtype for tensor in model.parameters()} == {torch.float32}:
        if digest_of(model.state_dict()) != own.digest:
            raise IntegrityError("the patch was trained on other weights", f"use those it names: {own.origin}")
    else:
        warnings.warn("the model is not in float32: whether the patch is of its weights cannot be told", stacklevel=4)


def apply_patch(target: Any, patched: Patched | None) -> Any:
    """`target`, a model of diffusers or a pipeline that has one, patched in place; None takes a patch off again."""
    model = (
        target
        if isinstance(target, nn.Module)
        else next((getattr(target, part) for part in PARTS if hasattr(target, part)), None)
    )
    if not isinstance(model, nn.Module):
        raise UsageError(f"a {type(target).__name__} holds no model that can be patched", "pass pipe.transformer or pipe.unet")
    before: AppliedPatch | None = getattr(model, KEPT, None)
    if before is not None:
        before.remove()
    setattr(model, KEPT, None if patched is None else AppliedPatch(model, patched))
    return target
