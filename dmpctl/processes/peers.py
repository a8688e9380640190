"""The other processes of a command, as this one knows them: who they are, and whether a failure is the loss of one of them."""

import os
import sys
import time
from pathlib import Path

from dmpctl.errors import DmpError

LOSSES = ("closed by peer", "connection reset", "connection closed", "broken pipe", "timed out", "timeout", "aborted")
PATIENCE = 1.0  # sec that a process may need to end, once its connections are closed
PEERS: dict[int, int] = {}  # pids of the other ranks of this machine, told by `ranks.join`


def loss(error: BaseException) -> DmpError | None:
    """The loss of another process as seen from here, named where it can be; None for any other failure."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if "RANK" not in os.environ or not isinstance(error, RuntimeError) or not any(loss in text.lower() for loss in LOSSES):
        return None
    limit = time.monotonic() + PATIENCE
    while not (gone := [rank for rank in PEERS if not runs(PEERS[rank])]) and PEERS and time.monotonic() < limit:
        time.sleep(0.05)
    names = ", ".join(f"rank {rank} (pid {PEERS[rank]})" for rank in gone)
    message = f"{names} has ended, and the others cannot go on" if gone else f"lost the other processes ({text[:300]})"
    return DmpError(message, "see what it says, or raise --rank-timeout; the same command goes on from the last checkpoint")


def runs(pid: int, parent: int | None = None) -> bool:
    """Whether a process runs; with `parent` only if it is a child of that, as a number may be another's by now (Linux)."""
    if sys.platform == "linux":
        try:
            state, above, *_ = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return state not in ("Z", "X") and parent in (None, int(above))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
