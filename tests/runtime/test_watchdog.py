"""The thread that ends a process whose peers hang: when it does, and when what takes long is no reason to."""

import subprocess
import sys

import pytest

PROGRAM = """
import time
from trainer.startup import load_tensorflow
load_tensorflow()
from trainer.runtime import workers
workers.LOOK_EVERY_SECONDS, workers.HURRIED_SECONDS, workers.FIRST_SECONDS = 0.05, {hurried}, {first}
steps = iter(range(10**6))
with workers.Watchdog({limit}, lambda: {signalled}) as dog:
    {doing}
print("alive")
"""


def watched(doing: str, *, limit: float = 30.0, first: float = 30.0, signalled: bool = False) -> tuple[int, str]:
    """Exit code and output of a process that does something under a watchdog that allows half a second after a signal."""
    program = PROGRAM.format(hurried=0.5, limit=limit, first=first, signalled=signalled, doing=doing)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("signalled", "limit", "first"), [(True, 30.0, 30.0), (False, 0.5, 0.5)], ids=["after a signal", "after the limit"]
)
def test_a_process_without_a_step_ends_with_75(signalled: bool, limit: float, first: float) -> None:
    code, text = watched("time.sleep(20)", signalled=signalled, limit=limit, first=first)
    assert code == 75
    assert "trainer: no step for 0 s after step 0: a peer hangs or is out of reach" in text


@pytest.mark.parametrize(
    "doing",
    [
        "time.sleep(0)",
        "dog.follow(lambda: next(steps)); time.sleep(1.5)",
        "exec('with dog.busy(): time.sleep(1.5)')",
        "dog.leave_time(); time.sleep(1.5)",
    ],
    ids=["nothing", "steps", "a save", "peers that save"],
)
def test_what_is_no_hanging_peer_is_left_alone(doing: str) -> None:
    assert watched(doing, signalled=True) == (0, "alive\n")


def test_the_first_step_may_take_longer_than_any_later_one() -> None:
    assert watched("time.sleep(1.5)", limit=0.5)[0] == 0
