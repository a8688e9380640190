"""The training loop, one for a fresh backbone and for a patch on a frozen one.

Everything random is a function of (seed, step, sample): resumed equals uninterrupted, bit for bit on a CPU.
"""

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from dmpctl.batches.latents import unpack
from dmpctl.diffusion.objective import HybridObjective
from dmpctl.diffusion.schedule import schedule_of
from dmpctl.errors import NumericalError, UsageError
from dmpctl.models.speed import cast_frozen, compile_blocks
from dmpctl.processes.command import Command
from dmpctl.processes.sharded import is_sharded, whole
from dmpctl.processes.stop import Asked, Stop, interrupted
from dmpctl.runs import checkpoint
from dmpctl.runs.checkpoint import Saver
from dmpctl.runs.records import Description
from dmpctl.runs.rundir import RunDir
from dmpctl.training.clock import Averages, Clock
from dmpctl.training.fsdp import shard
from dmpctl.training.inputs import InputMaker, Inputs, one_ahead
from dmpctl.training.subject import Subject
from dmpctl.training.trackers import Trackers, remember
from dmpctl.types import ProgressTask, Routings


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
        self, subject: Subject[Description], inputs: InputMaker, run: RunDir, command: Command, accelerator: Accelerator
    ) -> None:
        """Prepare all but the weights of a checkpoint; UsageError where the settings do not fit the subject or the processes."""
        self.subject, self.inputs, self.run, self.accelerator = subject, inputs, run, accelerator
        self.command, self.settings, self.ranks, self.device = command, command.settings, command.ranks, accelerator.device
        train, parts = self.settings.train, self.ranks.world * self.settings.train.grad_accum
        cast_frozen(subject.network, self.settings)
        if train.fsdp:
            shard(subject, self.ranks)
        groups, betas = [dict(group) for group in subject.param_groups()], (train.beta1, train.beta2)
        self.plain = torch.optim.AdamW(groups, betas=betas, weight_decay=train.weight_decay)  # its state has parameters as keys
        self.rates = [group["lr"] for group in self.plain.param_groups]
        if is_sharded(subject.module):  # nothing of it is left for accelerate to wrap
            self.module, self.optimizer = subject.module, accelerator.prepare_optimizer(self.plain)
        else:
            self.module, self.optimizer = accelerator.prepare(subject.module, self.plain)
        compile_blocks(subject.network, self.settings.launch)
        self.parameters = {n: p for n, p in subject.module.named_parameters() if p.requires_grad}
        self.ema = {n: p.detach().clone() for n, p in self.parameters.items()} if train.ema else {}
        self.schedule = schedule_of(inputs.spec.schedule).to(self.device)
        self.objective = HybridObjective(self.schedule, inputs.spec.learned_sigma, self.settings.objective)
        self.density = None if inputs.density is None else inputs.density.to(self.device)
        if train.batch_size % parts:
            raise UsageError(
                f"a batch of {train.batch_size} does not divide over {self.ranks.world} processes x {train.grad_accum} parts",
                f"take a --batch-size that is a multiple of {parts}, another --num-processes or --grad-accum",
            )
        self.step, self.bad_steps, self.trackers = 0, 0, Trackers(command.progress)
        self.saved, self.saved_at = 0, time.monotonic()  # the step of the last checkpoint, and when it was

    def resume(self) -> tuple[int, list[str]]:
        """Go back to the newest checkpoint that is whole: its step (0 if there is none), and what is wrong with newer ones."""
        state, wrong = checkpoint.newest(self.run.checkpoints)
        self.ranks.wait()
        if state is not None:
            checkpoint.restore(state, self.subject.module, self.plain, self.ema)
            if self.accelerator.scaler is not None and state.scaler:
                self.accelerator.scaler.load_state_dict(state.scaler)
            self.step = self.saved = state.step
        if self.ranks.largest(self.step, -self.step) != [self.step, -self.step]:
            raise UsageError(f"not all processes find the same checkpoints in {self.run.path}", "put --run on a disk they share")
        if self.ranks.is_main:
            checkpoint.put_aside(self.run.checkpoints, self.step)
            if self.settings.save.track is not None:
                remember(self.run)
            wrong += self.run.metrics.cut_back(self.step)
        return self.step, wrong

    def train(self) -> None:
        """Train to `--iters`, saving on the way.

        Raises Interrupted after saving on a signal, NumericalError after too many steps in a row that are not finite, or
        where no step of all was: among those no checkpoint is due, so that the last one is from before.
        """
        settings, averages = self.settings, Averages()
        self.saved_at = time.monotonic()
        save, iters = settings.save, settings.train.iters
        shown = self.command.progress.track(f"training the {self.subject.kind}", iters, self.step)
        saver = Saver(self.run.checkpoints, self.subject.kind, save.keep_last, save.keep_every)
        inputs = self.inputs.from_step(self.step)
        if self.device.type != "cpu":  # which has no time to spare
            inputs = one_ahead(inputs)
        with Stop() as stop, shown as task, saver, closing(inputs) as stream:
            clock = Clock(settings.train.batch_size)
            while self.step < iters:
                try:
                    with self._soon(stop):
                        taken = clock.next_of(stream)
                    figures, number, late = self._one_step(taken, stop)
                except Asked:  # this step is not taken
                    self.optimizer.zero_grad(set_to_none=True)
                    number, late = stop.got, False
                else:
                    averages.add(figures)
                    self.step += 1
                    if self.step % save.log_every == 0 or self.step == iters:
                        self._log(averages.take(), clock, task)
                    number = stop.got if self.ranks.world == 1 else number  # alone, nobody need be asked
                due = (late or self.step % save.save_every == 0) and not self.bad_steps
                if self.step == iters:
                    self.refuse_none_applied()
                if (number or due or self.step == iters) and self.step > self.saved:
                    self.save(saver)
                saver.check()
                if number:
                    saver.finish()
                    self.trackers.finish()
                    self.ranks.wait()
                    where = f"saved at step {self.step}" if self.saved else "before its first step was done"
                    raise interrupted(number, where, f"go on with: {self.command.again}")
            saver.finish()
        self.trackers.finish()
        self.ranks.wait()

    def _soon(self, stop: Stop) -> AbstractContextManager[None]:
        """A signal ends a long step of a process that is alone; others would wait for its part of a sum."""
        return stop.soon() if self.ranks.world == 1 else nullcontext()

    def _noised(self, inputs: Inputs) -> Noised:
        """The batch on the device: latents, drawn from their moments, and noised to their timesteps."""
        here = inputs.to(self.device)
        cached = here.images.is_floating_point()  # moments that the images were encoded into before (batches.latents)
        moments = unpack(here.images) if cached else self.inputs.codec.encode(here.images)
        x0 = moments.mean
        if moments.logvar is not None and here.latent_noise is not None:
            x0 = x0 + (0.5 * moments.logvar).exp() * here.latent_noise
        return Noised(x0, self.schedule.add_noise(x0, here.t, here.noise), here.t, here.noise, here.cond, here.gate_noise)

    @property
    def skipped(self) -> int:
        """Steps so far that changed nothing, since they were not finite: AdamW counts those that it took."""
        taken = max((int(state["step"]) for state in self.plain.state.values()), default=0)
        return self.step - taken

    def refuse_none_applied(self) -> None:
        """NumericalError where no step so far was applied: what is there is what training began with."""
        if self.step and self.skipped == self.step:
            raise NumericalError(
                f"none of {self.step} steps could be applied: the loss or its gradient was never finite",
                "look at the backbone's weights and the images; nothing was published",
            )

    def _one_step(self, inputs: Inputs, stop: Stop) -> tuple[dict[str, Tensor], int, bool]:
        """One optimizer step: scalars to log, the signal that some process got (0: none), and whether it is time to save.

        A loss or gradient that is not finite on any of them is counted and skipped by all. Alone, a signal ends it (Asked).
        """
        with self._soon(stop):
            batch = self._noised(inputs)
            figures = self._backward(batch)
        clip = self.settings.train.grad_clip
        norm = self.accelerator.clip_grad_norm_(self.parameters.values(), math.inf if clip is None else clip)
        figures["grad_norm"] = whole(torch.as_tensor(norm, device=self.device))
        finite = figures["loss"].isfinite()
        if self.accelerator.scaler is None:  # a scaler skips such steps by itself
            finite = finite & figures["grad_norm"].isfinite()
        waited = time.monotonic() - self.saved_at >= 60 * self.settings.save.save_minutes
        bad, number, late = self.ranks.largest(int(not finite), stop.got, int(waited))
        if bad:
            self._skip(batch)
            return {}, number, bool(late)
        factor = self._rate_factor()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.bad_steps = 0
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        return figures, number, bool(late)

    def _backward(self, batch: Noised) -> dict[str, Tensor]:
        """Gradients of the global batch's loss, in --grad-accum parts; returns the loss and its terms, to log."""
        parts, subject = batch.parts(self.settings.train.grad_accum), self.subject
        figures: dict[str, Tensor] = {}
        world = self.ranks.world  # gradients are averaged over the processes, and each has those of its own samples only
        if len(parts) > 1:  # balance is of all samples, so their gates are made once more, without a block
            with self.accelerator.no_sync(self.module), self.accelerator.autocast():
                balance = self._balance(subject.route(self.module, batch.t, batch.cond, batch.gate_noise))
                if balance:
                    self.accelerator.backward(self._total(balance) * world)
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
                self.accelerator.backward(mean + self._total(balance) * world)
            found = {"loss": mean + self._total(balance), "mse": losses.mse.mean() / len(parts), **balance}
            found |= {} if losses.vb is None else {"vb": losses.vb.mean() / len(parts)}
            figures |= {name: (figures[name] + value if name in figures else value).detach() for name, value in found.items()}
        return figures

    def _balance(self, routing: Routings) -> dict[str, Tensor]:
        """Balance losses of the global batch."""
        return self.subject.penalty(self.ranks.gathered(routing))

    def _total(self, balance: Mapping[str, Tensor]) -> Tensor:
        return sum(balance.values(), torch.zeros((), device=self.device))

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
            samples = self.inputs.order(self.step).at(self.step)[1][:8].tolist()
            where = f"last at step {self.step} with timesteps {batch.t[:8].tolist()} of samples {samples}"
            raise NumericalError(
                f"the loss or its gradient was not finite {self.bad_steps} steps in a row, {where}",
                "lower the learning rates; the last checkpoint is good",
            )

    def _log(self, means: dict[str, float], clock: Clock, task: ProgressTask) -> None:
        speed, means = clock.take(), self.ranks.mean(means)
        skipped = {"skipped": float(self.skipped)} if self.skipped else {}
        shown = {"loss": means.get("loss", math.nan), "steps/s": speed["steps_per_sec"], **skipped}
        task.advance(int(speed.pop("steps")), **shown)
        if self.ranks.is_main:
            rates = [g["lr"] for g in self.optimizer.param_groups]
            figures: dict[str, float | list[float]] = {**means, "lr": rates, **speed, **skipped}
            figures = {k: v for k, v in figures.items() if not isinstance(v, float) or math.isfinite(v)}
            self.run.metrics.append({"step": self.step, **figures})
            self.trackers.log(self.step, figures)

    def save(self, saver: Saver) -> None:
        """Write a checkpoint of this step (main process); what is shared out is put together by all.

        NumericalError where a weight is not finite: no checkpoint is made of that.
        """
        self.saved, self.saved_at = self.step, time.monotonic()
        state = self._state() if self.ranks.is_main or is_sharded(self.subject.module) else None
        for name, value in state.raw.items() if state is not None else ():
            if not torch.isfinite(value).all():
                raise NumericalError(
                    f"{name} is no longer finite at step {self.step}", "lower the rates: --prompt-lr, --gate-lr or --lr"
                )
        if state is not None and self.ranks.is_main:
            untrained = {n: v for n, v in self.subject.module.state_dict().items() if n not in self.parameters}
            saver.save(state, untrained, self.subject.described)

    def _state(self) -> checkpoint.TrainerState:
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
        return checkpoint.capture(self.step, self.subject.module, self.plain, self.ema, scaler)
