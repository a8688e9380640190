"""Output for people and machines: results on stdout, progress and talk on stderr."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as RichProgress
from rich.progress import Task, TaskID
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dmpctl.files import amount
from dmpctl.settings import sections
from dmpctl.settings.layers import Resolved
from dmpctl.settings.options import field_of, options_of
from dmpctl.types import Progress, ProgressTask, Report, Silent, Unit
from dmpctl.words import fit_to_show, redacted

SECONDS_PER_LINE = 2.0
LINES_PER_TASK = 50
NARROWEST = 8  # columns of a bar, or of the words before it
UNBOUNDED = 100_000  # columns of a pipe: tables and paths stay whole


def is_main() -> bool:
    """Returns whether this process may write to the terminal: under torchrun or accelerate launch, only rank 0 does."""
    return os.environ.get("RANK", "0") == "0"


def is_terminal(stream: TextIO) -> bool:
    """Returns whether a person is watching: a terminal that can move its cursor, and no CI."""
    return stream.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"


def progress_for(console: sections.Console) -> Progress:
    """Returns the display of progress: a bar on a terminal, plain lines in a pipe or under CI, nothing with --quiet."""
    if console.quiet or not is_main():
        return Silent()
    return Bars() if is_terminal(sys.stderr) else Lines(sys.stderr)


def counted(number: float, unit: Unit) -> str:
    """Returns a count as a whole number, bytes as `95.6 MB`."""
    return amount(number) if unit == "B" else f"{number:.0f}"


def so_far(done: float, total: float, unit: Unit) -> str:
    """Returns `120/4000`; the done part alone for bytes whose total is not known (0)."""
    return f"{counted(done, unit)}/{counted(total, unit)}" if total or unit == "it" else counted(done, unit)


def shown(figures: Mapping[str, float], rate: float | None, unit: Unit = "it") -> str:
    """Returns `loss 0.0912, 12.5 it/s`. `rate` in units/sec, None: not known yet; left out beside a speed in the figures."""
    parts = [f"{value:.4g} {name}" if name.endswith("/s") else f"{name} {value:.4g}" for name, value in figures.items()]
    if rate is not None and not any(name.endswith("/s") and name != "images/s" for name in figures):
        parts.append(f"{rate:{'.0f' if rate >= 100 else '.3g'}} it/s" if unit == "it" else f"{counted(rate, unit)}/s")
    return ", ".join(parts)


class Lines:
    """Plain lines: at most one every 2 s and one every 2 % of the work, so that a log stays readable."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self.clock = stream, clock

    def track(self, what: str, total: int, start: int = 0, unit: Unit = "it") -> ProgressTask:
        return LinesTask(self, fit_to_show(what), total, start, unit)

    def say(self, message: str) -> None:
        self._stream.write(fit_to_show(message) + "\n")
        self._stream.flush()


class LinesTask:
    """One piece of work shown by `Lines`; the last line is where it ended."""

    def __init__(self, lines: Lines, what: str, total: int, start: int, unit: Unit) -> None:
        self._lines, self._what, self._total, self._start, self._unit = lines, what, total, start, unit
        self._done = self._last_done = start
        self._since = self._last_time = lines.clock()
        self._stride = max(1, math.ceil(total / LINES_PER_TASK))
        self._figures: dict[str, float] = {}

    def advance(self, by: int = 1, **figures: float) -> None:
        self._done += by
        self._figures |= figures
        if self._done - self._last_done >= self._stride and self._lines.clock() - self._last_time >= SECONDS_PER_LINE:
            self._line()

    def _line(self) -> None:
        self._last_done, self._last_time = self._done, self._lines.clock()
        elapsed = self._last_time - self._since
        rate = (self._done - self._start) / elapsed if elapsed > 0 and self._done > self._start else None
        share = f" ({100 * self._done // self._total} %)" if self._total else ""
        parts = [f"{self._what} {so_far(self._done, self._total, self._unit)}{share}", shown(self._figures, rate, self._unit)]
        if rate is not None and self._done < self._total:
            parts.append(f"{timedelta(seconds=round((self._total - self._done) / rate))} left")
        self._lines.say(", ".join(part for part in parts if part))

    def __enter__(self) -> ProgressTask:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._done != self._last_done:
            self._line()


