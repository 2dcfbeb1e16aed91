"""The table of exit codes and the few exception classes that users can meet."""

import enum


class ExitCode(enum.IntEnum):
    """What the process's exit status tells a scheduler (docs/operations.md holds the same table)."""

    DONE = 0
    UNEXPECTED = 1
    USER = 2
    DIVERGED = 3
    AGAIN = 75
    STOPPED = 143


class TrainerError(Exception):
    """A failure that is told to the user in the lines of its message, without a traceback."""

    exit_code = ExitCode.UNEXPECTED


class UserError(TrainerError):
    """Config, flags or data must change before another try can succeed."""

    exit_code = ExitCode.USER


class ConfigError(UserError):
    """One or more problems in the configuration; the message has one line for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DataError(UserError):
    """A data set, shard, record or image is missing or damaged; the message names it."""


class DivergedError(TrainerError):
    """A loss or a gradient is not finite; the update that it belongs to was not made."""

    exit_code = ExitCode.DIVERGED


class PeerLostError(TrainerError):
    """A worker went away, hangs or never came; nothing is wrong with this one, and all of them may be run again."""

    exit_code = ExitCode.AGAIN


class BucketAwayError(TrainerError):
    """A bucket did not answer for as long as we are willing to wait; nothing is lost, and the same command goes on."""

    exit_code = ExitCode.AGAIN


class BucketRefusedError(UserError):
    """A bucket is not there, or refuses what was asked of it for good; the message names bucket, permission and account."""


class StoppedError(TrainerError):
    """A signal asked the process to stop; the message says what was saved."""

    exit_code = ExitCode.STOPPED
