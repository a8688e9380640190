"""Patches whose every number is random, and small backbones for them."""

from dataclasses import replace

import torch
from torch import Tensor

from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.methods.dmp import DmpPatch, DmpShape, dmp_shape
from dmpctl.settings.methods import Dmp
from dmpctl.types import BackboneSpec, Plan, Routing, ScheduleSpec, Site

L, N, D, B = 3, 6, 8, 4  # blocks, prompts, width, batch
TOPK = Dmp(gate="topk", topk=2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spec(*sites: tuple[int, int]) -> BackboneSpec:
    """Of a backbone with these (tokens, width)."""
    return BackboneSpec((1, 8, 8), tuple(Site(*site) for site in sites), "epsilon", True, ScheduleSpec(), 0, 1)


SPEC = spec(*[(N, D)] * L)


def fresh(settings: Dmp | None = None, of: BackboneSpec = SPEC) -> DmpPatch:
    """A patch as training starts with it."""
    settings = settings or Dmp()
    return DmpPatch(dmp_shape(of, settings), settings)


def made(settings: Dmp | None = None, shape: DmpShape | None = None, std: float = 0.5) -> DmpPatch:
    """A patch whose every number is random."""
    settings = settings or Dmp()
    patch, draw = DmpPatch(shape or dmp_shape(SPEC, settings), settings), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in patch.parameters():
            tensor.normal_(0, std, generator=draw)
    return patch


def routed(plan: Plan) -> Routing:
    assert plan.routing is not None
    return plan.routing


def backbone(**changes: object) -> DiT:
    """A random DiT of 16 tokens, width 16 and 3 blocks, frozen."""
    model, draw = DiT(replace(DiTConfig(8, 2, 2, 16, 3, 2, 4), **changes)), torch.Generator().manual_seed(3)  # type: ignore[arg-type]
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, std=0.15, generator=draw)
    return model.eval().requires_grad_(False)


X, T, Y = normal(3, 2, 8, 8, seed=4), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 4])