class Bars:
    """One live display on stderr for all bars of a command; talk scrolls above it. `console` None: this process's stderr.

    A bar that is done stays as one line; it is drawn no more. Figures are never cut: first the bar gives way, then the words.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.display = _Display(console=self.console, redirect_stdout=False)  # results are not talk

    def track(self, what: str, total: int, start: int = 0, unit: Unit = "it") -> ProgressTask:
        known, done = total if total or unit == "it" else None, so_far(start, total, unit)
        task = self.display.add_task(what, total=known, completed=start, figures="", so_far=done, visible=False)
        return BarsTask(self.display, task, unit)

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)


class _Display(RichProgress):
    """Bars in as many columns as there are."""

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        table = Table.grid(padding=(0, 1, 0, 0))
        if not (shown := [task for task in tasks if task.visible]):
            return table
        rows = [(str(task.fields["so_far"]), str(task.fields["figures"]), _left(task)) for task in shown]
        fixed = sum(max(len(row[column]) + 1 for row in rows) for column in range(3))
        words = max(len(task.description) for task in shown)
        free = max(self.console.width - fixed - 1, NARROWEST)
        bar = min(40, free - words - 1)
        table.add_column(no_wrap=True, max_width=free if bar < NARROWEST else None, overflow="ellipsis")
        for _ in range(3 + (bar >= NARROWEST)):
            table.add_column(no_wrap=True)
        for task, row in zip(shown, rows, strict=True):
            drawn = [ProgressBar(task.total, task.completed, width=bar, pulse=task.total is None)] if bar >= NARROWEST else []
            table.add_row(Text(task.description), *drawn, *map(Text, row))
        return table


def _left(task: Task) -> str:
    """`0:01:39`, how long a task still takes; of one that is done, how long it took."""
    seconds = task.elapsed if task.finished else task.time_remaining
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))


class BarsTask:
    """One bar; the display runs while at least one is open."""

    def __init__(self, display: RichProgress, task: TaskID, unit: Unit) -> None:
        self._display, self._task, self._unit = display, task, unit
        self._figures: dict[str, float] = {}

    def advance(self, by: int = 1, **figures: float) -> None:
        self._figures |= figures
        task = next(task for task in self._display.tasks if task.id == self._task)
        done = so_far(task.completed + by, task.total or 0, self._unit)
        self._display.update(self._task, advance=by, figures=shown(self._figures, task.speed, self._unit), so_far=done)

    def __enter__(self) -> ProgressTask:
        self._display.update(self._task, visible=True)
        self._display.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._display.stop_task(self._task)
        if sum(task.visible for task in self._display.tasks) == 1:
            self._display.stop()  # this one is the last line that stays
        self._display.remove_task(self._task)


def show(report: Report, as_json: bool) -> None:
    """Write the result of a command to stdout, as a table and sentences or as one JSON object. Rank 0 only."""
    if not is_main():
        return
    if as_json:
        sys.stdout.write(redacted(json.dumps(jsonable(report.data), indent=1, allow_nan=False)) + "\n")
        return
    terminal = is_terminal(sys.stdout)
    console = Console(
        file=sys.stdout,
        highlight=False,
        force_terminal=terminal,
        color_system="auto" if terminal else None,
        width=None if terminal else UNBOUNDED,
    )
    if report.table:
        columns = list(dict.fromkeys(name for row in report.table for name in row))  # in the order in which they first appear
        table = Table(*map(escape, columns), box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for column in table.columns:
            column.overflow = "fold"
        for row in report.table:
            table.add_row(*(escape(fit_to_show(row.get(name, ""))) for name in columns))  # [brackets] are text here
        console.print(table)
    for line in report.lines:
        console.print(fit_to_show(line), markup=False, soft_wrap=True)


def jsonable(value: Any) -> Any:
    """Returns `value` without NaN and infinity, which JSON has not: None instead. Paths and the like become text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def config_report(command: str, resolved: Resolved) -> Report:
    """Returns the report of --print-config: every value and where it came from."""
    data, rows = {}, []
    for name, option in options_of(command).items():
        value = getattr(getattr(resolved.settings, field_of(option.section)), name, None)
        origin = resolved.origins[name]
        data[option.public] = {"value": value, "origin": origin}
        rows.append({"option": option.public, "value": "-" if value is None else str(value), "origin": origin})
    return Report(data, tuple(rows))
