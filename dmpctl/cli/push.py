"""`dmpctl push`."""

from dmpctl.cli.options import Argument, Call, command
from dmpctl.errors import UsageError
from dmpctl.types import Report


def push(call: Call) -> Report:
    """Publish a patch on the Hub, with a card.

    WHAT is a run, then where it goes, hf://OWNER/NAME. Uploads patch.safetensors, patch.json and README.md in one commit;
    others use it by its address: dmpctl sample hf://OWNER/NAME@REVISION. A backbone that only you have goes along under
    --with-backbone.
    """
    from dmpctl.exchange.push import push as do

    if len(call.argument or []) != 2:
        raise UsageError("push takes a run and where it goes", "dmpctl push runs/digits hf://OWNER/NAME")
    run, to = call.argument
    return do(call.settings, run, to, call.progress)


app = command(
    "push",
    push,
    [
        "dmpctl push runs/digits hf://me/digits-dmp",
        "dmpctl push runs/photos-patched hf://me/photos-dmp --with-backbone --private",
        "dmpctl push runs/digits hf://me/digits-dmp --dry-run",
    ],
    Argument("what", list[str], "Run, then hf://OWNER/NAME."),
)
