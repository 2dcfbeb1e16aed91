"""The image as real containers of a real daemon, without network, privileges or a root file system to write to.

DOCKER names the command (default `docker`), TRAINER_IMAGE_UNDER_TEST the image (default trainer:cpu).
"""

import json
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.helpers.missing import missing
from tests.helpers.settings import SMALL
from tests.helpers.waiting import wait_until

DOCKER = os.environ.get("DOCKER", "docker")
IMAGE = os.environ.get("TRAINER_IMAGE_UNDER_TEST", "trainer:cpu")
PYTHON = "/opt/trainer/bin/python3"
LOCKED = ("--network=none", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges")
GRACE_SECONDS = 10  # what docker stop leaves unless it is told otherwise
FIELDS = {"severity", "time", "step", "worker", "message"}
QUICK = tuple(f"--set={setting}" for setting in (*SMALL, "train.steps=30", "train.evaluate_every=0"))
LONG = tuple(
    f"--set={setting}"
    for setting in (
        *SMALL, "train.batch_size=2", "train.steps=300", "train.checkpoint_every=35", "train.summary_every=20",
        "train.sample_every=100", "train.evaluate_every=50", "train.keep=2",
        "optimizer.schedule=constant",  # the number of steps may change, and no step with it
    )
)  # fmt: skip
ENDLESS = (*LONG, "--set=train.steps=100000")  # what is to be stopped is not done first, however fast the machine


def _call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([DOCKER, *arguments], capture_output=True, text=True, timeout=240, check=False)


@cache
def _problem() -> str:
    """What keeps the tests from running the image, in one line; nothing if all is there."""
    try:
        done = _call("image", "inspect", IMAGE)
    except OSError as error:
        return f"{DOCKER}: {error.strerror}: tests of containers need Docker; DOCKER names another command"
    said = " ".join(done.stderr.split())
    return f"{DOCKER} image inspect {IMAGE}: {said}: build it with .ci/containers" if done.returncode else ""


def docker(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """One command of Docker's, which succeeds unless it is not to be checked."""
    if problem := _problem():
        missing(problem)
    done = _call(*arguments)
    assert not check or done.returncode == 0, done.stderr
    return done


class Containers:
    """Containers and volumes that are removed in the end."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.volumes: list[str] = []

    def volume(self) -> str:
        """A new volume."""
        self.volumes.append(f"trainer-test-{uuid.uuid4().hex}")
        docker("volume", "create", self.volumes[-1])
        return self.volumes[-1]

    def start(self, *arguments: str, options: tuple[str, ...] = ()) -> str:
        """The name of a container that was started."""
        self.names.append(f"trainer-test-{uuid.uuid4().hex}")
        docker("run", "--detach", "--name", self.names[-1], *LOCKED, *options, IMAGE, *arguments)
        return self.names[-1]

    def run(self, *arguments: str, options: tuple[str, ...] = ()) -> tuple[str, subprocess.CompletedProcess[str]]:
        """The name and, with the exit code, what the logs hold, once the container has ended."""
        name = self.start(*arguments, options=options)
        docker("wait", name)
        return name, ended(name)

    def remove(self) -> None:
        """Remove all of them."""
        if _problem():
            return
        for name in self.names:
            docker("rm", "--force", "--volumes", name, check=False)
        for name in self.volumes:
            docker("volume", "rm", name)


def ended(name: str) -> subprocess.CompletedProcess[str]:
    """How a container ended, and what it wrote."""
    status, code = docker("inspect", "--format={{.State.Status}} {{.State.ExitCode}}", name).stdout.split()
    assert status == "exited"
    logs = docker("logs", name)
    return subprocess.CompletedProcess(logs.args, int(code), logs.stdout, logs.stderr)


def logs_of(name: str) -> str:
    """All that a container has written so far."""
    logs = docker("logs", name)
    return logs.stdout + logs.stderr


def wait_while_it_runs(name: str, true: Callable[[], object], what: str) -> None:
    """Until `true()` is; the container must run meanwhile."""

    def look() -> object:
        if found := true():
            return found
        assert docker("inspect", "--format={{.State.Running}}", name).stdout.strip() == "true", logs_of(name)
        return False

    wait_until(look, what=what)


def wait_for(name: str, words: str) -> None:
    """Until the logs hold these words."""
    wait_while_it_runs(name, lambda: words in logs_of(name), f"{words!r} in the logs")


def wait_until_tensorflow_loads(name: str) -> None:
    """Until the library is mapped into process 1."""
    loads = lambda: "tensorflow" in docker("exec", name, "cat", "/proc/1/maps", check=False).stdout  # noqa: E731
    wait_while_it_runs(name, loads, "TensorFlow in the memory of process 1")


def wait_for_a_handler(name: str) -> None:
    """Process 1 has no default action for a signal: one that comes before there is a handler is lost."""
    status = Path("/proc") / docker("inspect", "--format={{.State.Pid}}", name).stdout.strip() / "status"

    def catches() -> bool:
        found = re.search(r"^SigCgt:\s*(\w+)$", status.read_text(), re.MULTILINE)
        assert found
        return bool(int(found[1], 16) & 1 << (signal.SIGTERM - 1))

    wait_until(catches, what="a handler for SIGTERM")


def stop(name: str) -> float:
    """Seconds that `docker stop` took, with its own grace."""
    began = time.monotonic()
    docker("stop", name)
    return time.monotonic() - began


def copy_run(name: str, to: Path) -> Path:
    """Copy the run of a container's sample out of it."""
    docker("cp", f"{name}:/runs/sample", str(to))
    return to


def objects(done: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    """The lines for machines; all lines must be some."""
    lines = [json.loads(line) for line in (done.stdout + done.stderr).splitlines()]
    assert lines
    assert all(set(line) == FIELDS for line in lines)
    return lines
