"""`dmpctl doctor`."""

from dmpctl.cli.options import Call, command
from dmpctl.types import Report


def doctor(call: Call) -> Report:
    """Show versions, devices, caches and the offline state.

    Opens no connection and writes nothing.
    """
    from dmpctl.reports.doctor import examine as do

    return do(call.settings)


app = command("doctor", doctor, ["dmpctl doctor", "dmpctl doctor --json"])
