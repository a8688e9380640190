"""Every expected failure: one sentence, a hint, and its documented exit code."""

import signal

PREEMPTED = 75  # after SIGUSR1, by which schedulers give notice: the job may be put back into the queue


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


class NumericalError(DmpError):
    """Numbers that are not finite."""

    exit_code = 5


class ThresholdError(DmpError):
    """A threshold that was asked for was not met."""

    exit_code = 6


class Interrupted(DmpError):
    """Stopped by a signal after saving: 130 for SIGINT, 143 for SIGTERM, 75 for SIGUSR1 (preempted, resumable)."""

    def __init__(self, message: str, signal_number: int, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.exit_code = PREEMPTED if signal_number == signal.SIGUSR1 else 128 + signal_number
