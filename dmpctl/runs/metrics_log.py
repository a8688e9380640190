"""metrics.jsonl: one line for every --log-every steps, cut back to the checkpoint that a resumed run goes on from."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmpctl.errors import IntegrityError
from dmpctl.files import write_atomic, writing


class MetricsLog:
    """The lines of one metrics.jsonl, each an object with a `step`. The last may be torn: a killed process was writing it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, line: Mapping[str, object]) -> None:
        """Write one line at the end."""
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def cut_back(self, step: int) -> None:
        """Drop the lines after `step`: training goes on from there and will write them again."""
        if self._path.is_file():
            kept = [line for line in self._raw() if _step_of(line) <= step]
            write_atomic(self._path, "".join(line + "\n" for line in kept).encode())

    def last_step(self) -> int:
        """Returns the last step that has a line, 0 if none has; a torn line counts for nothing."""
        return int(max((step for step in map(_step_of, self._raw()) if step < math.inf), default=0))

    def lines(self) -> list[dict[str, Any]]:
        """Returns all lines; IntegrityError at a line that is not JSON."""
        try:
            return [json.loads(line) for line in self._raw()]
        except json.JSONDecodeError as error:
            raise IntegrityError(f"{self._path} is not valid JSON lines ({error})") from None

    def _raw(self) -> list[str]:
        return self._path.read_text("utf-8").splitlines() if self._path.is_file() else []


def _step_of(line: str) -> float:
    """The step of a line; infinity for a torn one, so that it lies beyond every step."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return math.inf
