"""What every Patch promises, each on a frozen backbone."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.engine.build import added_parameters, build_patch, freeze
from dmpctl.engine.patched import predict_patched
from dmpctl.files import read_tensors, write_tensors
from dmpctl.methods.dmp import DmpPatch
from dmpctl.settings.sections import Dmp, Method
from dmpctl.types import Plan

BATCH = 4
PATCHES: dict[str, Method] = {
    "dmp-soft": Dmp(),
    "dmp-soft-per-sample": Dmp(balance="per-sample", gate_scale=16),
    "dmp-topk": Dmp(gate="topk", topk=4),
    "dmp-topk-all": Dmp(gate="topk", topk=16),
    "dmp-depth": Dmp(prompt_depth=2, gate="topk", topk=1),
    "dmp-no-noise": Dmp(gate_noise=False, balance="none"),
    "dmp-prepend": Dmp(position="prepend"),
    "dmp-prepend-few": Dmp(position="prepend", prompts=3, prompt_depth=1, gate="topk", topk=2),
    "dmp-prepend-one": Dmp(position="prepend", prompts=1),
}
UNCOUNTED = ("w_noise",)  # needed in training only


@dataclass
class Case:
    """A patch with random numbers in it, and its backbone."""

    backbone: DiT
    patch: DmpPatch
    fresh: Callable[[], DmpPatch]
    settings: Method

    def plan(self, which: list[int], noise: Tensor | None = None) -> Plan:
        """The plan for some samples of the batch."""
        return self.patch.plan(self.c()[which], None if noise is None else noise[which])

    def c(self) -> Tensor:
        return self.backbone.embed_time(T) if self.patch.time_only else self.backbone.embed(T, Y)

    def noise(self, seed: int = 0) -> Tensor | None:
        shape = self.patch.noise_shape()
        return None if shape is None else torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(seed))

    def predict(self, patch: nn.Module | None = None) -> Tensor:
        return predict_patched(self.backbone, self.patch.time_only, patch or self.patch, X, T, Y)[0]


X = torch.randn(BATCH, 2, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([0, 20, 500, 999])
Y = torch.tensor([0, 1, 2, 4])  # 4: null
ALL = list(range(BATCH))


def randomise(module: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.normal_(0, 0.15, generator=draw)


@pytest.fixture(params=PATCHES)
def case(request) -> Case:
    settings = PATCHES[request.param]
    backbone = DiT(DiTConfig(8, 2, 2, 16, 3, 2, 4))
    randomise(backbone, 0)
    freeze(backbone)

    def fresh() -> DmpPatch:
        return build_patch(backbone.spec, settings)

    patch = fresh()
    randomise(patch, 1)
    return Case(backbone, patch, fresh, settings)


def test_parameter_groups_hold_what_is_trained_exactly_once(case):
    groups = case.patch.param_groups()
    grouped = [id(tensor) for group in groups for tensor in group["params"]]
    trained = [id(tensor) for tensor in case.patch.parameters() if tensor.requires_grad]
    assert sorted(grouped) == sorted(trained)
    assert trained
    assert all(group["lr"] > 0 and group["params"] for group in groups)
    assert len({group["name"] for group in groups}) == len(groups)


def test_the_count_that_is_announced_is_the_count_there_is(case):
    count, share = added_parameters(case.backbone.spec, case.settings)
    assert count == sum(tensor.numel() for name, tensor in case.patch.named_parameters() if name not in UNCOUNTED)
    assert share == 100 * count / sum(tensor.numel() for tensor in case.backbone.parameters())


def test_training_changes_the_patch_and_never_the_backbone(case):
    patch, weights = case.fresh(), {name: value.clone() for name, value in case.backbone.state_dict().items()}
    before, target = {name: value.clone() for name, value in patch.state_dict().items()}, torch.randn_like(X)
    start = case.predict(patch)
    optimizer = torch.optim.AdamW(patch.param_groups(), weight_decay=0.0)
    for step in range(4):
        prediction, routing = predict_patched(case.backbone, patch.time_only, patch, X, T, Y, case.noise(step))
        loss = (prediction[:, :2] - target).square().mean() + sum(patch.penalty(routing).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(value, weights[name]) for name, value in case.backbone.state_dict().items())
    assert all(tensor.grad is None for tensor in case.backbone.parameters())
    changed = {name for name, value in patch.state_dict().items() if not torch.equal(value, before[name])}
    expected = {name for name, tensor in patch.named_parameters() if tensor.requires_grad}
    assert changed == (expected if patch.shape.prompts > 1 else {"prompt_embeddings"})  # a lone prompt's gate is 1
    assert not torch.equal(case.predict(patch), start)
    assert all(tensor.isfinite().all() for tensor in patch.parameters())


def test_the_patch_is_applied(case):
    assert (case.predict() - case.backbone.denoise(X, T, Y)).abs().max() > 1e-3


@pytest.mark.parametrize("noisy", [False, True])
def test_routing_is_a_mixture_for_each_sample_and_block(case, noisy):
    routing = case.plan(ALL, case.noise() if noisy else None).routing
    if routing is None:
        pytest.skip("a method without gates")
    assert routing.gates.shape == (case.patch.shape.sites, BATCH, case.patch.shape.prompts)
    assert routing.gates.dtype == torch.float32
    assert (routing.gates >= 0).all()
    torch.testing.assert_close(routing.gates.sum(-1), torch.ones(routing.gates.shape[:2]))
    if routing.load is not None:
        assert routing.load.shape == routing.gates.shape[::2]
        assert ((routing.load >= 0) & (routing.load <= BATCH)).all()


@pytest.mark.parametrize("noisy", [False, True])
def test_penalties_are_finite_scalars_that_can_be_descended(case, noisy):
    losses = case.patch.penalty(case.plan(ALL, case.noise() if noisy else None).routing)
    for loss in losses.values():
        assert loss.shape == ()
        assert loss.isfinite()
        assert loss >= 0
        assert loss.requires_grad
    assert case.patch.penalty(None) == {}


@pytest.mark.parametrize("noisy", [False, True])
def test_a_batch_of_one(case, noisy):
    plan = case.plan([2], case.noise() if noisy else None)
    prediction = case.backbone.denoise(X[[2]], T[[2]], Y[[2]], plan.edit)
    assert prediction.shape == (1, 4, 8, 8)
    assert prediction.isfinite().all()
    assert all(loss.isfinite() for loss in case.patch.penalty(plan.routing).values())


@pytest.mark.parametrize("noisy", [False, True])
def test_a_plan_does_not_depend_on_the_neighbours(case, noisy):
    noise = case.noise() if noisy else None
    together = case.backbone.denoise(X, T, Y, case.plan(ALL, noise).edit)
    for i in ALL:
        alone = case.backbone.denoise(X[[i]], T[[i]], Y[[i]], case.plan([i], noise).edit)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)


def test_plans_are_deterministic_and_leave_nothing_behind(case):
    """Gates are returned, never kept: two plans of one patch do not disturb each other."""
    attributes, first = set(vars(case.patch)), case.plan(ALL)
    one = case.backbone.denoise(X, T, Y, first.edit)
    case.patch.plan(case.c().flip(0), case.noise())
    assert torch.equal(case.backbone.denoise(X, T, Y, first.edit), one)
    assert torch.equal(case.predict(), one)
    assert set(vars(case.patch)) == attributes


def test_calling_the_module_is_its_plan(case):
    called, planned = case.patch(case.c(), case.noise()), case.plan(ALL, case.noise())
    assert torch.equal(case.backbone.denoise(X, T, Y, called.edit), case.backbone.denoise(X, T, Y, planned.edit))


def test_gate_noise_is_felt_only_where_it_is_drawn(case):
    noise = case.noise()
    if noise is None:
        assert not any(name in UNCOUNTED and tensor.requires_grad for name, tensor in case.patch.named_parameters())
        return
    quiet, noisy = case.plan(ALL).routing, case.plan(ALL, noise).routing
    assert torch.equal(quiet.gates, noisy.gates) == (case.patch.shape.prompts == 1)


def test_an_edit_leaves_the_tokens_it_was_given_as_they_were(case):
    tokens = torch.randn(BATCH, 16, 16, generator=torch.Generator().manual_seed(5))
    kept, edit = tokens.clone(), case.plan(ALL).edit
    for site in range(3):
        edit(site, tokens)
    assert torch.equal(tokens, kept)


def test_a_saved_patch_is_the_same_patch(case, tmp_path):
    write_tensors(tmp_path / "patch.safetensors", case.patch.state_dict())
    tensors, _ = read_tensors(tmp_path / "patch.safetensors")
    loaded = case.fresh()
    found = loaded.load_state_dict(tensors)
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert all(torch.equal(value, tensors[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(case.predict(loaded), case.predict())
