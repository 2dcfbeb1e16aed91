"""argv -> one command; errors -> exit codes; nothing else."""

import sys
from collections.abc import Sequence

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


def main() -> None:
    """The console script: run, print, and leave with a code from the table in errors.py."""
    try:
        print(run(sys.argv))
    except TrainerError as error:
        print("".join(f"trainer: {line}\n" for line in str(error).splitlines()), end="", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("trainer: SIGINT: stopped; no training was under way, so nothing is lost", file=sys.stderr)
        sys.exit(ExitCode.STOPPED)
    except OSError as error:
        print(f"trainer: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(ExitCode.UNEXPECTED)


if __name__ == "__main__":
    main()
