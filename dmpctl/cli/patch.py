"""`dmpctl patch`."""

from dmpctl.cli.options import Call, command
from dmpctl.types import Report


def patch(call: Call) -> Report:
    """Train a patch on a frozen backbone.

    Without options: the bundled digits backbone, on a CPU, without a network. The same command goes on where an
    interrupted one stopped.
    """
    from dmpctl.training.patch import patch as do

    return do(call.settings, call.progress)


app = command(
    "patch",
    patch,
    [
        "dmpctl patch",
        "dmpctl patch --iters 500 --run runs/first --json",
        "dmpctl patch --base runs/pretrain-photos --data photos/ --preset dmp",
        "dmpctl patch --gate topk --topk 8 --print-config",
    ],
)
