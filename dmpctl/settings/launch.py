"""Where a command runs: on which device, in how many processes, and how it ends when it is asked to stop."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from dmpctl.settings.sections import Section


class Launch(Section, panel="Launch", science=False):
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N or mps.")] = "auto"
    cpu: Annotated[bool, Field(description="Same as --device cpu.")] = False
    deterministic: Annotated[bool, Field(description="Deterministic kernels (slower on a GPU).")] = False
    compile: Annotated[bool, Field(description="Compile the blocks with torch.compile; pays on a GPU.")] = False
    tf32: Annotated[bool, Field(description="TF32 for float32 matrix products on a GPU, as published.")] = True
    num_processes: Annotated[int | None, Field(ge=1, description="Processes on this machine; default: one per GPU.")] = None
    nnodes: Annotated[
        str, Field(pattern=r"^[1-9]\d*(:[1-9]\d*)?$", description="Machines, or at least:at most; the same command on each.")
    ] = "1"
    node_rank: Annotated[int | None, Field(ge=0, description="This machine's number; default: found out.")] = None
    rdzv_endpoint: Annotated[str | None, Field(description="HOST:PORT where several machines meet; default: none.")] = None
    max_restarts: Annotated[int, Field(ge=0, description="Times that processes which failed are started again.")] = 0
    rank_timeout: Annotated[int, Field(ge=1, description="Seconds that processes wait for one that is silent.")] = 1800
    requeue: Annotated[bool, Field(description="Exit 75 after SIGTERM or SIGUSR1: put this job into the queue again.")] = False

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
