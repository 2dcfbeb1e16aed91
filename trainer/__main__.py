"""argv -> one command; errors -> exit codes; nothing else."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from trainer import __version__
from trainer.arguments import parse
from trainer.commands import COMMANDS
from trainer.errors import ExitCode, TrainerError
from trainer.help import help_text


def run(argv: Sequence[str]) -> str:
    """Do what the arguments ask; return what is printed at the end."""
    command, values = parse(argv)
    if values.help:
        return help_text(values, command if command in argv else None)
    if values.version:
        return f"pix2pix-trainer {__version__}"
    return COMMANDS[command](values)


def main() -> NoReturn:
    """The console script: run, print, and leave with a code from the table in errors.py.

    It leaves without the interpreter's own end: that frees input pipelines while their threads wait for the interpreter, and
    neither can go on.
    """
    code = told(sys.argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def told(argv: Sequence[str]) -> int:
    """Run, print the closing lines or what went wrong, and return the exit code."""
    try:
        print(run(argv))
    except TrainerError as error:
        print("".join(f"trainer: {line}\n" for line in str(error).splitlines()), end="", file=sys.stderr)
        _keep(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("trainer: SIGINT: stopped; no training was under way, so nothing is lost", file=sys.stderr)
        return ExitCode.STOPPED
    except OSError as error:
        print(f"trainer: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        _keep(error)
        return ExitCode.UNEXPECTED
    return ExitCode.DONE


_LAST: list[Exception] = []


def _keep(error: Exception) -> None:
    """Hold the failure, and through its traceback the input pipeline, until the process is gone (see `main`)."""
    _LAST.append(error)


if __name__ == "__main__":
    main()
