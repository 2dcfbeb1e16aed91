"""--log_format=json: the trainer runs as a child, and whatever comes out of it goes to stdout as one JSON object a line.

A process of its own, because TensorFlow writes to the file descriptors from C++, and because of a process that dies in C++ only
another one can say so.
"""

import ctypes
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

from trainer.errors import ExitCode
from trainer.runtime.logs import FIELDS, Where, entry
from trainer.startup import STOPS, is_noise

CHILD = "from trainer.__main__ import relayed; relayed()"
_SEVERITIES = {"I": "INFO", "W": "WARNING", "E": "ERROR", "F": "CRITICAL"}
# TensorFlow 2.21 and absl: letter and date, process, file and line. TensorFlow 2.20: date, letter, file and line.
_GLOG = re.compile(r"^(?:[\d-]+ [\d:.]+: )?([IWEF])(?:\d{4} [\d:.]+ +\d+)? [\w./-]+:\d+\] ")
_STOPPED = re.compile(r"^trainer: (?:SIG[A-Z]+|a signal to another worker): stopped; ")
_TRACEBACK = "Traceback (most recent call last):"
_PR_SET_PDEATHSIG = 1


def stop_with_the_relay() -> None:
    """In the child: ask the kernel for a SIGTERM when the relay is gone, and hear the signals that it held back at the start."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _own(line: str) -> dict[str, Any] | None:
    """A line that is an entry already."""
    try:
        document = json.loads(line)
    except json.JSONDecodeError:
        return None
    return document if isinstance(document, dict) and set(document) == set(FIELDS) else None


class Reader:
    """Makes entries of lines: its own JSON as it is; a traceback, from its heading to the line that names the error, as one.

    Lines of TensorFlow, absl and the trainer have the severity that they begin with, and so have the lines that follow them
    without saying who speaks: they belong to the same message.
    """

    def __init__(self) -> None:
        self._traceback: list[str] = []
        self._severity = "INFO"

    def entries(self, line: str) -> Iterator[dict[str, Any]]:
        """What one more line completes."""
        if document := _own(line):
            Where.step, Where.worker = document["step"], document["worker"]
            self._severity = "INFO"
            yield document
        elif self._traceback and not _GLOG.match(line):
            self._traceback.append(line)
            if line and not line.startswith(" "):
                yield from self.end()
        elif line.startswith(_TRACEBACK):
            self._traceback = [line]
        elif line and not is_noise(line.encode()):
            yield self._plain(line)

    def end(self) -> Iterator[dict[str, Any]]:
        """What is left."""
        if self._traceback:
            yield entry("ERROR", "\n".join(self._traceback))
        self._traceback, self._severity = [], "INFO"

    def _plain(self, line: str) -> dict[str, Any]:
        if found := _GLOG.match(line):
            self._severity, line = _SEVERITIES[found[1]], line[found.end() :]
        elif _STOPPED.match(line):
            self._severity = "WARNING"
        elif line.startswith(("trainer: ", "Fatal Python error")):
            self._severity = "ERROR"
        return entry(self._severity, line)


def entries(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """All lines as entries."""
    reader = Reader()
    for line in lines:
        yield from reader.entries(line.rstrip("\n"))
    yield from reader.end()


class _Output:
    """Stdout, until whoever reads it is gone, as in `trainer ... | head`: the child goes on all the same."""

    def __init__(self) -> None:
        self._gone = False

    def write(self, document: dict[str, Any]) -> None:
        if not self._gone:
            try:
                print(json.dumps(document), flush=True)
            except OSError:
                self._gone = True


def _end(killer: int, passed_on: set[int]) -> tuple[dict[str, Any], int]:
    """The last entry and the exit code, after a signal has ended the child, which had no time to say so."""
    name = signal.Signals(killer).name
    if killer in passed_on:
        line = f"trainer: {name}: stopped; the same command begins again, or goes on from what is saved"
        return entry("WARNING", line), ExitCode.STOPPED
    memory = "too little memory? raise the limit; " if killer == signal.SIGKILL else ""
    line = f"trainer: {name} ended the process; {memory}the same command goes on from what is saved"
    return entry("CRITICAL", line), 128 + killer


def relay(argv: Sequence[str]) -> int:
    """Run the trainer with these arguments as a child; pass signals on to it and its lines out; return its exit code."""
    command = [sys.executable, "-c", CHILD, *argv[1:]]
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until there is a child to pass them on to
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    passed_on: set[int] = set()

    def pass_on(signum: int, frame: FrameType | None) -> None:
        passed_on.add(signum)
        child.send_signal(signum)

    for number in STOPS:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    assert child.stdout is not None
    output = _Output()
    for document in entries(child.stdout):
        output.write(document)
    code = child.wait()
    if code < 0:
        last, code = _end(-code, passed_on)
        output.write(last)
    return code
