"""Promises of every Patch on a frozen backbone: a promise is tried on the rows that could break it, each in its own way."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.backbones.pixart import PixArt
from dmpctl.backbones.sd_unet import SdUnet
from dmpctl.files import read_tensors, write_tensors
from dmpctl.methods.by_size import PatchBySize
from dmpctl.methods.dmp import DmpPatch
from dmpctl.models.backbone import freeze
from dmpctl.models.build import PatchModule, build_patch
from dmpctl.models.patched import predict_patched
from dmpctl.settings.methods import Dmp, Full, Lora, Method, PromptTuning
from dmpctl.types import Plan, Routing, Routings
from tests.contracts.rows import Rows
from tests.foreign_helpers import TOKENS, WIDTH, tiny_pixart, tiny_unet

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
# The same on other backbones: captions, and sites of several sizes.
ELSEWHERE: dict[str, tuple[Method, Callable[[], nn.Module]]] = {
    "pixart-dmp": (Dmp(), lambda: PixArt(tiny_pixart(), text_tokens=TOKENS)),
    "pixart-dmp-prepend": (Dmp(position="prepend", prompts=3), lambda: PixArt(tiny_pixart(), text_tokens=TOKENS)),
    "pixart-lora": (Lora(rank=2), lambda: PixArt(tiny_pixart(), text_tokens=TOKENS)),
    "pixart-full": (Full(), lambda: PixArt(tiny_pixart(), text_tokens=TOKENS)),
    "unet-dmp": (Dmp(), lambda: SdUnet(tiny_unet())),
    "unet-dmp-topk": (Dmp(gate="topk", topk=4, balance="per-sample"), lambda: SdUnet(tiny_unet())),
    "unet-dmp-per-site": (Dmp(gate_per_site=True), lambda: SdUnet(tiny_unet())),
    "unet-dmp-up": (Dmp(sites="up"), lambda: SdUnet(tiny_unet())),
    "unet-dmp-sites": (Dmp(prompt_sites="0-1"), lambda: SdUnet(tiny_unet())),
    "unet-dmp-uniform": (Dmp(gate="uniform"), lambda: SdUnet(tiny_unet())),
    "unet-prompt": (PromptTuning(), lambda: SdUnet(tiny_unet())),
    "unet-lora": (Lora(rank=2), lambda: SdUnet(tiny_unet())),
    "unet-full": (Full(), lambda: SdUnet(tiny_unet())),
}
rows = Rows("case", [*PATCHES, *ELSEWHERE])
UNCOUNTED = ("w_noise",)  # needed in training only
CONFIG = DiTConfig(8, 2, 2, 16, 3, 2, 4)
X = torch.randn(BATCH, 2, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([0, 20, 500, 999])
Y = torch.tensor([0, 1, 2, 4])  # 4: null


@dataclass
class Case:
    """A patch with random numbers in it, and its backbone."""

    blank: Callable[[], nn.Module]
    backbone: nn.Module
    patch: PatchModule
    fresh: Callable[[], PatchModule]
    settings: Method
    x: Tensor
    t: Tensor
    y: Tensor

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.x.shape[1]

    @property
    def each(self) -> list[PatchModule]:
        """The patches of one size that it is made of."""
        return self.patch.each if isinstance(self.patch, PatchBySize) else [self.patch]

    @property
    def choices(self) -> int:
        """What the gate chooses among; 1: nothing to choose, as there is no gate, or one of a single prompt."""
        return self.each[0].shape.choices if isinstance(self.each[0], DmpPatch) else 1

    def plan(self, which: list[int], noise: Tensor | None = None) -> Plan:
        """The plan for some samples of the batch."""
        return self.patch.plan(self.c()[which], None if noise is None else noise[which])

    @property
    def trained_gate(self) -> bool:
        return isinstance(self.settings, Dmp) and self.settings.gate not in ("uniform", "random")

    def run(self, plan: Plan, which: list[int]) -> Tensor:
        """Prediction of a plan for some samples of the batch."""
        return (plan.backbone or self.backbone).denoise(self.x[which], self.t[which], self.y[which], plan.edit)

    def c(self) -> Tensor:
        return self.backbone.embed_time(self.t) if self.patch.time_only else self.backbone.embed(self.t, self.y)

    def noise(self, seed: int = 0) -> Tensor | None:
        shape = self.patch.noise_shape()
        return None if shape is None else torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(seed))

    def predict(self, patch: nn.Module | None = None) -> Tensor:
        return predict_patched(self.backbone, self.patch.time_only, patch or self.patch, self.x, self.t, self.y)[0]


ALL = list(range(BATCH))


def parts_of(routing: Routings) -> tuple[Routing, ...]:
    """The routing of each patch of one size."""
    return routing if isinstance(routing, tuple) else (routing,)


def randomise(module: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.normal_(0, 0.15, generator=draw)


@pytest.fixture
def case(request) -> Case:
    settings, blank, x, y = PATCHES.get(request.param), lambda: DiT(CONFIG), X, Y
    if settings is None:
        settings, blank = ELSEWHERE[request.param]
        text = torch.randn(BATCH, TOKENS, WIDTH + 1, generator=torch.Generator().manual_seed(2))
        x, y = torch.randn(BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(1)), text
    backbone = blank()
    randomise(backbone, 0)
    freeze(backbone)

    def fresh() -> PatchModule:
        return build_patch(backbone, settings)

    patch = fresh()
    randomise(patch, 1)
    return Case(blank, backbone, patch, fresh, settings, x, T, y)


@rows.on(
    "dmp-soft dmp-no-noise dmp-uniform dmp-gate-per-site dmp-sets-rank dmp-sites prompt lora-all full unet-dmp "
    "unet-dmp-per-site unet-lora unet-full"
)
def test_parameter_groups_hold_what_is_trained_exactly_once(case):
    groups = case.patch.param_groups()
    grouped = [id(tensor) for group in groups for tensor in group["params"]]
    trained = [id(tensor) for tensor in case.patch.parameters() if tensor.requires_grad]
    assert sorted(grouped) == sorted(trained)
    assert trained
    assert all(group["lr"] > 0 and group["params"] for group in groups)
    assert len({group["name"] for group in groups}) == len(groups)


@rows.on(
    "dmp-soft dmp-depth dmp-prepend-few dmp-uniform dmp-gate-per-site dmp-sets dmp-rank dmp-sets-rank dmp-sites "
    "prompt-prepend lora-qkv lora-proj lora-mlp lora-all full pixart-dmp unet-dmp unet-dmp-up unet-dmp-sites "
    "unet-lora"
)
def test_the_count_that_is_announced_is_the_count_there_is(case):
    assert case.patch.added == sum(
        tensor.numel() for name, tensor in case.patch.named_parameters() if not name.endswith(UNCOUNTED)
    )
    assert case.backbone.spec.parameters == sum(tensor.numel() for tensor in case.backbone.parameters())
    with torch.device("meta"):  # a report needs no weights
        assert build_patch(freeze(case.blank()), case.settings).added == case.patch.added


@rows.on(
    "dmp-soft dmp-topk dmp-random dmp-gate-t dmp-gate-per-site dmp-sets dmp-rank dmp-sets-rank dmp-sites prompt lora "
    "lora-all full pixart-dmp pixart-lora unet-dmp unet-prompt unet-lora unet-full"
)
def test_a_fresh_patch_is_its_backbone_bit_for_bit(case):
    patch, alone = case.fresh(), case.backbone.denoise(case.x, case.t, case.y)
    for noise in (None, case.noise()):
        assert torch.equal(predict_patched(case.backbone, patch.time_only, patch, case.x, case.t, case.y, noise)[0], alone)


@rows.on("dmp-soft dmp-random dmp-sets-rank dmp-random-start prompt-random-start lora-all full pixart-lora unet-dmp")
def test_every_fresh_patch_is_alike_and_global_randomness_goes_on(case):
    torch.manual_seed(1)
    state, one = torch.get_rng_state(), case.fresh().state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    two = case.fresh().state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@rows.on("dmp-soft dmp-random prompt lora full pixart-full unet-dmp unet-lora")
def test_training_mode_makes_no_difference(case):
    predictions = [case.predict(case.patch.train(mode)) for mode in (True, False)]
    assert torch.equal(*predictions)
    made = case.patch.train().plan(case.c())
    assert not any(module.training for module in (made.backbone or case.backbone).modules())


@rows.on("dmp-soft prompt lora-qkv lora-proj lora-mlp lora-all full pixart-lora pixart-full unet-dmp unet-lora unet-full")
def test_a_change_of_weights_folds_into_a_plain_backbone(case):
    merged = case.patch.merged()
    assert (merged is None) == (case.plan(ALL).backbone is None)
    if merged is None:
        return
    assert list(merged) == list(case.backbone.state_dict())
    assert not any(value.requires_grad for value in merged.values())
    plain = case.blank()
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain.eval().denoise(case.x, case.t, case.y), case.predict(), rtol=0, atol=1e-5)


@rows.on(
    "dmp-soft dmp-soft-per-sample dmp-topk dmp-depth dmp-no-noise dmp-prepend-one dmp-hard dmp-uniform dmp-gate-t "
    "dmp-gate-per-site dmp-sets-topk dmp-sets-rank dmp-sites-prepend prompt prompt-random-start lora-all full "
    "pixart-dmp pixart-full unet-dmp unet-lora"
)
def test_training_changes_the_patch_and_never_the_backbone(case):
    patch, weights = case.fresh(), {name: value.clone() for name, value in case.backbone.state_dict().items()}
    before, target = {name: value.clone() for name, value in patch.state_dict().items()}, torch.randn_like(case.x)
    start = case.predict(patch)
    optimizer = torch.optim.AdamW(patch.param_groups(), weight_decay=0.0)
    for step in range(4):
        prediction, routing = predict_patched(case.backbone, patch.time_only, patch, case.x, case.t, case.y, case.noise(step))
        loss = (prediction[:, : case.channels] - target).square().mean() + sum(patch.penalty(routing).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(value, weights[name]) for name, value in case.backbone.state_dict().items())
    assert all(tensor.grad is None for tensor in case.backbone.parameters())
    changed = {name for name, value in patch.state_dict().items() if not torch.equal(value, before[name])}
    expected = {name for name, tensor in patch.named_parameters() if tensor.requires_grad}
    lone = isinstance(case.each[0], DmpPatch) and case.choices == 1
    assert changed == ({"prompt_embeddings"} if lone else expected)  # a lone prompt's gate is 1
    assert not torch.equal(case.predict(patch), start)
    assert all(tensor.isfinite().all() for tensor in patch.parameters())


@rows.on(
    "dmp-depth dmp-prepend-one dmp-prepend-gate-t+y dmp-random-start dmp-rank dmp-sites prompt prompt-prepend "
    "lora-qkv lora-proj lora-mlp full pixart-dmp-prepend pixart-lora unet-dmp-up unet-dmp-sites unet-dmp-uniform "
    "unet-prompt unet-lora"
)
def test_the_patch_is_applied(case):
    assert (case.predict() - case.backbone.denoise(case.x, case.t, case.y)).abs().max() > 1e-4


@rows.with_each(
    "noisy",
    (False, True),
    "dmp-soft dmp-topk dmp-depth dmp-prepend-one dmp-gate-per-site dmp-sets-topk unet-dmp-topk | dmp-topk-all "
    "dmp-hard dmp-uniform dmp-random dmp-sites-prepend unet-dmp-uniform",
)
def test_routing_is_a_mixture_for_each_sample_and_block(case, noisy):
    routing = case.plan(ALL, case.noise() if noisy else None).routing
    assert routing is not None
    for patch, one in zip(case.each, parts_of(routing), strict=True):
        assert one.gates.shape == (patch.shape.sites, BATCH, patch.shape.choices)
        assert one.gates.dtype == torch.float32
        assert (one.gates >= 0).all()
        torch.testing.assert_close(one.gates.sum(-1), torch.ones(one.gates.shape[:2]))
        if one.load is not None:
            assert one.load.shape == one.gates.shape[::2]
            assert ((one.load >= 0) & (one.load <= BATCH)).all()


@rows.with_each(
    "noisy",
    (False, True),
    "dmp-soft dmp-soft-per-sample dmp-topk dmp-topk-all dmp-prepend-one dmp-gate-per-site unet-dmp unet-dmp-topk | "
    "dmp-no-noise dmp-hard dmp-uniform prompt lora full",
)
def test_penalties_are_finite_scalars_that_can_be_descended(case, noisy):
    losses = case.patch.penalty(case.plan(ALL, case.noise() if noisy else None).routing)
    for loss in losses.values():
        assert loss.shape == ()
        assert loss.isfinite()
        assert loss >= 0
        assert loss.requires_grad
    assert bool(losses) == (case.trained_gate and case.settings.balance != "none")
    assert case.patch.penalty(None) == {}


@rows.with_each(
    "noisy",
    (False, True),
    "dmp-soft dmp-soft-per-sample dmp-topk dmp-prepend-few unet-dmp-topk "
    "| dmp-random dmp-prepend-gate-t+y prompt lora full pixart-dmp",
)
def test_a_batch_of_one(case, noisy):
    plan = case.plan([2], case.noise() if noisy else None)
    prediction = case.run(plan, [2])
    assert prediction.shape == (1, *case.predict().shape[1:])
    assert prediction.isfinite().all()
    assert all(loss.isfinite() for loss in case.patch.penalty(plan.routing).values())


@rows.with_each(
    "noisy",
    (False, True),
    "dmp-soft dmp-topk dmp-sets-topk unet-dmp | dmp-prepend dmp-hard dmp-random dmp-gate-per-site prompt lora full pixart-dmp",
)
def test_a_plan_does_not_depend_on_the_neighbours(case, noisy):
    noise = case.noise() if noisy else None
    together = case.run(case.plan(ALL, noise), ALL)
    for i in ALL:
        alone = case.run(case.plan([i], noise), [i])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)


@rows.on("dmp-soft dmp-random dmp-sets-rank prompt lora full unet-dmp unet-lora")
def test_plans_are_deterministic_and_leave_nothing_behind(case):
    """Gates are returned, never kept: two plans of one patch do not disturb each other."""
    attributes, first = set(vars(case.patch)), case.plan(ALL)
    one = case.run(first, ALL)
    case.patch.plan(case.c().flip(0), case.noise())
    assert torch.equal(case.run(first, ALL), one)
    assert torch.equal(case.predict(), one)
    assert set(vars(case.patch)) == attributes


@rows.on("dmp-soft dmp-no-noise prompt lora full unet-dmp")
def test_calling_the_module_is_its_plan(case):
    called, planned = case.patch(case.c(), case.noise()), case.plan(ALL, case.noise())
    assert torch.equal(case.run(called, ALL), case.run(planned, ALL))


@rows.on(
    "dmp-soft dmp-topk-all dmp-prepend-one dmp-no-noise dmp-hard dmp-uniform dmp-random dmp-sets prompt "
    "unet-dmp-per-site unet-dmp-uniform"
)
def test_gate_noise_is_felt_only_where_it_is_drawn(case):
    noise = case.noise()
    if noise is None:
        assert not any(name.endswith(UNCOUNTED) and tensor.requires_grad for name, tensor in case.patch.named_parameters())
        return
    quiet, noisy = case.plan(ALL).routing, case.plan(ALL, noise).routing
    for one, other in zip(parts_of(quiet), parts_of(noisy), strict=True):
        assert torch.equal(one.gates, other.gates) == (case.choices == 1)


@rows.on("dmp-soft dmp-depth dmp-prepend dmp-rank dmp-sites dmp-sites-prepend prompt pixart-dmp-prepend unet-dmp unet-dmp-up")
def test_an_edit_leaves_the_tokens_it_was_given_as_they_were(case):
    edit = case.plan(ALL).edit
    assert edit is not None
    for number, site in enumerate(case.backbone.spec.sites):
        tokens = torch.randn(BATCH, site.tokens, site.width, generator=torch.Generator().manual_seed(5))
        kept = tokens.clone()
        edit(number, tokens)
        assert torch.equal(tokens, kept)


@rows.on("dmp-soft dmp-no-noise dmp-gate-per-site dmp-sets-rank dmp-sites prompt lora-all full pixart-lora unet-dmp unet-lora")
def test_a_saved_patch_is_the_same_patch(case, tmp_path):
    write_tensors(tmp_path / "patch.safetensors", case.patch.state_dict())
    tensors, _ = read_tensors(tmp_path / "patch.safetensors")
    loaded = case.fresh()
    found = loaded.load_state_dict(tensors)
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert all(torch.equal(value, tensors[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(case.predict(loaded), case.predict())


def test_every_row_is_asked_for_what_it_promises():
    assert not rows.forgotten()
