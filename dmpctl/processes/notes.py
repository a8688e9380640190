"""Notes that a launcher and its processes leave for each other in one folder: the work to do, and how each process ended."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel

from dmpctl.files import read_json, write_atomic, write_json
from dmpctl.settings.model import Settings

JOB = "job.json"


@dataclass(frozen=True)
class Assignment:
    """A command with all its settings, resolved once: the processes look at no variable and no settings file.

    `argument` is the positional one, None if there is none; `argv` is what was typed.
    """

    command: str
    settings: Settings
    argument: Path | str | list[str] | None
    argv: list[str]

    def write(self, folder: Path) -> None:
        """Write FOLDER/job.json."""
        path = isinstance(self.argument, Path)
        argument = {"value": str(self.argument) if path else self.argument, "path": path}
        about = {"command": self.command, "settings": self.settings.to_dict(), "argument": argument, "argv": self.argv}
        write_atomic(folder / JOB, json.dumps(about).encode())  # not as a record is written: addresses keep their passwords

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The assignment that `write` left in a folder."""
        about = read_json(folder / JOB)
        value, path = about["argument"]["value"], about["argument"]["path"]
        return cls(about["command"], Settings.from_dict(about["settings"]), Path(value) if path else value, about["argv"])


class Outcome(BaseModel, frozen=True):
    """How one process ended, written by itself; `at`: when, by the clock of its machine.

    `message` "": it did its work. `expected` False: a bug of ours, or (`echo`) the loss of another process as seen from this one.
    """

    rank: int
    expected: bool = True
    echo: bool = False
    message: str = ""
    hint: str | None = None
    exit_code: int = 0
    signal: int = 0
    at: float = 0.0

    def write(self, path: Path) -> None:
        """Write FOLDER/attempt-A/rank-R.json."""
        write_json(path, self.model_dump())

    @classmethod
    def read(cls, path: Path) -> Self:
        """The outcome that `write` left there."""
        return cls.model_validate(read_json(path))


def outcomes(folder: Path) -> list[Outcome]:
    """How the processes of the last attempt ended, as far as they could still say it."""
    attempts = sorted(folder.glob("attempt-*"), key=lambda path: int(path.name.removeprefix("attempt-")))
    return [Outcome.read(path) for path in sorted(attempts[-1].glob("rank-*.json"))] if attempts else []
