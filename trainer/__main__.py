"""argv -> one command; errors -> exit codes; nothing else.

What takes long to import is imported in the functions, after the first handlers of signals are there.
"""

import errno
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import NoReturn

from trainer import __version__
from trainer.errors import ExitCode, TrainerError
from trainer.startup import answer_early_stops, asks_for_json

_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}


def run(argv: Sequence[str]) -> str:
    """Do what the arguments ask; return what is printed at the end."""
    from trainer.arguments import parse
    from trainer.commands import COMMANDS
    from trainer.help import help_text

    command, values = parse(argv)
    if values.help:
        return help_text(values, command if command in argv else None)
    if values.version:
        return f"pix2pix-trainer {__version__}"
    return COMMANDS[command](values)


_LAST: list[BaseException] = []


def _say(text: str) -> None:
    """Print to a reader who may be gone, as in `trainer ... | head`: that is no reason to fail."""
    with suppress(OSError):
        print(text, flush=True)


def _tell(error: BaseException, *lines: str) -> None:
    """Print why it failed; hold the failure, and through its traceback the input pipeline, until the process is gone."""
    _LAST.append(error)
    with suppress(OSError):
        for line in lines:
            print(f"trainer: {line}", file=sys.stderr, flush=True)


def _advice(error: OSError) -> str:
    """What to do about an error of the system, where that is known."""
    if error.errno not in _NOT_ALLOWED:
        return ""
    return f"; let user {os.getuid()}:{os.getgid()} read and write there, or choose another place"


def _raise_at_signals() -> None:
    """From here on a signal ends the command from within, so that it can clean up."""
    from trainer.commands import stop_at

    signal.signal(signal.SIGTERM, stop_at)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def told(argv: Sequence[str]) -> int:
    """Run, print the closing lines or what went wrong, and return the exit code."""
    try:
        _raise_at_signals()
        _say(run(argv))
    except TrainerError as error:
        _tell(error, *str(error).splitlines())
        return error.exit_code
    except KeyboardInterrupt as error:
        _tell(error, "SIGINT: stopped; no training was under way, so nothing is lost")
        return ExitCode.STOPPED
    except OSError as error:
        _tell(error, f"{error.filename or 'input or output'}: {error.strerror or error}{_advice(error)}")
        return ExitCode.USER if error.errno in _NOT_ALLOWED else ExitCode.UNEXPECTED
    return ExitCode.DONE


def _end_with_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What the interpreter does with an error that nobody foresaw, without its own end."""
    _LAST.append(error)
    sys.__excepthook__(kind, error, trace)
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(ExitCode.UNEXPECTED)


def wants_json(argv: Sequence[str]) -> bool:
    """Whether the lines are for machines; where the flags are wrong, that is told in the form that they ask for."""
    from trainer.arguments import parse

    try:
        return bool(parse(argv)[1].log_format == "json")
    except TrainerError:
        return asks_for_json(argv)


def main() -> NoReturn:
    """The console script: run, print, and leave with a code from the table in errors.py.

    It leaves without the interpreter's own end: that frees input pipelines while their threads wait for the interpreter, and
    neither can go on.
    """
    answer_early_stops(sys.argv)
    sys.excepthook = _end_with_traceback
    from trainer.relay import relay

    os._exit((relay if wants_json(sys.argv) else told)(sys.argv))


def relayed() -> NoReturn:
    """The child of the relay."""
    answer_early_stops(sys.argv)
    sys.excepthook = _end_with_traceback
    from trainer.relay import stop_with_the_relay

    stop_with_the_relay()
    os._exit(told(sys.argv))


if __name__ == "__main__":
    main()
