"""This process among those that share the work, whoever started them: RANK, WORLD_SIZE and so on, as torchrun gives them."""

import os
import socket
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from dmpctl.errors import UsageError
from dmpctl.processes.peers import PEERS
from dmpctl.processes.threads import use_threads
from dmpctl.settings.sections import Launch
from dmpctl.types import Routing, Routings

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether something (ours, torchrun, accelerate launch) has started this process as one of several."""
    return all(name in os.environ for name in VARIABLES)


@dataclass(frozen=True)
class Ranks:
    """Number `rank` of `world` processes, which computes on `device`. Methods are collectives where they do not say otherwise."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mine(self, items: Sequence[int]) -> Sequence[int]:
        """This process's share of some work: every `world`-th item. No collective."""
        return items[self.rank :: self.world]

    def wait(self) -> None:
        """Go on when all are here."""
        self.largest(0)

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over all processes, the same answer on all of them."""
        if self.world == 1:
            return list(numbers)
        found = torch.tensor(numbers)  # on the CPU, where its way does not wait for the device
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return [int(number) for number in found]

    def total(self, number: int) -> int:
        """The sum over all processes, the same answer on all of them."""
        if self.world == 1:
            return number
        found = torch.tensor(number)
        distributed.all_reduce(found)
        return int(found)

    def mean(self, figures: dict[str, float]) -> dict[str, float]:
        """The mean of each figure over all processes, which all have the same ones."""
        if self.world == 1 or not figures:
            return figures
        found = torch.tensor(list(figures.values()), dtype=torch.float64)
        distributed.all_reduce(found)
        return dict(zip(figures, (found / self.world).tolist(), strict=True))

    def gathered(self, routing: Routings) -> Routings:
        """The routing of the global batch; gradients flow to this process's part alone, as the sum over processes needs.

        A penalty of it is each process's whole penalty, so its share of a mean of gradients is `world` times it.
        """
        if routing is None or self.world == 1:
            return routing
        return tuple(map(self._gathered, routing)) if isinstance(routing, tuple) else self._gathered(routing)

    def _gathered(self, routing: Routing) -> Routing:
        mine = routing.gates.detach().contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        distributed.all_gather(parts, mine)
        parts[self.rank] = routing.gates
        load = routing.load
        if load is not None:
            others = load.detach().clone()
            distributed.all_reduce(others)
            load = load + (others - load.detach())
        return Routing(torch.cat(parts, dim=1), load)


def join(launch: Launch) -> Ranks:
    """Take part in the group that this process was started for, or be alone. UsageError for a device that is not there."""
    if not launched():
        device = resolve_device(launch)
        if device.index is not None:
            torch.cuda.set_device(device)  # accelerate takes the current one
        return Ranks(0, 1, device)
    device = own_device(launch)
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(seconds=launch.rank_timeout))
        _meet()
    return Ranks(distributed.get_rank(), distributed.get_world_size(), device)


def _meet() -> None:
    """Learn the pids of the others on this machine: a collective."""
    own = torch.tensor([os.getpid(), zlib.crc32(socket.gethostname().encode())])
    found = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, own)
    PEERS.update({rank: int(one[0]) for rank, one in enumerate(found) if one[1] == own[1] and one[0] != own[0]})


def own_device(launch: Launch) -> torch.device:
    """The GPU of this process's own, or the CPU; UsageError where there are fewer GPUs than processes."""
    if launch.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {launch.device} is one device, and there are several processes", "leave --device out")
    device = resolve_device(launch)
    if device.type == "cpu":
        return device
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise UsageError(f"process {local + 1} of this machine has no GPU: there are {there}", "ask for fewer, or add --cpu")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def leave() -> None:
    """Leave the group, if there is one: before an orderly end."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def resolve_device(launch: Launch) -> torch.device:
    """The device to use, with --threads; UsageError where it is not there."""
    if launch.threads is not None:
        use_threads(launch.threads)
    if launch.cpu or launch.device == "cpu":
        return torch.device("cpu")
    if launch.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(launch.device)
    there = torch.cuda.device_count() if device.type == "cuda" else int(torch.backends.mps.is_available())
    if there <= (device.index or 0):
        raise UsageError(f"--device {launch.device} is not there ({there} found)", "use --device cpu")
    return device
