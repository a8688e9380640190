"""`dmpctl pretrain`."""

from dmpctl.cli.options import Call, command
from dmpctl.types import Report


def pretrain(call: Call) -> Report:
    """Train a backbone from scratch.

    For data that has no public backbone. The same command goes on where an interrupted one stopped.
    """
    from dmpctl.training.pretrain import pretrain as do

    return do(call.settings, call.progress)


app = command(
    "pretrain",
    pretrain,
    [
        "dmpctl pretrain --data digits --hidden-size 32 --depth 4 --num-heads 4",
        "dmpctl pretrain --data photos/ --size 64 --iters 100000 --ema 0.9999",
    ],
)
