"""`dmpctl export`."""

from pathlib import Path

from dmpctl.cli.options import Argument, Call, command
from dmpctl.types import Report


def export(call: Call) -> Report:
    """Write a run's result in a form for others.

    patch: a folder with the patch alone. merged: one file with its backbone, which sample, fid and inspect-gates take as
    a run; lora and full are folded into the weights. dmp-pt: a checkpoint that the published DMP code reads.
    """
    from dmpctl.exchange.export import export as do

    return do(call.settings, call.argument, call.progress)


app = command(
    "export",
    export,
    [
        "dmpctl export runs/digits",
        "dmpctl export runs/digits --to patch --out digits-patch",
        "dmpctl export runs/digits --to dmp-pt --out 0004000.pt",
    ],
    Argument("run", Path, "Run (or checkpoint) with the patch."),
)
