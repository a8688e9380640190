"""Every expected failure: one sentence, a hint, and its documented exit code."""

import signal

PREEMPTED = 75  # under --requeue: the job may be put back into the queue, and goes on


class DmpError(Exception):
    """An expected failure, shown as one sentence and a hint, never as a traceback.

    `hint` says what to type next; None where there is nothing to suggest.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(DmpError):
    """Wrong usage, wrong settings, or two protocols that cannot be compared."""

    exit_code = 2


class InUse(UsageError):
    """Another command is at work in this run."""


class MissingError(DmpError):
    """Something needed is not there: an asset, a file, a run; or we are offline."""

    exit_code = 3


class IntegrityError(DmpError):
    """Something is there but is not what it should be: a hash, a corrupt file, the wrong backbone."""

    exit_code = 4


class Damaged(IntegrityError):
    """A file that is not what was written. Who can make it again puts it aside, says so, and does."""


class NumericalError(DmpError):
    """Numbers that are not finite."""

    exit_code = 5


class ThresholdError(DmpError):
    """A threshold that was asked for was not met."""

    exit_code = 6


class Interrupted(DmpError):
    """Stopped by a signal after saving: 130 for SIGINT, 143 for others; 75 (resumable) for those under --requeue."""

    def __init__(self, message: str, signal_number: int, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.signal_number = signal_number
        self.exit_code = 128 + (signal.SIGINT if signal_number == signal.SIGINT else signal.SIGTERM)

    def requeued(self) -> "Interrupted":
        """Returns this error with exit code 75, which asks a scheduler to put the job into its queue again; SIGINT stays 130."""
        if self.signal_number != signal.SIGINT:
            self.exit_code = PREEMPTED
        return self
