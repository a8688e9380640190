"""`dmpctl sample`."""

from pathlib import Path

from dmpctl.cli.options import Argument, Call, command
from dmpctl.types import Report


def sample(call: Call) -> Report:
    """Sample images with a patch, or with its backbone alone.

    Image k depends on the seed and k only. Images that are there already are kept.
    """
    from dmpctl.sampling.generate import sample as do

    return do(call.settings, call.argument, call.progress)


app = command(
    "sample",
    sample,
    [
        "dmpctl sample runs/digits",
        "dmpctl sample runs/digits --unpatched --num-images 16",
        "dmpctl sample runs/digits --sampler ddim --steps 50 --format npz",
    ],
    Argument("run", Path, "Run (or checkpoint) with the patch."),
)
