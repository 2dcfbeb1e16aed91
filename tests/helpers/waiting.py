"""The one way to wait for something that happens elsewhere."""

import subprocess
import time
from collections.abc import Callable

PAUSE = 0.02


def wait_until(
    true: Callable[[], object], process: subprocess.Popen[str] | None = None, seconds: float = 120, what: str = "it"
) -> None:
    """Return when `true()` is; fail when the process has ended before, or after so many seconds.

    Args:
        true: asked again and again.
        process: must live on meanwhile; what it printed is in the failure.
        seconds: a bound for a machine that hangs, never for one that is slow.
        what: is waited for, for the message.
    """
    deadline = time.monotonic() + seconds
    while not true():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"{what} never came: the process ended with {process.returncode}: {process.communicate()}")
        assert time.monotonic() < deadline, f"{what} did not come in {seconds} s"
        time.sleep(PAUSE)
