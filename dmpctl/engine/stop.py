"""Ctrl-C, SIGTERM and SIGUSR1 as a request: the step in hand is finished and saved first."""

import signal
from types import FrameType, TracebackType

import torch

from dmpctl.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """Context in which a signal sets a flag instead of ending the process; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.got = 0

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.got and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.got = number

    def agreed(self) -> int:
        """The signal that some process got (0: none), the same answer on all of them. A collective."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.got
        flag = torch.tensor(self.got)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return int(flag)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def interrupted(number: int, where: str, hint: str) -> Interrupted:
    """The failure to raise after saving; `where` says how far it came: `saved at step 8`."""
    return Interrupted(f"stopped by {signal.Signals(number).name}, {where}", number, hint)
