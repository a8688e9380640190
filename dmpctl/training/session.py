"""One training in its run directory: refuse another experiment, go on from the newest checkpoint, train, publish."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from dmpctl.codecs.identity import Identity
from dmpctl.codecs.text import TextEncoder
from dmpctl.images.stored import left_out_of, left_out_words
from dmpctl.models.conditions import training_conditions
from dmpctl.models.encode import training_source
from dmpctl.processes.command import again_command
from dmpctl.processes.ranks import ranks_of
from dmpctl.runs import checkpoint
from dmpctl.runs.rundir import RunDir
from dmpctl.settings.model import Settings
from dmpctl.training.importance import Profile, timestep_density
from dmpctl.training.subject import Subject
from dmpctl.training.trackers import refuse_missing
from dmpctl.training.trainer import Trainer
from dmpctl.types import BackboneSpec, Codec, Progress, Source


@dataclass(frozen=True)
class Session:
    """What `dmpctl command` trains.

    `digests` (sha256 of what the settings name) are part of the experiment; `facts` are only recorded. `metadata` goes
    into the finished safetensors file, so that it describes itself; None: nothing. `profile` measures the mean squared
    epsilon error of the frozen backbone at some timesteps; None: there is none. `text` reads the captions of the data, None:
    the backbone takes none.
    """

    command: str
    subject: Subject
    spec: BackboneSpec
    codec: Codec
    source: Source
    digests: Mapping[str, str]
    facts: Mapping[str, Any]
    metadata: Mapping[str, str] | None = None
    profile: Profile | None = None
    text: TextEncoder | None = None

    @property
    def identities(self) -> dict[str, str]:
        """sha256 of all that the settings name: backbone, data, and a codec that is not pixels as they are."""
        codec = {} if isinstance(self.codec, Identity) else {"codec_fingerprint": self.codec.fingerprint}
        text = {} if self.text is None else {"text_fingerprint": self.text.revision}
        return dict(self.digests) | codec | text

    def science(self, settings: Settings) -> dict[str, Any]:
        """All that makes a run this experiment: settings and the identities of what they name."""
        return science_of(settings) | self.identities


def science_of(settings: Settings) -> dict[str, Any]:
    """Flat values that make a run this experiment: a change of one of them is refused on resume.

    More iterations at a constant rate are the same experiment taken further, so --iters counts only under a decay.
    """
    found = settings.science()
    if settings.train.lr_schedule == "constant":
        found.pop("iters", None)
    return found


@dataclass(frozen=True)
class Trained:
    """From which step to which; `seconds` of training, 0 where the run was complete already."""

    start: int
    step: int
    seconds: float

    @property
    def was_complete(self) -> bool:
        return self.start >= self.step


def train_in(run: RunDir, session: Session, settings: Settings, accelerator: Accelerator, progress: Progress) -> Trained:
    """Train to --iters inside an open run, and put the finished weights into its root.

    UsageError if the run holds another experiment; Interrupted after saving on a signal.
    """
    ranks, science = ranks_of(accelerator), session.science(settings)
    ranks.wait()  # until the main process has the lock
    run.refuse_other(session.command, science, settings.run.allowed)
    refuse_missing(settings.save.track)
    source = training_source(settings, session.source, session.codec, accelerator.device, progress, again_command())
    density = timestep_density(run, session.profile, session.spec.schedule.steps, settings, accelerator, progress)
    told, numbers = training_conditions(session.spec, session.text, session.source, settings, progress, again_command())
    trainer = Trainer(session.subject, session.spec, session.codec, source, settings, run, accelerator, density, told, numbers)
    began = time.perf_counter()
    start, damaged = trainer.resume()
    for line in damaged:
        progress.say(f"warning: {line}; going on from step {start}")
    if start < settings.train.iters:
        for line in (*left_out_words(session.source), *run.differences(settings.to_dict())):
            progress.say(line)
        facts = {
            "device": str(accelerator.device),
            "processes": ranks.world,
            "start_step": start,
            **({"damaged": damaged} if damaged else {}),
            **session.facts,
            **session.identities,
            **left_out_of(session.source),
        }
        ranks.wait()  # all have read what was there
        if ranks.is_main:
            run.begin(session.command, science, settings.to_dict(), facts)
            trainer.trackers.start(settings.save.track, run, science, progress)
        known = left_out_of(session.source)
        try:
            trainer.train(progress, again_command())
        finally:
            found = left_out_of(session.source)
            if ranks.is_main and found != known:  # broken behind a good header
                run.amend(found)
    if ranks.is_main:
        checkpoint.publish(checkpoint.complete(run.checkpoints)[-1], session.subject.kind, run.path, session.metadata)
    ranks.wait()
    seconds = time.perf_counter() - began if start < trainer.step else 0.0
    return Trained(start, trainer.step, seconds)
