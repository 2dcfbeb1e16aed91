"""The thread that ends a process whose peers hang: when it does, and when what takes long is no reason to."""

import pytest

from tests.helpers.processes import finish, start_program

PROGRAM = """
import time
from trainer.runtime import workers
workers.LOOK_EVERY_SECONDS, workers.HURRIED_SECONDS, workers.FIRST_SECONDS = 0.02, {hurried}, {first}
steps = iter(range(10**6))
with workers.Watchdog({limit}, lambda: {signalled}) as dog:
    {doing}
print("alive")
"""
SHORT, LONG = 0.2, 60.0
PAUSE = "time.sleep(0.7)"


def watched(
    doing: str, *, limit: float = LONG, first: float = LONG, hurried: float = LONG, signalled: bool = False
) -> tuple[int, str]:
    """Exit code and output of a process that does something under a watchdog with these limits."""
    program = PROGRAM.format(hurried=hurried, limit=limit, first=first, signalled=signalled, doing=doing)
    done = finish(start_program(program), 60)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("limits", "signalled", "doing", "step"),
    [
        ({"hurried": SHORT}, True, "", 0),
        ({"limit": SHORT, "first": SHORT}, False, "", 0),
        ({"limit": SHORT, "first": SHORT}, False, "dog.follow(lambda: 7);", 7),
        ({"limit": SHORT}, False, "dog.follow(lambda: min(5, next(steps)));", 5),
        ({"limit": SHORT, "first": SHORT}, False, "dog.leave_time();", 0),
        ({"hurried": SHORT}, True, "exec('with dog.busy(): pass');", 0),
    ],
    ids=["a signal", "no first step", "one step", "no later step", "a stop that takes too long", "after a save"],
)
def test_a_process_without_a_step_ends_with_75(limits: dict[str, float], signalled: bool, doing: str, step: int) -> None:
    code, text = watched(f"{doing} time.sleep(10)", signalled=signalled, **limits)
    assert code == 75
    line = f"trainer: no step for 0 s after step {step}: a peer hangs or is out of reach; run all workers again: they go on"
    assert text.startswith(line)
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("limits", "signalled", "doing"),
    [
        ({"hurried": SHORT}, True, f"dog.follow(lambda: next(steps)); {PAUSE}"),
        ({"hurried": SHORT}, True, f"exec('with dog.busy(): {PAUSE}')"),
        ({"hurried": SHORT}, True, f"dog.leave_time(); {PAUSE}"),
        ({"hurried": SHORT}, False, PAUSE),
        ({"limit": SHORT}, False, PAUSE),
        ({"limit": SHORT}, False, f"dog.follow(lambda: 7); {PAUSE}"),
        ({"limit": 2.0, "first": 2.0}, False, "exec('for _ in range(130): dog.beat(); time.sleep(0.02)')"),
    ],
    ids=["steps", "a save", "peers that save", "no signal", "before the first step", "restored", "evaluations"],
)
def test_what_is_no_hanging_peer_is_left_alone(limits: dict[str, float], signalled: bool, doing: str) -> None:
    assert watched(doing, signalled=signalled, **limits) == (0, "alive\n")
