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

from trainer.runtime.logs import Where, entry

CHILD = "from trainer.__main__ import relayed; relayed()"
_SEVERITIES = {"I": "INFO", "W": "WARNING", "E": "ERROR", "F": "CRITICAL"}
# TensorFlow 2.21 and absl: letter and date, process, file and line. TensorFlow 2.20: date, letter, file and line.
_GLOG = re.compile(r"^(?:[\d-]+ [\d:.]+: )?([IWEF])(?:\d{4} [\d:.]+ +\d+)? [\w./-]+:\d+\] ")
_PR_SET_PDEATHSIG = 1
_STOPS = (signal.SIGTERM, signal.SIGINT)


def stop_with_the_relay() -> None:
    """In the child: ask the kernel for a SIGTERM when the relay is gone, and hear the signals that it held back at the start."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


def parsed(line: str) -> dict[str, Any]:
    """One line of the child as an entry: its own JSON as it is, TensorFlow's and absl's by the letter they begin with."""
    try:
        document = json.loads(line)
    except json.JSONDecodeError:
        document = None
    if isinstance(document, dict) and {"severity", "message"} <= set(document):
        Where.step, Where.worker = document.get("step"), document.get("worker", 0)
        return document
    if found := _GLOG.match(line):
        return entry(_SEVERITIES[found[1]], line[found.end() :])
    return entry("ERROR" if line.startswith(("trainer: ", "Fatal Python error")) else "INFO", line)


def entries(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Each line as an entry; a traceback, from its heading to the line that names the error, as one."""
    traceback: list[str] = []
    for line in (line.rstrip("\n") for line in lines):
        if traceback:
            traceback.append(line)
            if line and not line.startswith(" "):
                yield entry("ERROR", "\n".join(traceback))
                traceback = []
        elif line.startswith("Traceback (most recent call last):"):
            traceback = [line]
        elif line:
            yield parsed(line)
    if traceback:
        yield entry("ERROR", "\n".join(traceback))


def relay(argv: Sequence[str]) -> int:
    """Run the trainer with these arguments as a child; pass signals on to it and its lines out; return its exit code."""
    command = [sys.executable, "-c", CHILD, *argv[1:]]
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # until there is a child to pass them on to
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )

    def pass_on(signum: int, frame: FrameType | None) -> None:
        child.send_signal(signum)

    for number in _STOPS:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    assert child.stdout is not None
    for document in entries(child.stdout):
        print(json.dumps(document), flush=True)
    code = child.wait()
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    print(
        json.dumps(entry("CRITICAL", f"trainer: {name} ended the process; the same command goes on from what is saved")),
        flush=True,
    )
    return 128 - code
