"""From noise to x0: DDPM, DDIM, PNDM, DPM-Solver++, UniPC over respaced timesteps; Euler, Heun, dopri5, Euler-Maruyama of flows.

A sampler is a generator of the states after each of its steps, so that only the latest is kept.
Shapes: B batch, C/H/W channels, height, width. States are float32 whatever the denoiser's dtype.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, assert_never, get_args

import torch
from torch import Tensor

from dmpctl.diffusion import dopri5
from dmpctl.diffusion.schedule import FlowSchedule, NoiseSchedule, Schedule, split_prediction
from dmpctl.errors import NumericalError, UsageError
from dmpctl.types import Denoiser, Draw, Inference

EvenSampler = Literal["euler", "heun", "euler-maruyama"]
FlowSampler = Literal["dopri5"] | EvenSampler
Sampler = Literal["ddpm", "ddim", "pndm", "dpm-solver++", "unipc"] | FlowSampler
Predict = Callable[[Tensor, float | Tensor], tuple[Tensor, Tensor | None]]  # x, t -> epsilon or velocity, variance or None
FLOW_SAMPLERS: tuple[FlowSampler, ...] = ("dopri5", *get_args(EvenSampler))
LAST_STEP = 0.04  # of Euler-Maruyama's path, taken without noise (Ma et al. 2024, appendix)

LOWEST_LAMBDA = -5.1  # log(alpha / sigma) below which the solvers are unstable (cosine schedules), as diffusers advises


def sample(
    denoiser: Denoiser,
    draw: Draw,
    schedule: Schedule,
    learned_sigma: bool,
    sampler: Sampler,
    steps: int,
    eta: float = 0.0,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """x0 [B, C, H, W] float32: x_T is the first `draw()`, each later step that adds noise draws once, t descending.

    `schedule` is the whole one; `steps` of dopri5 are the most it may take; `eta` is DDIM's; `on_step` gets the number of steps
    done, None: nobody is told.
    Call it under `torch.no_grad`. UsageError for more steps than the schedule has or a sampler of another kind,
    NumericalError if x0 is not finite.
    """
    x = draw().float()

    def predict(x: Tensor, timestep: float | Tensor) -> tuple[Tensor, Tensor | None]:
        t = torch.as_tensor(timestep, dtype=torch.float32 if flow else torch.int64, device=x.device).expand(len(x))
        return split_prediction(denoiser(x, t), x.shape[1], learned_sigma)

    flow = isinstance(schedule, FlowSchedule)
    refuse_other_kind(sampler, flow)
    match schedule, sampler:
        case NoiseSchedule(), "ddpm":
            states = _ddpm(predict, draw, x, schedule, steps)
        case NoiseSchedule(), "ddim":
            states = _ddim(predict, draw, x, schedule, steps, eta)
        case NoiseSchedule(), "pndm" | "dpm-solver++" | "unipc":
            states = _solved(predict, x, schedule, steps, sampler)
        case FlowSchedule(), "dopri5":
            total = len(schedule)
            states = dopri5.solve(lambda x, time: predict(x, (1 - time) * total)[0], x, steps)
        case FlowSchedule(), "euler" | "heun" | "euler-maruyama":
            states = _along_flow(predict, draw, x, schedule, steps, sampler)
        case _:
            raise ValueError(f"{sampler} does not go with this schedule")
    for done, state in enumerate(states, start=1):
        x = state
        if on_step is not None:
            on_step(done)
    bad = int((~x.isfinite().flatten(1).all(1)).sum())
    if bad:
        raise NumericalError(
            f"{bad} of {len(x)} samples are not finite after {steps} {sampler} steps",
            "check the weights, lower --cfg, or use --precision no",
        )
    return x


def refuse_other_kind(sampler: str, flow: bool) -> None:
    """UsageError for a sampler of diffusions on a flow, or the other way round."""
    if flow and sampler not in FLOW_SAMPLERS:
        raise UsageError(
            f"--sampler {sampler} is for a Gaussian diffusion, this backbone is a flow", "use --sampler heun --steps 50"
        )
    if not flow and sampler in FLOW_SAMPLERS:
        raise UsageError(
            f"--sampler {sampler} is for a flow such as SiT, this backbone is a Gaussian diffusion", "use --sampler ddpm"
        )


def _clipped(x0: Tensor, how: Inference) -> Tensor:
    """x0, within the range that a scheduler file clips it to."""
    return x0.clamp(-how.clip_sample_range, how.clip_sample_range) if how.clip_sample else x0


def _ddpm(predict: Predict, draw: Draw, x: Tensor, schedule: NoiseSchedule, steps: int) -> Iterator[Tensor]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2): learned variance, else beta; x0 clipped if a scheduler file says so."""
    how = schedule.inference or Inference()
    spaced = schedule.respace(schedule.visited(steps)).to(x.device)
    for i in reversed(range(steps)):
        at = torch.tensor([i], device=x.device)
        eps, v = predict(x, int(spaced.timesteps[i]))
        mean = spaced.posterior_mean(_clipped(spaced.predict_x0(x, at, eps), how), x, at)
        fixed = spaced.posterior_log_variance if (how.variance_type or "").startswith("fixed_small") else spaced.log_beta
        log_variance = fixed(at) if v is None else spaced.learned_log_variance(v, at)
        x = mean + (log_variance / 2).exp() * draw() if i else mean
        yield x


