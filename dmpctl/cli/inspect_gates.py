"""`dmpctl inspect-gates`."""

from pathlib import Path

from dmpctl.cli.options import Argument, Call, command
from dmpctl.types import Report


def inspect_gates(call: Call) -> Report:
    """Show how the gates mix the prompts, per block and timestep.

    Needs no images: the gates see only the timestep, the label or caption, and the block index. --with-backbone runs the
    backbone on some, for the size of the edit.
    """
    from dmpctl.gates.inspect import inspect as do

    return do(call.settings, call.argument, call.progress)


app = command(
    "inspect-gates",
    inspect_gates,
    [
        "dmpctl inspect-gates runs/digits",
        "dmpctl inspect-gates runs/digits --timesteps 20 --no-plot --json",
        "dmpctl inspect-gates runs/digits --with-backbone --compare runs/other",
        "dmpctl inspect-gates runs/digits --watch 30",
    ],
    Argument("run", Path, "Run (or checkpoint) with the patch."),
)
