"""The commands as real processes: forked from a warm parent, or started cold where the start itself is what a test is about."""

import atexit
import ctypes
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[2]
PR_SET_CHILD_SUBREAPER = 36
# What is read while libraries are imported, which a warm parent has done already; TF_CONFIG is not.
READ_AT_IMPORT = ("TF_CPP", "TF_XLA", "TF_USE", "TF_ENABLE", "XLA_", "KERAS_", "PYTHON", "OMP_", "MALLOC_", "LD_", "CUDA_")
_STARTING = threading.Lock()


def _adopt_orphans(wanted: bool) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(wanted))


@cache
def _warm_parent() -> str:
    """Start the warm parent of this process, once; the address of its socket."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    address = str(folder / "socket")
    command = [sys.executable, "-m", "tests.helpers.warm", address]
    parent = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n", "the warm parent did not start"

    def end() -> None:
        parent.kill()
        parent.wait()
        shutil.rmtree(folder)

    atexit.register(end)
    return address


class Forked(subprocess.Popen[str]):
    """`python -m MODULE` or `python -c TEXT`, forked by the warm parent and handed over: a child like any other."""

    def _execute_child(self, *given: object) -> None:
        """Start the child: the one step of Popen that is done otherwise here."""
        named = inspect.signature(subprocess.Popen._execute_child).bind(self, *given).arguments
        pipes = {name: named[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")}
        streams = [named["p2cread"], named["c2pwrite"], named["errwrite"]]
        request = self._request(named["args"], named["env"], named["cwd"])
        nothing = os.open(os.devnull, os.O_RDONLY)
        try:
            self.pid = fork_elsewhere(request, [stream if stream != -1 else nothing for stream in streams])
            self._child_created = True
        finally:
            os.close(nothing)
            self._close_pipe_fds(*pipes.values())

    @staticmethod
    def _request(command: list[str], environment: dict[str, str] | None, folder: str | None) -> dict[str, Any]:
        python, flag, what, *arguments = command
        assert python == sys.executable
        assert flag in ("-m", "-c")
        ignored = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is signal.SIG_IGN]
        return {
            "flag": flag,
            "what": what,
            "argv": [what if flag == "-m" else flag, *arguments],
            "environment": dict(os.environ) if environment is None else environment,
            "folder": str(folder or Path.cwd()),
            "ignored": ignored,
        }


def fork_elsewhere(request: dict[str, Any], streams: list[int]) -> int:
    """Let the warm parent fork a child for this process; its process id."""
    address = _warm_parent()
    with _STARTING, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(address)
        _adopt_orphans(True)
        try:
            socket.send_fds(connection, [json.dumps(request).encode()], streams)
            return int(connection.recv(32))
        finally:
            _adopt_orphans(False)


def _start(
    command: Sequence[str], output: TextIO | None, *, cold: bool, merged: bool, environment: dict[str, str]
) -> subprocess.Popen[str]:
    cold = cold or any(name.startswith(READ_AT_IMPORT) for name in environment)
    out, err = (output, subprocess.STDOUT) if output else (subprocess.PIPE, subprocess.STDOUT if merged else subprocess.PIPE)
    path = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(ROOT)]))
    variables = dict(os.environ) | environment | {"PYTHONPATH": path}
    kind = subprocess.Popen if cold else Forked
    return kind([sys.executable, *command], stdout=out, stderr=err, text=True, env=variables)


def start_module(
    module: str, *arguments: str, output: TextIO | None = None, cold: bool = False, **environment: str
) -> subprocess.Popen[str]:
    """`python -m MODULE ARGUMENTS` as its own process.

    Args:
        module: such as `trainer`.
        arguments: of the command line.
        output: an open file for both of its streams; None: two pipes.
        cold: start a new interpreter. A variable that is read while libraries are imported asks for one too.
        environment: variables beside those of this process.
    """
    return _start(["-m", module, *arguments], output, cold=cold, merged=False, environment=environment)


def start_program(
    text: str, *arguments: str, output: TextIO | None = None, cold: bool = False, merged: bool = False, **environment: str
) -> subprocess.Popen[str]:
    """`python -c TEXT ARGUMENTS` as its own process, in which a test can change something before it calls the trainer.

    Args:
        text: the program.
        arguments: what it finds in sys.argv[1:].
        output: an open file for both of its streams; None: two pipes.
        cold: as for `start_module`.
        merged: both streams come out of stdout.
        environment: variables beside those of this process.
    """
    return _start(["-c", text, *arguments], output, cold=cold, merged=merged, environment=environment)


def start_trainer(*arguments: str, output: TextIO | None = None, cold: bool = False, **environment: str) -> subprocess.Popen[str]:
    """`trainer ARGUMENTS` as its own process; both its streams go to `output`, if that is given."""
    return start_module("trainer", *arguments, output=output, cold=cold, **environment)


def run_trainer(*arguments: str, cold: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `trainer ARGUMENTS` to its end."""
    return finish(start_trainer(*arguments, cold=cold, **environment))


def _state_and_parent(pid: int) -> tuple[str, int] | None:
    """The letter of a process's state, and its parent; None when it has gone, even between two looks."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return state, int(parent)


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    found = _state_and_parent(pid)
    return found is not None and found[0] not in "ZX"


def children() -> set[int]:
    """Processes whose parent this one is, zombies among them."""
    parents = {int(entry.name): _state_and_parent(int(entry.name)) for entry in Path("/proc").glob("[0-9]*")}
    return {pid for pid, found in parents.items() if found is not None and found[1] == os.getpid()}


def finish(process: subprocess.Popen[str], seconds: float = 240) -> subprocess.CompletedProcess[str]:
    """What a process printed, and how it ended."""
    out, err = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
