"""`dmpctl download`."""

from dmpctl.cli.options import Argument, Call, command
from dmpctl.types import Report


def download(call: Call) -> Report:
    """Fetch assets into the cache, each checked against its sha256.

    Without a name, lists what there is, what is in the cache already, and the licences.
    """
    from dmpctl.engine import fetch

    return fetch.download(call.settings, call.argument or [], call.progress)


app = command(
    "download",
    download,
    [
        "dmpctl download --list",
        "dmpctl download inception vae-ema",
        "dmpctl download dit-xl2-256 --accept-license",
        "dmpctl download --for experiment.toml",
        "dmpctl download --verify",
        "dmpctl download --prune --dry-run",
    ],
    Argument("names", list[str], "Assets to fetch; none: list them.", optional=True),
)
