"""`dmpctl fid`."""

from dmpctl.cli.options import Argument, Call, command
from dmpctl.types import Report


def fid(call: Call) -> Report:
    """Measure the Frechet distance to real images.

    WHAT is a run, whose patched images are then made, a folder of images, an npz in ADM's layout, or a file of statistics.
    Every number comes with its protocol and how sure it is. What was stopped goes on when the same command is given again.
    """
    from dmpctl.measuring.evaluate import fid as do

    return do(call.settings, call.argument, call.progress)


app = command(
    "fid",
    fid,
    [
        "dmpctl fid runs/digits --versus backbone",
        "dmpctl fid images/ --reference photos/ --metrics fid,pr,kid --noise-floor",
        "dmpctl fid samples.npz --reference VIRTUAL_imagenet256_labeled.npz --metrics fid,sfid,is,pr",
        "dmpctl fid runs/ffhq --fail-above 6.0 --strict --json",
        "dmpctl fid runs/ffhq --show",
    ],
    Argument("what", str, "Run, folder of images, npz or file of statistics."),
)
