"""One training in its run directory: refuse another experiment, go on from the newest checkpoint, train, publish."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic

import torch
from accelerate import Accelerator

from dmpctl.codecs.identity import Identity
from dmpctl.codecs.text import TextEncoder
from dmpctl.images.inventory import recorded
from dmpctl.images.stored import left_out_of, left_out_words
from dmpctl.models.conditions import training_conditions
from dmpctl.models.encode import training_source
from dmpctl.processes.command import Command
from dmpctl.processes.ranks import Ranks
from dmpctl.processes.threads import threads_for
from dmpctl.runs import checkpoint
from dmpctl.runs.records import Description
from dmpctl.runs.rundir import RunDir
from dmpctl.settings.model import Settings
from dmpctl.training.importance import Profile, timestep_density
from dmpctl.training.inputs import InputMaker
from dmpctl.training.subject import D_co, Subject
from dmpctl.training.trackers import refuse_missing
from dmpctl.training.trainer import Trainer
from dmpctl.types import BackboneSpec, Codec, Progress, Source


@dataclass(frozen=True)
class Session(Generic[D_co]):
    """One training: its subject, and the images and captions that it is trained on.

    `digests` (sha256 of what the settings name) are part of the experiment; `facts` are only recorded. `metadata` goes into
    the finished safetensors file, so that it describes itself; None: nothing. `profile` measures the mean squared epsilon
    error of the frozen backbone at some timesteps; None: there is none. `text` reads captions, None: the backbone takes none.
    """

    subject: Subject[D_co]
    codec: Codec
    source: Source
    text: TextEncoder | None
    digests: Mapping[str, str]
    facts: Mapping[str, object]
    metadata: Mapping[str, str] | None = None
    profile: Profile | None = None

    @property
    def command(self) -> str:
        """The command that trains such a subject."""
        return "patch" if self.subject.kind == "patch" else "pretrain"

    @property
    def spec(self) -> BackboneSpec:
        return self.subject.model.spec

    @property
    def identities(self) -> dict[str, str]:
        """sha256 of all that the settings name: backbone, data, and a codec that is not pixels as they are."""
        codec = {} if isinstance(self.codec, Identity) else {"codec_fingerprint": self.codec.fingerprint}
        text = {} if self.text is None else {"text_fingerprint": self.text.revision}
        return dict(self.digests) | codec | text

    def science(self, settings: Settings) -> dict[str, object]:
        """All that makes a run this experiment: settings and the identities of what they name."""
        return science_of(settings) | self.identities


def science_of(settings: Settings) -> dict[str, object]:
    """Flat values that make a run this experiment: a change of one of them is refused on resume.

    More iterations at a constant rate are the same experiment taken further, so --iters counts only under a decay.
    """
    found = settings.science()
    if settings.train.lr_schedule == "constant":
        found.pop("iters", None)
    return found


@dataclass(frozen=True)
class Trained:
    """From which step to which; `seconds` of training, 0 where the run was complete already; steps of all that were `skipped`."""

    start: int
    step: int
    seconds: float
    skipped: int

    @property
    def skipped_words(self) -> str:
        """` (2 steps were skipped: ...)`, "" where none was."""
        return f" ({self.skipped} of all steps were skipped: not finite)" if self.skipped else ""

    @property
    def was_complete(self) -> bool:
        return self.start >= self.step


def train_in(
    run: RunDir, session: Session[Description], settings: Settings, accelerator: Accelerator, progress: Progress
) -> Trained:
    """Train to --iters inside an open run, and put the finished weights into its root.

    UsageError if the run holds another experiment; Interrupted after saving on a signal.
    """
    ranks = Ranks(accelerator.process_index, accelerator.num_processes, accelerator.device)
    command = Command(settings, progress, ranks)
    ranks.wait()  # until the main process has the lock
    run.refuse_other(session.command, session.science(settings), settings.run.allowed)
    refuse_missing(settings.save.track)
    trainer = Trainer(session.subject, inputs_of(session, run, command), run, command, accelerator)
    began = time.perf_counter()
    start, damaged = trainer.resume()
    for line in damaged:
        progress.say(f"warning: {line}; going on from step {start}")
    if start < settings.train.iters:
        with threads_for(session.spec.parameters), _recorded(session, run, trainer, damaged):
            trainer.train()
    trainer.refuse_none_applied()
    if ranks.is_main:
        checkpoint.publish(checkpoint.complete(run.checkpoints)[-1], session.subject.kind, run.path, session.metadata)
    ranks.wait()
    seconds = time.perf_counter() - began if start < trainer.step else 0.0
    return Trained(start, trainer.step, seconds, trainer.skipped)


def inputs_of(session: Session[Description], run: RunDir, command: Command) -> InputMaker:
    """The inputs of a session, once its latents and captions are encoded and its density of timesteps is measured."""
    settings, progress, spec = command.settings, command.progress, session.spec
    source = training_source(settings, session.source, session.codec, command.device, progress, command.again)
    density = timestep_density(run, session.profile, spec.schedule.steps, command)
    conditions, numbers = training_conditions(spec, session.text, session.source, settings, progress, command.again)
    noise = None if session.subject.patch is None else session.subject.patch.noise_shape()
    return InputMaker(source, session.codec, spec, settings, command.ranks, noise, conditions, numbers, density)


@contextmanager
def _recorded(session: Session[Description], run: RunDir, trainer: Trainer, damaged: list[str]) -> Iterator[None]:
    """Around training: says what a resume changes, and writes what this session begins with and which images it leaves out."""
    command, known = trainer.command, left_out_of(session.source)
    settings, ranks = command.settings, command.ranks
    for line in (*left_out_words(session.source), *run.differences(settings.to_dict())):
        command.progress.say(line)
    facts = {"device": str(command.device), "processes": ranks.world, "start_step": trainer.step}
    facts |= {"threads": torch.get_num_threads(), **recorded(session.source)}
    facts |= {**({"damaged": damaged} if damaged else {}), **session.facts, **session.identities, **known}
    ranks.wait()  # all have read what was there
    if ranks.is_main:
        science = session.science(settings)
        run.begin(session.command, science, settings.to_dict(), facts)
        trainer.trackers.start(settings.save.track, run, science)
    try:
        yield
    finally:
        found = left_out_of(session.source)
        changed: dict[str, object] = dict(found) if found != known else {}  # broken behind a good header
        changed |= {"skipped_steps": trainer.skipped} if trainer.skipped else {}
        if ranks.is_main and changed:
            run.amend(changed)
