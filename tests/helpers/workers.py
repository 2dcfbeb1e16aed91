"""Several workers as real processes on loopback."""

import json
import subprocess
import time
from pathlib import Path

from tests.helpers.ports import LOOPBACK, hold
from tests.helpers.processes import start_program, start_trainer
from tests.helpers.waiting import wait_until

LISTENS, TALKS = "0A", "01"  # states of a socket in /proc/net/tcp
# TensorFlow's own is 10 s, and only by it does the chief learn of a death between two steps.
NOTICED_SOON = """
from tensorflow.compiler.xla.tsl.protobuf.coordination_config_pb2 import CoordinatedJob
from tensorflow.python.eager import context
context.context().configure_coordination_service(
    "standalone", "/job:worker/replica:0/task:0", heartbeat_timeout_in_ms=3000,
    coordinated_jobs=[CoordinatedJob(name="worker", num_tasks=2)]
)
"""
AND_TRAIN = "\nfrom trainer.__main__ import main\nmain()\n"


def sockets_at(port: int, state: str) -> int:
    """How many sockets of this machine have a local port and are in a state, LISTENS or TALKS."""
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()[1:]]
    return sum(row[3] == state and int(row[1].rpartition(":")[2], 16) == port for row in rows)


def tf_config(ports: list[int], index: int) -> str:
    """TF_CONFIG of one of several workers."""
    cluster = {"worker": [f"{LOOPBACK}:{port}" for port in ports]}
    return json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})


class Workers:
    """`trainer ARGUMENTS` on each of several workers; their lines go to files, which a test can watch."""

    def __init__(self, logs: Path, *arguments: str, count: int = 2, only: tuple[int, ...] | None = None, first: str = "") -> None:
        self._holds = [hold() for _ in range(count)]
        self.ports = [one.getsockname()[1] for one in self._holds]
        self.logs = logs
        self.processes: dict[int, subprocess.Popen[str]] = {}
        for index in range(count) if only is None else only:
            self.start(index, *arguments, first=first)

    def start(self, index: int, *arguments: str, first: str = "", **environment: str) -> subprocess.Popen[str]:
        """Start one of them, which does what the program `first` says before it is the trainer."""
        self.logs.mkdir(parents=True, exist_ok=True)
        environment["TF_CONFIG"] = tf_config(self.ports, index)
        with (self.logs / f"{index}.log").open("w") as log:
            if first:
                process = start_program(first + AND_TRAIN, *arguments, output=log, **environment)
            else:
                process = start_trainer(*arguments, output=log, **environment)
        self.processes[index] = process
        return process

    def log(self, index: int) -> str:
        """What a worker has printed so far."""
        return (self.logs / f"{index}.log").read_text()

    def last_line(self, index: int) -> str:
        """What it printed last."""
        return self.log(index).strip().splitlines()[-1]

    def wait_for(self, index: int, words: str, seconds: float = 120) -> None:
        """Wait until a worker has printed some words; none of them may end before."""

        def printed() -> bool:
            if words in self.log(index):
                return True
            for number, process in self.processes.items():
                assert process.poll() is None, f"before {words!r}: worker {number} ended: {self.log(number)}"
            return False

        wait_until(printed, seconds=seconds, what=f"{words!r} of worker {index}")

    def codes(self, seconds: float = 240) -> dict[int, int]:
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
