"""Ctrl-C, SIGTERM and SIGUSR1 as a request: the step in hand is finished and saved first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType, TracebackType

from dmpctl.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def hold_signals() -> None:
    """From here on these signals wait, in this thread and in processes that it starts, until `let_signals_in`.

    A process that has just been started has no handlers yet: it would end in the middle of an import, with a traceback.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def let_signals_in() -> None:
    """Those that waited are obeyed now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class Stop:
    """Context in which a signal sets `got` instead of ending the process (0: none came); a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.got = 0

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.got and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.got = number

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextmanager
def ending_by_signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise Interrupted wherever the work is, outside of `Stop`; finished work is kept."""
    if current_thread() is not main_thread():  # only there are signals heard
        yield
        return
    before = {number: signal.signal(number, _end) for number in SIGNALS if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name}", number, "the same command goes on with what is there")


def interrupted(number: int, where: str, hint: str) -> Interrupted:
    """The failure to raise after saving; `where` says how far it came: `saved at step 8`."""
    return Interrupted(f"stopped by {signal.Signals(number).name}, {where}", number, hint)
