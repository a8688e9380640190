"""`dmpctl fid`."""

from dmpctl.cli.options import Argument, Call, command
from dmpctl.types import Report


def fid(call: Call) -> Report:
    """Measure the Frechet distance to real images.

    WHAT is a run, whose patched images are then made, a folder of images, or an npz in ADM's layout.
    """
    from dmpctl.engine import evaluate

    return evaluate.fid(call.settings, call.argument, call.progress)


app = command(
    "fid",
    fid,
    [
        "dmpctl fid runs/digits --extractor pixels --max-images 5000",
        "dmpctl fid images/ --reference photos/",
    ],
    Argument("what", str, "Run, or folder of images."),
)
