"""`dmpctl import`."""

from pathlib import Path

from dmpctl.cli.options import Argument, Call, command
from dmpctl.types import Report


def import_(call: Call) -> Report:
    """Take other people's checkpoints apart into a run.

    FILE is a published DMP checkpoint (.pt), whose backbone and patch come apart; a DiT checkpoint (.pt), which becomes a
    backbone; a .safetensors file, such as export --to merged writes; or a folder with a DiT in diffusers' layout, which
    becomes one in the original layout. Nothing that it pickles is run.
    """
    from dmpctl.exchange.importer import import_file as do

    return do(call.settings, call.argument, call.progress)


app = command(
    "import",
    import_,
    [
        "dmpctl import DiT-XL-2-256x256.pt --run runs/dit-xl",
        "dmpctl import 0050000.pt --shape DiT-B/2 --schedule cosine",
        "dmpctl import merged.safetensors --run runs/apart",
    ],
    Argument("file", Path, "Checkpoint (.pt), .safetensors file or folder."),
)
