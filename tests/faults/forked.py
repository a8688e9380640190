"""`dmpctl` in processes of their own whose streams and signals a test chooses, forked from one that has imported all: quick."""

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "tests.helpers",
        "dmpctl.cli.app",
        "dmpctl.measuring.evaluate",
        "dmpctl.studies.compare",
        "torch.utils.tensorboard",
        "diffusers",
    ]
)


def _command(args, cwd: str, stdout: str, stderr: str, encoding: str, environment, ignored) -> None:
    """The child: its streams are a path, `closed`, or `broken`, a pipe that nobody reads."""
    os.setsid()
    os.chdir(cwd)
    for name in [name for name in os.environ if name.startswith("DMPCTL_")]:
        del os.environ[name]
    os.environ.update({"CI": "true", **environment})
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    if signal.SIGINT not in ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    targets = {name: _opened(what) for name, what in (("stdout", stdout), ("stderr", stderr))}
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.close(descriptor)
        setattr(sys, name, None)
        if (target := targets[name]) is not None:
            os.dup2(target, descriptor)
            os.close(target)
            setattr(sys, name, io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), encoding))
    sys.argv[:] = ["dmpctl", *args]
    import torch

    torch.set_num_threads(1)
    from dmpctl.cli.app import entry

    entry()


def _opened(what: str) -> int | None:
    if what == "closed":
        return None
    if what != "broken":
        return os.open(what, os.O_WRONLY | os.O_CREAT, 0o644)
    reading, writing = os.pipe()
    os.close(reading)
    return writing


class Forked:
    """One command in the background. `until` waits for something to be there while it runs, `end` for its exit code."""

    def __init__(
        self,
        *args: object,
        cwd: Path,
        stdout: str = "out.txt",
        stderr: str = "err.txt",
        encoding: str = "utf-8",
        env: Mapping[str, str] | None = None,
        ignored: tuple[int, ...] = (),
    ) -> None:
        cwd.mkdir(parents=True, exist_ok=True)
        self.cwd = cwd
        given = (list(map(str, args)), str(cwd), stdout, stderr, encoding, dict(env or {}), ignored)
        self.process = FORKS.Process(target=_command, args=given)
        self.process.start()

    def until(self, there: Callable[[], object], seconds: float = 240) -> None:
        limit = time.monotonic() + seconds
        while not there():
            assert self.process.is_alive(), (self.process.exitcode, self.err)
            assert time.monotonic() < limit, self.err
            time.sleep(0.01)

    def send(self, number: int) -> None:
        os.kill(self.process.pid or 0, number)

    def end(self, seconds: float = 240) -> int:
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"it still runs: {self.err}")
        return self.process.exitcode or 0

    @property
    def out(self) -> str:
        return self._read("out.txt")

    @property
    def err(self) -> str:
        return self._read("err.txt")

    def _read(self, name: str) -> str:
        with suppress(FileNotFoundError):
            return (self.cwd / name).read_text("utf-8")
        return ""
