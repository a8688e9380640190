"""Whole commands, from the shell to the prompt."""

from pathlib import Path
from typing import Any

from benchmarks.bench.timing import command, interleaved

LINE = ("--batch-size", 8, "--no-evaluate", "--cpu")


def measure(rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of `--help`, of a dry run, of one training step by one process and by two that the launcher starts."""
    number = 0

    def one_step(*more: object) -> None:
        nonlocal number
        number += 1
        command("patch", "--run", folder / f"run{number}", "--iters", 1, *LINE, *more)()

    seconds = interleaved(
        {
            "--help": command("--help"),
            "patch --help": command("patch", "--help"),
            "patch --dry-run": command("patch", "--dry-run", "--run", folder / "dry", *LINE),
            "first step": one_step,
            "first step of two processes": lambda: one_step("--num-processes", 2),
        },
        rounds,
        warm_ups=1,
    )
    return {"seconds": seconds, "launched / one process": seconds["first step of two processes"] / seconds["first step"]}
