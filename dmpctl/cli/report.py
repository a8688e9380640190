"""`dmpctl report`."""

from pathlib import Path

from dmpctl.cli.options import Argument, Call, command
from dmpctl.types import Report


def report(call: Call) -> Report:
    """Write a run as one HTML page that stands alone.

    No script, no font and no picture is fetched. It has what the run was asked, the verdicts, before and after on the same
    seeds, measurements, curves, gates, and the command that makes the run again.
    """
    from dmpctl.reports.report import report as do

    return do(call.settings, call.argument, call.progress)


app = command(
    "report",
    report,
    ["dmpctl report runs/digits", "dmpctl report runs/digits --out digits.html"],
    Argument("run", Path, "Run of dmpctl patch or pretrain."),
)
