"""stdout and stderr of a process: what becomes of them never changes the work. A lost stderr is silence, a lost stdout is said.

Closed, full, in ASCII, a pipe that nobody reads any more: writing fails only here, below all that Python and libraries write.
"""

import errno
import io
import os
import select
import sys
from typing import Any

from dmpctl.errors import UsageError

SIGPIPE = 141  # exit code: 128 + the signal


class Kept(io.RawIOBase):
    """Bytes to a file descriptor, as far as it takes them; after a failure (`lost`, None: none) they are dropped."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.lost: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any, /) -> int:
        """Takes all of the bytes, whatever becomes of them."""
        left = memoryview(data).cast("B")
        while left and self.lost is None:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # another process has made the pipe so
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.lost = error
        return len(data)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def keep_streams() -> None:
    """Put such streams into the place of sys.stdout and sys.stderr; a letter that they lack is written as its number.

    What was closed is opened for reading: no file of ours gets its number, and writing still fails, here and in child processes.
    """
    for descriptor in range(3):
        if not _is_open(descriptor):
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)  # the lowest number that is free: this one
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        encoding = getattr(old, "encoding", None) or "utf-8"
        buffered = io.BufferedWriter(Kept(descriptor))
        setattr(sys, name, io.TextIOWrapper(buffered, encoding, "backslashreplace", line_buffering=True))


def result_lost() -> int:
    """Flush stdout: 0 where all was written, 141 where nobody reads it any more; UsageError where it could not be written."""
    sys.stdout.flush()
    lost = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "lost", None)
    if lost is None:
        return 0
    if lost.errno == errno.EPIPE:
        return SIGPIPE
    raise UsageError(f"the result cannot be written to stdout: {lost.strerror}", "the work is done, and its files are whole")