def _ddim(predict: Predict, draw: Draw, x: Tensor, schedule: NoiseSchedule, steps: int, eta: float) -> Iterator[Tensor]:
    """Song et al. 2021 (arXiv 2010.02502), eq. 12 and 16; a learned variance is not used. `eta` 0 draws nothing."""
    how = schedule.inference or Inference()
    last = 1.0 if how.set_alpha_to_one is not False else float(schedule.alphas_cumprod[0])
    spaced = schedule.respace(schedule.visited(steps)).to(x.device)
    for i in reversed(range(steps)):
        eps, _ = predict(x, int(spaced.timesteps[i]))
        x0 = _clipped(spaced.predict_x0(x, torch.tensor([i], device=x.device), eps), how)
        abar, prev = float(spaced.alphas_cumprod[i]), float(spaced.alphas_cumprod_prev[i]) if i else last
        sigma = eta * math.sqrt((1 - prev) / (1 - abar) * (1 - abar / prev))  # 0 at the last step, where prev is 1
        x = math.sqrt(prev) * x0 + math.sqrt(max(1 - prev - sigma**2, 0)) * eps
        if sigma > 0:
            x = x + sigma * draw()
        yield x


def _solved(
    predict: Predict, x: Tensor, schedule: NoiseSchedule, steps: int, name: Literal["pndm", "dpm-solver++", "unipc"]
) -> Iterator[Tensor]:
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095), UniPC, bh2 of order 2 (Zhao et al. 2023, arXiv 2302.04867), PNDM.

    By diffusers, timesteps included; deterministic, so nothing is drawn. The first two visit "linspace" without 0, as the last
    step goes to no noise, unless a scheduler file says otherwise; PNDM (Liu et al. 2022, arXiv 2202.09778) predicts more often
    than it has steps.
    """
    import diffusers

    abar, how = schedule.alphas_cumprod, schedule.inference or Inference()
    usable = int(((abar / (1 - abar)).log() / 2 >= LOWEST_LAMBDA).sum()) if name != "pndm" else len(abar) + 1
    if steps >= usable:
        raise UsageError(f"{name} takes at most {usable - 1} steps here, {steps} were asked for", "use --sampler ddim")
    schedule.visited(steps)  # which refuses what goes beyond the schedule
    spacing = how.timestep_spacing or ("leading" if name == "pndm" else "linspace")
    own: dict[str, Any] = {
        "trained_betas": schedule.betas.tolist(),
        "timestep_spacing": spacing,
        "steps_offset": how.steps_offset,
    }
    match name:
        case "pndm":
            kind: Any = diffusers.PNDMScheduler  # untyped
            own |= {"skip_prk_steps": how.skip_prk_steps, "set_alpha_to_one": bool(how.set_alpha_to_one)}
        case "unipc":
            kind = diffusers.UniPCMultistepScheduler
            own |= {"num_train_timesteps": usable, "trained_betas": schedule.betas[:usable].tolist(), "solver_order": 2}
        case "dpm-solver++":
            kind = diffusers.DPMSolverMultistepScheduler
            own |= {"solver_order": 2, "algorithm_type": "dpmsolver++", "lambda_min_clipped": LOWEST_LAMBDA}
        case _:
            assert_never(name)
    solver = kind(**own)
    solver.set_timesteps(steps)
    for timestep in solver.timesteps:
        eps, _ = predict(x, int(timestep))
        x = solver.step(eps, timestep, x, return_dict=False)[0]
        yield x


def _along_flow(
    predict: Predict,
    draw: Draw,
    x: Tensor,
    schedule: FlowSchedule,
    steps: int,
    sampler: Literal["euler", "heun", "euler-maruyama"],
) -> Iterator[Tensor]:
    """The probability flow dx = v ds from noise (level 1) to images (0), `steps` even steps (Ma et al. 2024, eq. 3).

    Heun's second stage costs a second prediction in every step but the last. Euler-Maruyama is SiT's own SDE of the same
    marginals (their eq. 6; diffusion form "sigma", last step "Mean"): drift v + w score and noise sqrt(2 w step) with w = s;
    the last 4 % of the path are one step of its drift, without noise.
    """
    total = float(len(schedule))
    if sampler == "euler-maruyama" and steps > 1:
        levels = [*torch.linspace(1.0, LAST_STEP, steps, dtype=torch.float64).tolist(), 0.0]
    else:
        levels = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64).tolist()
    for now, then in itertools.pairwise(levels):
        v, _ = predict(x, now * total)
        step = now - then
        match sampler:
            case "euler":
                x = x + step * v
            case "heun":
                guess = x + step * v
                x = x + step * (v + predict(guess, then * total)[0]) / 2 if then else guess
            case "euler-maruyama":
                score = ((1 - now) * v - x) / now  # the noise is x - (1 - s) v, the score its negative over s
                x = x + step * (v + now * score)
                if then:
                    x = x + math.sqrt(2 * now * step) * draw()
            case _:
                assert_never(sampler)
        yield x
