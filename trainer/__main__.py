"""argv -> one command; errors -> exit codes; nothing else."""

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from trainer import __version__
from trainer.arguments import parse
from trainer.commands import COMMANDS, stop_at
from trainer.errors import ExitCode, TrainerError
from trainer.help import help_text
from trainer.relay import relay, stop_with_the_relay


def run(argv: Sequence[str]) -> str:
    """Do what the arguments ask; return what is printed at the end."""
    command, values = parse(argv)
    if values.help:
        return help_text(values, command if command in argv else None)
    if values.version:
        return f"pix2pix-trainer {__version__}"
    return COMMANDS[command](values)


_LAST: list[BaseException] = []


def _tell(error: BaseException, *lines: str) -> None:
    """Print why it failed; hold the failure, and through its traceback the input pipeline, until the process is gone."""
    _LAST.append(error)
    for line in lines:
        print(f"trainer: {line}", file=sys.stderr, flush=True)


def told(argv: Sequence[str]) -> int:
    """Run, print the closing lines or what went wrong, and return the exit code."""
    signal.signal(signal.SIGTERM, stop_at)
    try:
        print(run(argv), flush=True)
    except TrainerError as error:
        _tell(error, *str(error).splitlines())
        return error.exit_code
    except KeyboardInterrupt as error:
        _tell(error, "SIGINT: stopped; no training was under way, so nothing is lost")
        return ExitCode.STOPPED
    except OSError as error:
        _tell(error, f"{error.filename or 'input or output'}: {error.strerror or error}")
        return ExitCode.UNEXPECTED
    return ExitCode.DONE


def wants_json(argv: Sequence[str]) -> bool:
    """Whether the lines are for machines; where the flags are wrong, that is told in the form that they ask for."""
    try:
        return bool(parse(argv)[1].log_format == "json")
    except TrainerError:
        return "--log_format=json" in argv


def main() -> NoReturn:
    """The console script: run, print, and leave with a code from the table in errors.py.

    It leaves without the interpreter's own end: that frees input pipelines while their threads wait for the interpreter, and
    neither can go on.
    """
    os._exit((relay if wants_json(sys.argv) else told)(sys.argv))


def relayed() -> NoReturn:
    """The child of the relay."""
    stop_with_the_relay()
    os._exit(told(sys.argv))


if __name__ == "__main__":
    main()
