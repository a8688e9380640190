"""stdout carries results; progress is one bar on a terminal, few plain lines in a pipe, nothing with --quiet."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dmpctl.cli.console import Bars, Lines, Silent, progress_for, show
from dmpctl.settings import sections
from dmpctl.types import Report


class Clock:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of(steps: int, seconds: float, start: int = 0, total: int | None = None) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    with Lines(stream, clock).track("training", total or steps, start) as task:
        for step in range(start, steps):
            clock.now += seconds
            task.advance(1, loss=1 / (step + 1))
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(
    ("steps", "seconds"),
    [(1, 60.0), (1, 0.001), (49, 3.0), (50, 60.0), (51, 3.0), (99, 0.5), (999, 0.05), (1000, 3.0), (1001, 0.5), (10_000, 0.001)],
)
def test_a_pipe_gets_at_most_fifty_lines(steps, seconds):
    lines = lines_of(steps, seconds)
    assert 1 <= len(lines) <= 50
    assert len(lines) <= steps * seconds / 2 + 1
    assert lines[-1].startswith(f"training {steps}/{steps} (100 %)")


def test_a_line_says_how_far_how_well_how_fast_and_how_long():
    line = lines_of(20, 1.0, total=1000)[0]
    assert line == "training 20/1000 (2 %), loss 0.05, 1 it/s, 0:16:20 left"


def test_a_resumed_task_counts_its_own_speed():
    assert lines_of(120, 1.0, start=100, total=1000)[0] == "training 120/1000 (12 %), loss 0.008333, 1 it/s, 0:14:40 left"


def test_a_stopped_task_says_where():
    assert lines_of(7, 0.1, total=1000) == ["training 7/1000 (0 %), loss 0.1429, 10 it/s, 0:01:39 left"]


def test_speeds_of_the_engine_replace_ours():
    stream, clock = io.StringIO(), Clock()
    with Lines(stream, clock).track("training", 4) as task:
        clock.now = 2.0
        task.advance(4, **{"steps/s": 3.25, "images/s": 416.0})
    assert stream.getvalue() == "training 4/4 (100 %), 3.25 steps/s, 416 images/s\n"


def test_images_per_second_stand_beside_our_speed():
    stream, clock = io.StringIO(), Clock()
    with Lines(stream, clock).track("sampling", 4) as task:
        clock.now = 2.0
        task.advance(4, **{"images/s": 8.0})
    assert stream.getvalue() == "sampling 4/4 (100 %), 8 images/s, 2 it/s\n"


def test_nothing_to_do_is_no_division_by_zero():
    stream = io.StringIO()
    with Lines(stream, Clock()).track("sampling", 0):
        pass
    assert stream.getvalue() == ""


def test_a_terminal_gets_one_bar_with_talk_above_it():
    stream = Terminal()
    bars = Bars(Console(file=stream, force_terminal=True, width=120, color_system="standard"))
    with bars.track("training", 10) as task:
        task.advance(4, loss=0.25)
        bars.say("saved [not markup]")
        with bars.track("sampling", 2) as inner:
            inner.advance(2)
        task.advance(6, loss=0.125)
    shown = stream.getvalue()
    assert "\x1b" in shown
    assert "saved [not markup]" in shown
    assert "10/10" in shown
    assert "loss 0.125" in shown
    assert not bars.display.live.is_started


def test_bytes_are_counted_in_bytes():
    stream, clock = io.StringIO(), Clock()
    with Lines(stream, clock).track("fetching", 95_628_359, 10_000_000, unit="B") as task:
        clock.now = 2.0
        task.advance(30_000_000)
        clock.now = 4.0
        task.advance(55_628_359)
    assert stream.getvalue().splitlines() == [
        "fetching 40 MB/95.6 MB (41 %), 15 MB/s, 0:00:04 left",
        "fetching 95.6 MB/95.6 MB (100 %), 21.4 MB/s",
    ]


def test_a_size_that_is_not_known_is_not_shown():
    stream, clock = io.StringIO(), Clock()
    with Lines(stream, clock).track("fetching", 0, unit="B") as task:
        clock.now = 2.0
        task.advance(999_600)
    assert stream.getvalue() == "fetching 1 MB, 500 kB/s\n"
    shown = Terminal()
    with Bars(Console(file=shown, force_terminal=True, width=120)).track("fetching", 0, unit="B") as task:
        task.advance(1_500)
    assert "1.5 kB" in shown.getvalue()
    assert "/0" not in shown.getvalue()


def test_a_failure_inside_closes_the_display():
    bars = Bars(Console(file=Terminal(), force_terminal=True))
    with pytest.raises(ValueError, match="x"), bars.track("training", 10):
        raise ValueError("x")
    assert not bars.display.live.is_started


@pytest.mark.parametrize(
    ("stream", "variables", "quiet", "kind"),
    [
        (Terminal(), {"TERM": "xterm"}, False, Bars),
        (Terminal(), {"TERM": "xterm", "CI": "true"}, False, Lines),
        (Terminal(), {"TERM": "dumb"}, False, Lines),
        (Terminal(), {"TERM": "xterm", "RANK": "1"}, False, Silent),
        (Terminal(), {"TERM": "xterm", "RANK": "0"}, False, Bars),
        (Terminal(), {"TERM": "xterm"}, True, Silent),
        (io.StringIO(), {"TERM": "xterm", "FORCE_COLOR": "1"}, False, Lines),
        (io.StringIO(), {}, True, Silent),
    ],
)
def test_who_sees_what(monkeypatch, stream, variables, quiet, kind):
    monkeypatch.setattr(sys, "stderr", stream)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert isinstance(progress_for(sections.Console(quiet=quiet)), kind)


def test_quiet_says_nothing(capsys):
    progress = progress_for(sections.Console(quiet=True))
    progress.say("talk")
    with progress.track("training", 3) as task:
        task.advance(3, loss=1.0)
    assert capsys.readouterr() == ("", "")


def test_json_is_all_there_is_on_stdout_and_always_parses(capsys):
    data = {"fid": float("nan"), "path": Path("a/b"), "list": (1, float("inf")), "flag": True, "none": None, "text": "ü\n"}
    show(Report(data, ({"a": "b"},), ("a sentence",)), as_json=True)
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == {"fid": None, "path": "a/b", "list": [1, None], "flag": True, "none": None, "text": "ü\n"}


def test_a_pipe_gets_whole_paths_and_no_colours(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    path = "/a/" + "very-long-folder/" * 20 + "patch.safetensors"
    show(Report({}, ({"run": path, "fid [pixels]": "1.5"},), (f"patch: {path}", "[brackets] stay")), as_json=False)
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    lines = out.splitlines()
    assert any(path in line and "1.5" in line for line in lines)
    assert f"patch: {path}" in lines
    assert "[brackets] stay" in lines
    assert "fid [pixels]" in lines[0]


def test_rows_need_not_have_every_column(capsys):
    show(Report({}, ({"a": "1"}, {"b": "2", "a": "3"})), as_json=False)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["a", "b"]
    assert rows[2:] == [["1"], ["3", "2"]]


def test_only_the_first_rank_gives_results(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    show(Report({"a": 1}), as_json=True)
    assert capsys.readouterr().out == ""


def screen(written: str) -> list[str]:
    """The lines of a terminal after this was written to it: what scrolled away included."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[\??[0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b[") and part.endswith("A"):
            row -= int(part[2:-1] or 1)
        elif part.startswith("\x1b[") and part.endswith("K"):
            lines[row] = ""
        elif part[0] not in "\x1b\r":
            lines[row] += part
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_bars_of_a_command_are_drawn_once_and_no_figure_is_cut(width):
    """Two after each other, three inside of one: each that ended is one line or none, whole at every width."""
    stream = Terminal()
    bars = Bars(Console(file=stream, force_terminal=True, width=width, color_system=None, legacy_windows=False))
    with bars.track("inception features of /a/very/long/name/of/a/folder", 50_000) as task:
        task.advance(50_000)
    with bars.track("training the patch", 100_000) as task:
        task.advance(100_000, loss=0.0912345, **{"steps/s": 83.25})
    with bars.track("cells", 3) as cells:
        for number in range(3):
            with bars.track(f"sampling {number}", 5_000) as task:
                task.advance(5_000)
                bars.say(f"cell {number} is done")
            cells.advance()
    lines = screen(stream.getvalue())
    assert all(len(line) <= width for line in lines)
    assert [line.split()[0].strip("…") for line in lines] == ["inception", "training", "cell", "cell", "cell", "cells"]
    assert " 50000/50000" in lines[0]
    assert " 100000/100000 loss 0.09123, 83.25 steps/s" in lines[1]
    assert "training the patch" in lines[1] or width == 60
    assert " 3/3" in lines[-1]
