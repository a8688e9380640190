"""How anything is trained: objective, optimizer, batches, checkpoints."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dmpctl.refusals import Among, Clash
from dmpctl.settings.sections import Section


class Objective(Section, panel="Objective"):
    loss_weight: Literal["constant", "min-snr", "p2"] = Field(default="constant", description="How the MSE weighs the timesteps.")
    min_snr_gamma: float = Field(default=5.0, gt=0, description="Gamma of min-SNR.")
    p2_gamma: float = Field(default=1.0, ge=0, description="Gamma of P2.")
    class_dropout: float = Field(
        default=0.1, ge=0, le=1, description="Share of labels or captions dropped in training, for guidance."
    )
    p2_k: float = Field(default=1.0, gt=0, description="k of P2.")
    timestep_sampling: Literal["uniform", "importance"] = Field(
        default="uniform",
        description="Timesteps of training: uniform, or in proportion to the frozen backbone's error, without bias.",
    )


class Train(Section, panel="Training"):
    free: ClassVar[frozenset[str]] = frozenset({"max_bad_steps", "grad_accum", "grad_checkpoint", "fsdp"})
    iters: int = Field(default=50_000, ge=1, description="Optimizer steps in all.")
    batch_size: int = Field(default=128, ge=1, description="Global batch size, over all processes.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW beta 1.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW beta 2.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW weight decay.")
    lr_schedule: Literal["constant", "cosine"] = Field(default="constant", description="cosine decays to zero at --iters.")
    warmup: int = Field(default=0, ge=0, description="Steps of linear warm-up.")
    ema: float = Field(default=0.0, ge=0, lt=1, description="Decay of the average of the trained weights; 0: off.")
    grad_clip: float | None = Field(default=None, gt=0, description="Largest gradient norm; default: no clipping.")
    precision: Literal["no", "bf16", "fp16"] = Field(default="no", description="Mixed precision of the backbone.")
    grad_accum: int = Field(default=1, ge=1, description="Split each batch into this many parts, to save memory.")
    grad_checkpoint: bool = Field(default=False, description="Recompute activations in the backward pass, to save memory.")
    fsdp: bool = Field(default=False, description="Shard the backbone's weights across processes (FSDP2).")
    max_bad_steps: int = Field(default=10, ge=1, description="Consecutive steps with a non-finite loss before giving up.")

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup > self.iters:
            hint = f"say {{warmup:{self.iters // 10}}}, or more iterations"
            raise Clash(self, "{warmup} is longer than {iters}", hint)
        return self


class Pretrain(Section, panel="Training"):
    lr: float = Field(default=1e-4, gt=0, description="Learning rate.")


class Save(Section, panel="Run", science=False):
    save_every: int = Field(default=5_000, ge=1, description="Steps between checkpoints.")
    save_minutes: float = Field(default=10, gt=0, description="Minutes after which a checkpoint is due, too.")
    keep_last: int = Field(default=3, ge=1, description="Checkpoints kept.")
    keep_every: int | None = Field(
        default=None, ge=1, description="Keep checkpoints at multiples of this many steps for good; default: none."
    )
    track: Annotated[str | None, Among(("tensorboard", "wandb", "trackio"))] = Field(
        default=None,
        pattern=r"^(tensorboard|wandb|trackio)(,(tensorboard|wandb|trackio))*$",
        description="Trackers beside metrics.jsonl: tensorboard, wandb, trackio, or some; default: none.",
    )
    log_every: int = Field(default=100, ge=1, description="Steps between lines of metrics.jsonl.")
