"""Signals as a request to stop: what takes moments is finished, a long computation ends in the middle, what is done is kept.

Ctrl-C, SIGTERM, SIGUSR1 (a scheduler), SIGHUP (a terminal that was closed) and SIGQUIT; one that was ignored when this process
began (nohup, a job in the background of a script) stays ignored.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType, TracebackType
from typing import Any

from dmpctl.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
PATIENCE = 3.0  # sec that a computation has, to end by itself
GO_ON = "the same command goes on with what is there"

Handler = Callable[[int, FrameType | None], None]


_open: list["Stop | _Bell"] = []  # contexts that the main thread is in, the one entered last at the end
_before: dict[signal.Signals, Any] = {}  # handlers from before the first of them


class Asked(BaseException):
    """A signal came, and the computation may end in its middle (`Stop.soon`). No Exception: a library might swallow that."""


def heard() -> list[signal.Signals]:
    """The signals that are obeyed: those that nobody has this process ignore."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def hold_signals() -> None:
    """From here on these signals wait, in this thread and in processes that it starts, until `let_signals_in`.

    A process that has just been started has no handlers yet: it would end in the middle of an import, with a traceback.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def let_signals_in() -> None:
    """Those that waited are obeyed now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def handled_by(handler: Handler, but: int | None = None) -> Iterator[None]:
    """These signals, `but` one, go to a handler; where none are heard (outside of the main thread) nothing is changed."""
    there = current_thread() is main_thread()
    before = {number: signal.signal(number, handler) for number in heard() if number != but} if there else {}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Stop:
    """Context in which a signal sets `got` (0: none came) instead of ending the process; a second Ctrl-C ends at once.

    `where` says how far the work has come, `hint` how to go on: after a signal the context ends by raising Interrupted with
    both. None: the caller looks at `got` by itself. Contexts inside of one another all get the signal.
    """

    def __init__(self, where: Callable[[], str] | None = None, hint: str = GO_ON) -> None:
        self.got, self._where, self._hint, self._here = 0, where, hint, False

    def __enter__(self) -> "Stop":
        self._here = current_thread() is main_thread()  # only there are signals heard
        if self._here:
            self.got = next((one.got for one in _open if isinstance(one, Stop)), 0)
            if not _open:
                _before.update({number: signal.signal(number, _take) for number in heard()})
            _open.append(self)
        return self

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.got:
            raise interrupted(self.got, self._where() if self._where else "as asked", self._hint) from None

    @contextmanager
    def soon(self) -> Iterator[None]:
        """A computation of which nothing is kept before its end: some seconds after a signal it ends by raising Asked."""
        bell = _Bell()
        if self._here:
            _open.append(bell)
        try:
            if self.got:
                bell.set()
            yield
        finally:
            if self._here:
                _open.remove(bell)
                bell.stop()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._here:
            _open.remove(self)
            while _before and not _open:
                signal.signal(*_before.popitem())
        if self._where and kind in (None, Asked):
            self.check()


class _Bell:
    """A computation that may end in its middle, and the alarm that ends it; another's alarm (of a test) is kept for later."""

    def __init__(self) -> None:
        self._others: float | None = None

    def set(self) -> None:
        if self._others is None:
            self._handler = signal.signal(signal.SIGALRM, self._ring)
            self._others = signal.setitimer(signal.ITIMER_REAL, PATIENCE, 1.0)[0]

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if _open and _open[-1] is self:  # and nothing inside of it that has to be finished
            raise Asked

    def stop(self) -> None:
        if self._others is not None:
            signal.setitimer(signal.ITIMER_REAL, self._others and max(self._others - PATIENCE, 0.01))
            signal.signal(signal.SIGALRM, self._handler)


def _take(number: int, frame: FrameType | None) -> None:
    stops = [one for one in _open if isinstance(one, Stop)]
    if number == signal.SIGINT and any(one.got for one in stops):
        raise KeyboardInterrupt
    for one in stops:
        one.got = number
    if isinstance(bell := _open[-1], _Bell):
        bell.set()


@contextmanager
def ending_by_signals() -> Iterator[None]:
    """Signals raise Interrupted wherever the work is, outside of `Stop`; Ctrl-C KeyboardInterrupt. Finished work is kept."""
    with handled_by(_end, but=signal.SIGINT):
        yield


def _end(number: int, frame: FrameType | None) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name}", number, GO_ON)


def interrupted(number: int, where: str, hint: str) -> Interrupted:
    """The failure to raise after saving; `where` says how far it came: `saved at step 8`."""
    return Interrupted(f"stopped by {signal.Signals(number).name}, {where}", number, hint)
