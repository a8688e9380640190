"""How anything is trained: objective, optimizer, batches, checkpoints."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dmpctl.settings.sections import Section


class Objective(Section, panel="Objective"):
    loss_weight: Annotated[Literal["constant", "min-snr", "p2"], Field(description="Timestep weights in the MSE.")] = "constant"
    min_snr_gamma: Annotated[float, Field(gt=0, description="Gamma of min-SNR.")] = 5.0
    p2_gamma: Annotated[float, Field(ge=0, description="Gamma of P2.")] = 1.0
    class_dropout: Annotated[
        float, Field(ge=0, le=1, description="Share of labels or captions dropped in training, for guidance.")
    ] = 0.1
    p2_k: Annotated[float, Field(gt=0, description="k of P2.")] = 1.0
    timestep_sampling: Annotated[
        Literal["uniform", "importance"],
        Field(description="Timesteps of training: uniform, or in proportion to the frozen backbone's error, without bias."),
    ] = "uniform"


class Train(Section, panel="Training"):
    free: ClassVar[frozenset[str]] = frozenset({"max_bad_steps", "grad_accum", "grad_checkpoint", "fsdp"})
    iters: Annotated[int, Field(ge=1, description="Optimizer steps in all.")] = 50_000
    batch_size: Annotated[int, Field(ge=1, description="Global batch size, over all processes.")] = 128
    beta1: Annotated[float, Field(ge=0, lt=1, description="AdamW beta 1.")] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, description="AdamW beta 2.")] = 0.999
    weight_decay: Annotated[float, Field(ge=0, description="AdamW weight decay.")] = 0.0
    lr_schedule: Annotated[Literal["constant", "cosine"], Field(description="cosine decays to zero at --iters.")] = "constant"
    warmup: Annotated[int, Field(ge=0, description="Steps of linear warm-up.")] = 0
    ema: Annotated[float, Field(ge=0, lt=1, description="Decay of the average of the trained weights; 0: off.")] = 0.0
    grad_clip: Annotated[float | None, Field(gt=0, description="Largest gradient norm; default: no clipping.")] = None
    precision: Annotated[Literal["no", "bf16", "fp16"], Field(description="Mixed precision of the backbone.")] = "no"
    grad_accum: Annotated[int, Field(ge=1, description="Parts to take a batch in, for less memory.")] = 1
    grad_checkpoint: Annotated[bool, Field(description="Compute blocks twice, for less memory.")] = False
    fsdp: Annotated[bool, Field(description="Share the weights of the backbone out over the processes (FSDP2).")] = False
    max_bad_steps: Annotated[int, Field(ge=1, description="Steps in a row with a loss that is not finite before giving up.")] = 10

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup > self.iters:
            raise ValueError(f"warmup {self.warmup} is longer than iters {self.iters}")
        return self


class Pretrain(Section, panel="Training"):
    lr: Annotated[float, Field(gt=0, description="Learning rate.")] = 1e-4


class Save(Section, panel="Run", science=False):
    save_every: Annotated[int, Field(ge=1, description="Steps between checkpoints.")] = 5_000
    keep_last: Annotated[int, Field(ge=1, description="Checkpoints kept.")] = 3
    keep_every: Annotated[int | None, Field(ge=1, description="Steps whose multiples are kept for good; default: none.")] = None
    track: Annotated[
        str | None,
        Field(
            pattern=r"^(tensorboard|wandb|trackio)(,(tensorboard|wandb|trackio))*$",
            description="Trackers beside metrics.jsonl: tensorboard, wandb, trackio, or some; default: none.",
        ),
    ] = None
    log_every: Annotated[int, Field(ge=1, description="Steps between lines of metrics.jsonl.")] = 100
