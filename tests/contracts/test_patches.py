"""What every Patch promises, each on a frozen backbone."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.engine.build import PatchModule, build_patch, freeze
from dmpctl.engine.patched import predict_patched
from dmpctl.files import read_tensors, write_tensors
from dmpctl.methods.dmp import DmpPatch
from dmpctl.settings.methods import Dmp, Full, Lora, Method, PromptTuning
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
    "dmp-hard": Dmp(gate="hard"),
    "dmp-uniform": Dmp(gate="uniform"),
    "dmp-random": Dmp(gate="random"),
    "dmp-gate-t": Dmp(gate_input="t"),
    "dmp-prepend-gate-t+y": Dmp(position="prepend", prompts=3, gate_input="t+y"),
    "dmp-gate-per-site": Dmp(gate_per_site=True, gate="topk", topk=4),
    "dmp-sets": Dmp(prompt_sets=3),
    "dmp-sets-topk": Dmp(prompt_sets=3, gate="topk", topk=2, gate_per_site=True),
    "dmp-rank": Dmp(prompt_rank=2),
    "dmp-sets-rank": Dmp(prompt_sets=3, prompt_rank=2),
    "dmp-sites": Dmp(prompt_sites="0,2"),
    "dmp-sites-prepend": Dmp(prompt_sites="1-2", position="prepend", prompts=3),
    "dmp-random-start": Dmp(prompt_init="random"),
    "prompt": PromptTuning(),
    "prompt-prepend": PromptTuning(position="prepend", prompts=5),
    "prompt-random-start": PromptTuning(prompt_init="random", prompt_sites="0,2"),
    "lora": Lora(),
    "lora-qkv": Lora(rank=2, alpha=3.0, targets="qkv"),
    "lora-proj": Lora(rank=1, targets="proj"),
    "lora-mlp": Lora(targets="mlp"),
    "lora-all": Lora(rank=4, targets="qkv,proj,mlp"),
    "full": Full(),
}
UNCOUNTED = ("w_noise",)  # needed in training only
CONFIG = DiTConfig(8, 2, 2, 16, 3, 2, 4)


def starts_as_its_backbone(settings: Method) -> bool:
    """All do, but where prompts are prepended (attention sees zeros too) or start at random."""
    return not isinstance(settings, Dmp | PromptTuning) or (settings.position, settings.prompt_init) == ("add", "zero")


@dataclass
class Case:
    """A patch with random numbers in it, and its backbone."""

    backbone: DiT
    patch: PatchModule
    fresh: Callable[[], PatchModule]
    settings: Method

    @property
    def choices(self) -> int:
        """What the gate chooses among; 1: nothing to choose, as there is no gate, or one of a single prompt."""
        return self.patch.shape.choices if isinstance(self.patch, DmpPatch) else 1

    def plan(self, which: list[int], noise: Tensor | None = None) -> Plan:
        """The plan for some samples of the batch."""
        return self.patch.plan(self.c()[which], None if noise is None else noise[which])

    @property
    def trained_gate(self) -> bool:
        return isinstance(self.settings, Dmp) and self.settings.gate not in ("uniform", "random")

    def run(self, plan: Plan, which: list[int]) -> Tensor:
        """Prediction of a plan for some samples of the batch."""
        return (plan.backbone or self.backbone).denoise(X[which], T[which], Y[which], plan.edit)

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
    backbone = DiT(CONFIG)
    randomise(backbone, 0)
    freeze(backbone)

    def fresh() -> PatchModule:
        return build_patch(backbone, settings)

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
    assert case.patch.added == sum(tensor.numel() for name, tensor in case.patch.named_parameters() if name not in UNCOUNTED)
    assert case.backbone.spec.parameters == sum(tensor.numel() for tensor in case.backbone.parameters())
    with torch.device("meta"):  # a report needs no weights
        assert build_patch(freeze(DiT(CONFIG)), case.settings).added == case.patch.added


def test_a_fresh_patch_is_its_backbone_bit_for_bit(case):
    if not starts_as_its_backbone(case.settings):
        pytest.skip("it starts elsewhere")
    patch, alone = case.fresh(), case.backbone.denoise(X, T, Y)
    for noise in (None, case.noise()):
        assert torch.equal(predict_patched(case.backbone, patch.time_only, patch, X, T, Y, noise)[0], alone)


def test_every_fresh_patch_is_alike_and_global_randomness_goes_on(case):
    torch.manual_seed(1)
    state, one = torch.get_rng_state(), case.fresh().state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    two = case.fresh().state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_training_mode_makes_no_difference(case):
    predictions = [case.predict(case.patch.train(mode)) for mode in (True, False)]
    assert torch.equal(*predictions)
    made = case.patch.train().plan(case.c())
    assert not any(module.training for module in (made.backbone or case.backbone).modules())


def test_a_change_of_weights_folds_into_a_plain_backbone(case):
    merged = case.patch.merged()
    assert (merged is None) == (case.plan(ALL).backbone is None)
    if merged is None:
        return
    assert list(merged) == list(case.backbone.state_dict())
    assert not any(value.requires_grad for value in merged.values())
    plain = DiT(CONFIG)
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain.eval().denoise(X, T, Y), case.predict(), rtol=0, atol=1e-5)


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
    lone = isinstance(patch, DmpPatch) and case.choices == 1
    assert changed == ({"prompt_embeddings"} if lone else expected)  # a lone prompt's gate is 1
    assert not torch.equal(case.predict(patch), start)
    assert all(tensor.isfinite().all() for tensor in patch.parameters())


def test_the_patch_is_applied(case):
    assert (case.predict() - case.backbone.denoise(X, T, Y)).abs().max() > 1e-3


@pytest.mark.parametrize("noisy", [False, True])
def test_routing_is_a_mixture_for_each_sample_and_block(case, noisy):
    routing = case.plan(ALL, case.noise() if noisy else None).routing
    if routing is None:
        pytest.skip("a method without gates")
    assert routing.gates.shape == (case.patch.shape.sites, BATCH, case.choices)
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
    assert bool(losses) == (case.trained_gate and case.settings.balance != "none")
    assert case.patch.penalty(None) == {}


@pytest.mark.parametrize("noisy", [False, True])
def test_a_batch_of_one(case, noisy):
    plan = case.plan([2], case.noise() if noisy else None)
    prediction = case.run(plan, [2])
    assert prediction.shape == (1, 4, 8, 8)
    assert prediction.isfinite().all()
    assert all(loss.isfinite() for loss in case.patch.penalty(plan.routing).values())


@pytest.mark.parametrize("noisy", [False, True])
def test_a_plan_does_not_depend_on_the_neighbours(case, noisy):
    noise = case.noise() if noisy else None
    together = case.run(case.plan(ALL, noise), ALL)
    for i in ALL:
        alone = case.run(case.plan([i], noise), [i])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)


def test_plans_are_deterministic_and_leave_nothing_behind(case):
    """Gates are returned, never kept: two plans of one patch do not disturb each other."""
    attributes, first = set(vars(case.patch)), case.plan(ALL)
    one = case.run(first, ALL)
    case.patch.plan(case.c().flip(0), case.noise())
    assert torch.equal(case.run(first, ALL), one)
    assert torch.equal(case.predict(), one)
    assert set(vars(case.patch)) == attributes


def test_calling_the_module_is_its_plan(case):
    called, planned = case.patch(case.c(), case.noise()), case.plan(ALL, case.noise())
    assert torch.equal(case.run(called, ALL), case.run(planned, ALL))


def test_gate_noise_is_felt_only_where_it_is_drawn(case):
    noise = case.noise()
    if noise is None:
        assert not any(name in UNCOUNTED and tensor.requires_grad for name, tensor in case.patch.named_parameters())
        return
    quiet, noisy = case.plan(ALL).routing, case.plan(ALL, noise).routing
    assert torch.equal(quiet.gates, noisy.gates) == (case.choices == 1)


def test_an_edit_leaves_the_tokens_it_was_given_as_they_were(case):
    tokens = torch.randn(BATCH, 16, 16, generator=torch.Generator().manual_seed(5))
    kept, edit = tokens.clone(), case.plan(ALL).edit
    if edit is None:
        pytest.skip("a method that edits no tokens")
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
