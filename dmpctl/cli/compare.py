"""`dmpctl compare`."""

from pathlib import Path

from dmpctl.cli.options import Argument, Call, command
from dmpctl.types import Report


def compare(call: Call) -> Report:
    """Compare variants over seeds, with tests and a plot.

    FILE is TOML. [compare]: run, seeds, tuning_seeds, eval_data, eval_images, against. [stages]: NAME = what --base takes.
    [settings]: options of patch for all. [variants.NAME]: options of patch; tune.OPTION = [values to choose from on the
    tuning seeds]; stages = [only these]; continue = true trains the backbone itself on. What is done is not done again,
    and the same command started twice shares the work.
    """
    from dmpctl.studies.compare import compare as do

    return do(call.settings, call.argument, call.progress)


app = command(
    "compare",
    compare,
    [
        "dmpctl compare examples/digits-table1.toml --dry-run",
        "dmpctl compare examples/digits-table1.toml",
    ],
    Argument("file", Path, "TOML file of the study."),
)
