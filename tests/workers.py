"""Several workers as real processes on loopback."""

import json
import socket
import subprocess
import time
from pathlib import Path

from tests.conftest import start_trainer


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def tf_config(ports: list[int], index: int) -> str:
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    return json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})


class Workers:
    """`trainer ARGUMENTS` on each of several workers; their lines go to files, which a test can watch."""

    def __init__(self, logs: Path, *arguments: str, count: int = 2, only: tuple[int, ...] | None = None) -> None:
        self.ports = free_ports(count)
        self.logs = logs
        self.processes: dict[int, subprocess.Popen[str]] = {}
        for index in range(count) if only is None else only:
            self.start(index, *arguments)

    def start(self, index: int, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        self.logs.mkdir(parents=True, exist_ok=True)
        with (self.logs / f"{index}.log").open("w") as log:
            process = start_trainer(*arguments, output=log, TF_CONFIG=tf_config(self.ports, index), **environment)
        self.processes[index] = process
        return process

    def log(self, index: int) -> str:
        return (self.logs / f"{index}.log").read_text()

    def last_line(self, index: int) -> str:
        return self.log(index).strip().splitlines()[-1]

    def wait_for(self, index: int, words: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.log(index):
            assert time.monotonic() < deadline, f"worker {index} never said {words!r}:\n{self.log(index)}"
            assert self.processes[index].poll() is None, self.log(index)
            time.sleep(0.05)

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
