"""Where a command runs: on which device, in how many processes, and how it ends when it is asked to stop."""

from typing import Self

from pydantic import Field, model_validator

from dmpctl.settings.sections import Section


class Launch(Section, panel="Launch", science=False):
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N or mps.")
    cpu: bool = Field(default=False, description="Same as --device cpu.")
    deterministic: bool = Field(default=False, description="Deterministic kernels (slower on a GPU).")
    compile: bool = Field(default=False, description="Compile the blocks with torch.compile; pays on a GPU.")
    tf32: bool = Field(default=True, description="TF32 for float32 matrix products on a GPU, as published.")
    num_processes: int | None = Field(default=None, ge=1, description="Processes on this machine; default: one per GPU.")
    nnodes: str = Field(
        default="1", pattern=r"^[1-9]\d*(:[1-9]\d*)?$", description="Machines, or at least:at most; the same command on each."
    )
    node_rank: int | None = Field(default=None, ge=0, description="This machine's number; default: found out.")
    rdzv_endpoint: str | None = Field(default=None, description="HOST:PORT where several machines meet; default: none.")
    max_restarts: int = Field(default=0, ge=0, description="Times that processes which failed are started again.")
    rank_timeout: int = Field(default=1800, ge=1, description="Seconds that processes wait for one that is silent.")
    requeue: bool = Field(default=False, description="Exit 75 after SIGTERM or SIGUSR1: put this job into the queue again.")

    @model_validator(mode="after")
    def _one_device(self) -> Self:
        if self.cpu and self.device not in ("auto", "cpu"):
            raise ValueError(f"cpu and device {self.device} contradict each other, give one of the two")
        return self

    @model_validator(mode="after")
    def _where_to_meet(self) -> Self:
        low, high = self.nodes
        if high < low:
            raise ValueError(f"nnodes {self.nnodes} asks for at most {high} machines and for at least {low}")
        if high > 1 and self.rdzv_endpoint is None:
            raise ValueError(f"nnodes {self.nnodes} needs rdzv_endpoint, the HOST:PORT where the machines meet")
        return self

    @property
    def nodes(self) -> tuple[int, int]:
        """Machines: at least, at most."""
        low, _, high = self.nnodes.partition(":")
        return int(low), int(high or low)
