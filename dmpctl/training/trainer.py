"""The training loop, the same for a fresh backbone and for a patch on a frozen one.

Everything random is a function of (seed, step, sample): resumed equals uninterrupted, bit for bit on a CPU.
"""

import math
from collections.abc import Generator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from dmpctl.batches.caption_states import CaptionNumbers
from dmpctl.batches.latents import unpack
from dmpctl.batches.loader import StepBatches, batches, order_of
from dmpctl.codecs.identity import Identity
from dmpctl.diffusion.objective import HybridObjective
from dmpctl.diffusion.schedule import FlowSchedule, schedule_of
from dmpctl.diffusion.timesteps import TimestepDensity
from dmpctl.errors import NumericalError, UsageError
from dmpctl.models.conditions import Conditions
from dmpctl.models.speed import cast_frozen, compile_blocks
from dmpctl.processes.ranks import ranks_of
from dmpctl.processes.sharded import is_sharded, whole
from dmpctl.processes.stop import Stop, interrupted
from dmpctl.rng import StepDraws
from dmpctl.runs import checkpoint
from dmpctl.runs.rundir import RunDir
from dmpctl.runs.saver import Saver
from dmpctl.settings.model import Settings
from dmpctl.training.clock import Averages, Clock
from dmpctl.training.fsdp import shard
from dmpctl.training.inputs import Inputs, one_ahead
from dmpctl.training.subject import Subject
from dmpctl.training.trackers import Trackers, remember
from dmpctl.types import BackboneSpec, Codec, Moments, Progress, ProgressTask, Routings, Source


@dataclass(frozen=True)
class Noised:
    """One training batch: x_t is x0 with `noise` at `t`; `cond` None for an unconditional backbone."""

    x0: Tensor
    x_t: Tensor
    t: Tensor
    noise: Tensor
    cond: Tensor | None
    gate_noise: Tensor | None

    def parts(self, count: int) -> "list[Noised]":
        """So many equal batches, in order."""
        size = len(self.t) // count
        each = [[None] * count if value is None else value.split(size) for value in vars(self).values()]
        return [self] if count == 1 else [Noised(*fields) for fields in zip(*each, strict=True)]


