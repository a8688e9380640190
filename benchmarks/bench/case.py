"""One model of a published shape and one batch, with the actions that are timed."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from benchmarks.bench.published import PublishedPatch, published_forward
from dmpctl.backbones.dit import DiT, shape_config
from dmpctl.backbones.dit_weights import digest_of
from dmpctl.codecs.identity import Identity
from dmpctl.diffusion.objective import HybridObjective
from dmpctl.diffusion.schedule import NoiseSchedule
from dmpctl.models.backbone import Loaded, freeze
from dmpctl.models.build import build_patch
from dmpctl.models.patched import Patched, predict_patched
from dmpctl.models.speed import cast_frozen
from dmpctl.sampling.generate import generate
from dmpctl.settings.measuring import Sampling
from dmpctl.settings.methods import Dmp
from dmpctl.settings.training import Objective
from tests.helpers import settings_for


class Case:
    """One model and one batch, and the actions that are timed."""

    def __init__(
        self,
        name: str,
        batch: int,
        device: str = "cpu",
        precision: str = "no",
        compiled: bool = False,
        backbone_dtype: str = "float32",
    ) -> None:
        config = shape_config(name)
        if config is None:
            raise SystemExit(f"{name} is no shape")
        generator = torch.Generator().manual_seed(0)
        self.device, self.precision = device, precision
        self.backbone = DiT(config)
        self.backbone.initialise(generator)
        self.trained = DiT(config)  # as it is, or it would be compiled twice
        self.trained.load_state_dict(self.backbone.state_dict())
        spec = self.backbone.spec
        self.patch = build_patch(self.backbone, Dmp()).to(device)
        self.published = PublishedPatch(self.backbone).to(device)
        self.loaded = Loaded(freeze(self.backbone).to(device), digest_of(self.backbone.state_dict()), name, None)
        self.trained.to(device)
        given = {"precision": precision, "backbone_dtype": backbone_dtype}
        cast_frozen(self.backbone, settings_for("patch", **given))
        if compiled:
            for block in (*self.backbone.blocks, *self.trained.blocks):
                block.compile(fullgraph=True)
        self.schedule = NoiseSchedule.from_spec(spec.schedule).to(device)
        self.objective = HybridObjective(self.schedule, spec.learned_sigma, Objective())
        self.x0 = torch.randn(batch, *spec.latent_shape, generator=generator).to(device)
        self.noise = torch.randn(self.x0.shape, generator=generator).to(device)
        self.t = torch.randint(spec.schedule.steps, (batch,), generator=generator).to(device)
        self.x_t = self.schedule.add_noise(self.x0, self.t, self.noise)
        self.gate_noise = torch.randn(batch, *(self.patch.noise_shape() or ()), generator=generator).to(device)
        self.frozen = torch.optim.AdamW(self.patch.param_groups())
        self.full = torch.optim.AdamW(self.trained.parameters(), 1e-4)
        self.prompts = torch.optim.AdamW(self.published.parameters(), 1e-4)
        self.models = {
            "patched": Patched(self.loaded, self.patch, codec=Identity()),
            "unpatched": Patched(self.loaded, codec=Identity()),
        }
        with torch.no_grad(), self.autocast():
            self.c = self.backbone.embed(self.t, None).float()
            self.tokens = self.backbone.x_embedder(self.x_t) + self.backbone.pos_embed

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")

    @torch.no_grad()
    def forward(self) -> Tensor:
        with self.autocast():
            return self.backbone.denoise(self.x_t, self.t, None)

    def loss(self, prediction: Tensor) -> Tensor:
        return self.objective(prediction.float(), self.x0, self.x_t, self.t, self.noise).loss.mean()

    def frozen_step(self) -> None:
        with self.autocast():
            prediction, routing = predict_patched(self.backbone, False, self.patch, self.x_t, self.t, None, self.gate_noise)
        sum(self.patch.penalty(routing).values(), self.loss(prediction)).backward()
        self.frozen.step()
        self.frozen.zero_grad()

    def gates_and_prompts(self) -> None:
        """All that a patch adds to a step, forward and backward, without a block; the gradient that comes back is at hand."""
        plan = self.patch(self.c, self.gate_noise)
        tokens = self.tokens
        for site in range(len(self.backbone.spec.sites)):  # one after another, as memory is taken and given back between blocks
            tokens = plan.edit(site, tokens)
        penalty = sum(self.patch.penalty(plan.routing).values())
        torch.autograd.backward([tokens, penalty], [self.tokens, torch.ones_like(penalty)])
        self.frozen.zero_grad()

    def full_step(self) -> None:
        with self.autocast():
            prediction = self.trained.denoise(self.x_t, self.t, None)
        self.loss(prediction).backward()
        self.full.step()
        self.full.zero_grad()

    def published_step(self) -> None:
        with self.autocast():
            prediction, importance = published_forward(self.trained, self.published, self.x_t, self.t)
        (self.loss(prediction) + importance).backward()
        self.prompts.step()
        self.prompts.zero_grad()
        self.trained.zero_grad()

    def sample(self, which: str, sampler: str, steps: int) -> None:
        """As many images as the batch has, by `sampling.generate`; latents are not decoded."""
        with self.autocast():
            generate(self.models[which], range(len(self.x0)), Sampling(sampler=sampler, steps=steps), torch.device(self.device))
