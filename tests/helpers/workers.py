"""Several workers as real processes on loopback."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.processes import start_trainer
from tests.helpers.waiting import wait_until

LOOPBACK = "127.0.0.1"


def hold() -> socket.socket:
    """Keep a port from everybody who asks for any port; who names this one, and allows reuse, gets it.

    Linux lets two sockets have an address as long as both allow reuse and at most one of them listens.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((LOOPBACK, 0))
    return held


@contextmanager
def held_ports(count: int) -> Iterator[list[int]]:
    """Ports that nobody else is given until the block ends."""
    sockets = [hold() for _ in range(count)]
    try:
        yield [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@contextmanager
def taken(port: int) -> Iterator[socket.socket]:
    """Listen on a port that is held, as a program of somebody else would."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen()
        yield listener


def tf_config(ports: list[int], index: int) -> str:
    """TF_CONFIG of one of several workers."""
    cluster = {"worker": [f"{LOOPBACK}:{port}" for port in ports]}
    return json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})


class Workers:
    """`trainer ARGUMENTS` on each of several workers; their lines go to files, which a test can watch."""

    def __init__(self, logs: Path, *arguments: str, count: int = 2, only: tuple[int, ...] | None = None) -> None:
        self._holds = [hold() for _ in range(count)]
        self.ports = [one.getsockname()[1] for one in self._holds]
        self.logs = logs
        self.processes: dict[int, subprocess.Popen[str]] = {}
        for index in range(count) if only is None else only:
            self.start(index, *arguments)

    def start(self, index: int, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start one of them."""
        self.logs.mkdir(parents=True, exist_ok=True)
        with (self.logs / f"{index}.log").open("w") as log:
            process = start_trainer(*arguments, output=log, TF_CONFIG=tf_config(self.ports, index), **environment)
        self.processes[index] = process
        return process

    def log(self, index: int) -> str:
        """What a worker has printed so far."""
        return (self.logs / f"{index}.log").read_text()

    def last_line(self, index: int) -> str:
        """What it printed last."""
        return self.log(index).strip().splitlines()[-1]

    def wait_for(self, index: int, words: str, seconds: float = 90) -> None:
        """Wait until a worker has printed some words."""
        wait_until(lambda: words in self.log(index), self.processes[index], seconds, f"{words!r} of worker {index}")

    def codes(self, seconds: float = 120) -> dict[int, int]:
        """The exit codes, once all have ended."""
        deadline = time.monotonic() + seconds
        try:
            return {index: one.wait(max(0.1, deadline - time.monotonic())) for index, one in self.processes.items()}
        finally:
            for one in self.processes.values():
                if one.poll() is None:
                    one.kill()
                    one.wait()
            for held in self._holds:
                held.close()