class Trainer:
    """Trains one subject inside an open run directory, from its newest checkpoint if there is one."""

    def __init__(
        self,
        subject: Subject,
        spec: BackboneSpec,
        codec: Codec,
        source: Source,
        settings: Settings,
        run: RunDir,
        accelerator: Accelerator,
        density: TimestepDensity | None = None,
        conditions: Conditions | None = None,
        numbers: CaptionNumbers | None = None,
    ) -> None:
        """`density`: of timesteps, None: uniform. `conditions`: what the backbone is told, None: nothing; `numbers`: which of
        them each image has, None: its label.
        """
        self.conditions, self.numbers = conditions, numbers
        self.subject, self.spec, self.codec, self.source = subject, spec, codec, source
        self.settings, self.run, self.accelerator = settings, run, accelerator
        train, self.ranks = settings.train, ranks_of(accelerator)
        self.device = accelerator.device
        cast_frozen(subject.network, settings)
        groups = shard(subject, self.ranks) if train.fsdp else subject.groups
        optimizer = torch.optim.AdamW(
            [dict(group) for group in groups], betas=(train.beta1, train.beta2), weight_decay=train.weight_decay
        )
        self.rates = [group["lr"] for group in optimizer.param_groups]
        if is_sharded(subject.module):  # nothing of it is left for accelerate to wrap
            self.module, self.optimizer = subject.module, accelerator.prepare_optimizer(optimizer)
        else:
            self.module, self.optimizer = accelerator.prepare(subject.module, optimizer)
        compile_blocks(subject.network, settings.launch)
        self.parameters = {n: p for n, p in subject.module.named_parameters() if p.requires_grad}
        self.ema = {n: p.detach().clone() for n, p in self.parameters.items()} if train.ema else {}
        self.schedule = schedule_of(spec.schedule).to(self.device)
        self.objective = HybridObjective(self.schedule, spec.learned_sigma, settings.objective)
        self.density = None if density is None else density.to(self.device)
        parts = self.ranks.world * train.grad_accum
        if train.batch_size % parts:
            raise UsageError(
                f"a batch of {train.batch_size} does not divide over {self.ranks.world} processes x {train.grad_accum} parts",
                f"take a --batch-size that is a multiple of {parts}, another --num-processes or --grad-accum",
            )
        self.draws = StepDraws(settings.run.seed, train.batch_size, self.ranks.rank, self.ranks.world)
        self.step, self.bad_steps, self.trackers = 0, 0, Trackers()

    def resume(self) -> tuple[int, list[str]]:
        """Go back to the newest checkpoint that is whole: its step (0 if there is none), and what is wrong with newer ones."""
        state, wrong = checkpoint.newest(self.run.checkpoints)
        self.ranks.wait()
        if state is not None:
            checkpoint.restore(state, self.subject.module, self._plain_optimizer(), self.ema)
            if self.accelerator.scaler is not None and state.scaler:
                self.accelerator.scaler.load_state_dict(state.scaler)
            self.step = state.step
        if self.ranks.largest(self.step, -self.step) != [self.step, -self.step]:
            raise UsageError(f"not all processes find the same checkpoints in {self.run.path}", "put --run on a disk they share")
        if self.ranks.is_main:
            checkpoint.put_aside(self.run.checkpoints, self.step)
            if self.settings.save.track is not None:
                remember(self.run)
            self.run.cut_metrics(self.step)
        return self.step, wrong

    def train(self, progress: Progress, again: str) -> None:
        """Train to `--iters`, saving on the way; `again` is the command that goes on after an interruption.

        Raises Interrupted after saving on a signal, NumericalError after too many steps in a row that are not finite:
        among those no checkpoint is due, so that the last one is from before.
        """
        settings, averages = self.settings, Averages()
        save, iters = settings.save, settings.train.iters
        shown = progress.track(f"training the {self.subject.kind}", iters, self.step)
        saver = Saver(self.run.checkpoints, self.subject.kind, save.keep_last, save.keep_every)
        inputs = self._inputs() if self.device.type == "cpu" else one_ahead(self._inputs())  # a CPU has no time to spare
        with Stop() as stop, shown as task, saver, closing(inputs) as stream:
            clock = Clock(settings.train.batch_size)
            while self.step < iters:
                with clock.waiting():
                    taken = next(stream)
                figures, number = self._one_step(taken, stop)
                averages.add(figures)
                self.step += 1
                clock.tick()
                if self.step % save.log_every == 0 or self.step == iters:
                    self._log(averages.take(), clock, task)
                number = stop.got if self.ranks.world == 1 else number  # alone, nobody need be asked
                due = self.step % save.save_every == 0 and not self.bad_steps
                if number or due or self.step == iters:
                    self.save(saver)
                saver.check()
                if number:
                    saver.finish()
                    self.trackers.finish()
                    self.ranks.wait()
                    raise interrupted(number, f"saved at step {self.step}", f"go on with: {again}")
            saver.finish()
        self.trackers.finish()
        self.ranks.wait()

    def _inputs(self) -> Generator[Inputs, None, None]:
        """The inputs of this step and all later ones; each kind of noise has a stream of its own."""
        data, train, ranks = self.settings.data, self.settings.train, self.ranks
        mirror = self.source.mirror if data.hflip is None else data.hflip
        seed, start = self.settings.run.seed, self.step
        order = StepBatches(len(self.source), train.batch_size, seed, start, ranks.rank, ranks.world, order_of(self.source))
        with closing(batches(self.source, order, mirror, data.num_workers, self.numbers)) as stream:
            for step, (images, labels) in enumerate(stream, start):
                yield self._drawn(step, images, labels)

    def _drawn(self, step: int, images: Tensor, labels: Tensor) -> Inputs:
        shape, gates = self.spec.latent_shape, self.subject.gate_noise_shape
        exact = isinstance(self.codec, Identity) and not images.is_floating_point()
        return Inputs(
            images,
            None if exact else self.draws.at(step, "latent").normal(*shape),
            self._timesteps(step),
            self.draws.at(step, "noise").normal(*shape),
            self._told(step, labels),
            None if gates is None else self.draws.at(step, "gate").normal(*gates),
        )

    def _timesteps(self, step: int) -> Tensor:
        """int64 [B], uniform or of the density; of a flow floating, uniform between the two ends."""
        draws = self.draws.at(step, "timestep")
        if self.density is not None:
            return self.density.draw(draws.uniform())
        steps = self.spec.schedule.steps
        return draws.uniform() * steps if isinstance(self.schedule, FlowSchedule) else draws.integers(steps)

    def _told(self, step: int, labels: Tensor) -> Tensor | None:
        """What the backbone is told of each sample, for some of them that there is nothing to tell."""
        if self.conditions is None:
            return None
        dropped = self.draws.at(step, "label").uniform() < self.settings.objective.class_dropout
        null = self.conditions.null
        return self.conditions.of(labels if null is None else torch.where(dropped, null, labels))

    def _noised(self, inputs: Inputs) -> Noised:
        """The batch on the device: latents, and what becomes of them at their timesteps."""
        here = inputs.to(self.device)
        moments = self._moments(here.images)
        x0 = moments.mean
        if moments.logvar is not None and here.latent_noise is not None:
            x0 = x0 + (0.5 * moments.logvar).exp() * here.latent_noise
        return Noised(x0, self.schedule.add_noise(x0, here.t, here.noise), here.t, here.noise, here.cond, here.gate_noise)

    def _moments(self, images: Tensor) -> Moments:
        """Posterior of a batch of images, or of what they were encoded into before (`data.latents`)."""
        return unpack(images) if images.is_floating_point() else self.codec.encode(images)

    def _one_step(self, inputs: Inputs, stop: Stop) -> tuple[dict[str, Tensor], int]:
        """One optimizer step: scalars to log, and the signal that some process got (0: none).

        A loss or gradient that is not finite on any of them is counted and skipped by all.
        """
        batch = self._noised(inputs)
        figures = self._backward(batch)
        clip = self.settings.train.grad_clip
        norm = self.accelerator.clip_grad_norm_(self.parameters.values(), math.inf if clip is None else clip)
        figures["grad_norm"] = whole(torch.as_tensor(norm, device=self.device))
        finite = figures["loss"].isfinite()
        if self.accelerator.scaler is None:  # a scaler skips such steps by itself
            finite = finite & figures["grad_norm"].isfinite()
        bad, number = self.ranks.largest(int(not finite), stop.got)
        if bad:
            self._skip(batch)
            return {}, number
        factor = self._rate_factor()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.bad_steps = 0
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        return figures, number

    def _backward(self, batch: Noised) -> dict[str, Tensor]:
        """Gradients of the global batch's loss, in --grad-accum parts; the loss and what it is made of, to log."""
        parts, subject = batch.parts(self.settings.train.grad_accum), self.subject
        figures: dict[str, Tensor] = {}
        if len(parts) > 1:  # balance is of all samples, so their gates are made once more, without a block
            with self.accelerator.no_sync(self.module), self.accelerator.autocast():
                balance = self._balance(subject.route(self.module, batch.t, batch.cond, batch.gate_noise))
                if balance:
                    self.accelerator.backward(self._penalty(balance))
            figures |= {"loss": self._total(balance), **balance}
        for number, part in enumerate(parts, 1):
            last = number == len(parts)
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                with self.accelerator.autocast():
                    prediction, routing = subject.predict(self.module, part.x_t, part.t, part.cond, part.gate_noise)
                losses = self.objective(prediction, part.x0, part.x_t, part.t, part.noise)
                each = losses.loss if self.density is None else losses.loss * self.density.weights[part.t]
                balance = self._balance(routing) if len(parts) == 1 else {}
                mean = each.mean() / len(parts)
                self.accelerator.backward(mean + self._penalty(balance))
            found = {"loss": mean + self._total(balance), "mse": losses.mse.mean() / len(parts), **balance}
            found |= {} if losses.vb is None else {"vb": losses.vb.mean() / len(parts)}
            figures |= {name: (figures[name] + value if name in figures else value).detach() for name, value in found.items()}
        return figures

    def _balance(self, routing: Routings) -> dict[str, Tensor]:
        """Balance losses of the global batch."""
        return self.subject.penalty(self.ranks.gathered(routing))

    def _total(self, balance: Mapping[str, Tensor]) -> Tensor:
        return sum(balance.values(), torch.zeros((), device=self.device))

    def _penalty(self, balance: Mapping[str, Tensor]) -> Tensor:
        """What is differentiated: gradients are averaged over the processes, and each has those of its own samples only."""
        return self._total(balance) * self.ranks.world

    def _rate_factor(self) -> float:
        """Learning rate at this step as a share of the full one: linear warm-up, then constant or half a cosine."""
        train = self.settings.train
        if self.step < train.warmup:
            return (self.step + 1) / train.warmup
        if train.lr_schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (self.step - train.warmup) / max(1, train.iters - train.warmup)))
        return 1.0

    @torch.no_grad()
    def _average(self) -> None:
        """Exponential moving average of the trained weights; decay warms up as min(decay, (1 + n) / (10 + n))."""
        if self.ema:
            decay = min(self.settings.train.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), 1 - decay)

    def _skip(self, batch: Noised) -> None:
        """Count a step that is not finite and leave the weights alone; NumericalError after --max-bad-steps in a row."""
        self.bad_steps += 1
        if self.accelerator.scaler is not None:  # it has looked at these gradients, and wants to be told of their end
            self.accelerator.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.bad_steps >= self.settings.train.max_bad_steps:
            run, size, ranks = self.settings.run, self.settings.train.batch_size, self.ranks
            order = StepBatches(len(self.source), size, run.seed, self.step, ranks.rank, ranks.world, order_of(self.source))
            samples = order.at(self.step)[1][:8].tolist()
            where = f"last at step {self.step} with timesteps {batch.t[:8].tolist()} of samples {samples}"
            raise NumericalError(
                f"the loss or its gradient was not finite {self.bad_steps} steps in a row, {where}",
                "lower the learning rates; the last checkpoint is good",
            )

    def _log(self, means: dict[str, float], clock: Clock, task: ProgressTask) -> None:
        speed, means = clock.take(), self.ranks.mean(means)
        task.advance(int(speed.pop("steps")), loss=means.get("loss", math.nan), **{"steps/s": speed["steps_per_sec"]})
        if self.ranks.is_main:
            line = {"step": self.step, **means, "lr": [g["lr"] for g in self.optimizer.param_groups], **speed}
            line = {k: v for k, v in line.items() if not isinstance(v, float) or math.isfinite(v)}
            self.run.log_metrics(line)
            self.trackers.log(line)

    def save(self, saver: Saver) -> None:
        """Write a checkpoint of this step (main process); what is shared out is put together by all."""
        state = self._state() if self.ranks.is_main or is_sharded(self.subject.module) else None
        if state is not None and self.ranks.is_main:
            untrained = {n: v for n, v in self.subject.module.state_dict().items() if n not in self.parameters}
            saver.save(state, untrained, self.subject.described)

    def _state(self) -> checkpoint.TrainerState:
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
        return checkpoint.capture(self.step, self.subject.module, self._plain_optimizer(), self.ema, scaler)

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer inside accelerate's wrapper, whose state is keyed by the parameters themselves."""
        plain: torch.optim.Optimizer = self.optimizer.optimizer
        return plain
