"""`dmpctl download`."""

from dmpctl.cli.options import Argument, Call, command
from dmpctl.types import Report


def download(call: Call) -> Report:
    """Fetch assets into the cache, each checked against its sha256.

    Without a name, lists what there is, what is in the cache already, and the licences. With --latents the images that
    are named are encoded, too, as patch and pretrain would do at first.
    """
    from dmpctl.store.download import download as do

    if call.settings.download.encode_with is not None:
        from dmpctl.models.encode_ahead import encode_ahead

        return encode_ahead(call.settings, call.argument or [], call.progress)
    return do(call.settings, call.argument or [], call.progress)


app = command(
    "download",
    download,
    [
        "dmpctl download --list",
        "dmpctl download inception vae-ema",
        "dmpctl download dit-xl2-256 --accept-license",
        "dmpctl download ffhq --accept-license --latents vae-ema --size 256",
        "dmpctl download --for experiment.toml",
        "dmpctl download --verify",
        "dmpctl download --prune --dry-run",
    ],
    Argument(
        "names", list[str], "Assets to fetch, with --latents also folders and hf://OWNER/NAME; none: list them.", optional=True
    ),
)
