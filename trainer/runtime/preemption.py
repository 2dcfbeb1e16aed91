"""Ctrl-C and SIGTERM, seen within milliseconds even while TensorFlow runs a block of steps.

A Python signal handler runs only when the TensorFlow call returns. So a thread (`Ears`) sets a variable that the graph reads
before every step.
"""

import logging
import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType

import tensorflow as tf

from trainer.errors import ExitCode
from trainer.runtime.hearing import SIGNALS, Ears

log = logging.getLogger(__name__)
REPEAT_SECONDS = 1.0  # the same wish, sent to the process and to its group


def hold_signals() -> None:
    """Keep signals back until a StopSignal hears them: building a strategy puts in a handler of SIGTERM that drops it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _leave_it_to_the_thread(signum: int, frame: FrameType | None) -> None:
    """The handler that must be there for the interpreter to write to the pipe."""


class StopSignal:
    """A context in which signals ask for a stop instead of ending the process; a later Ctrl-C ends it at once."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        """Args: then: called once, in the thread that hears the first signal."""
        self._then = then
        with tf.device("/cpu:0"):
            self.flag = tf.Variable(False, trainable=False)
        self.received: str | None = None
        self._since = 0.0
        self._ears = Ears(lambda number: self._note(number.name))

    def __enter__(self) -> "StopSignal":
        self._ears.__enter__()
        self._old_handlers = {number: signal.signal(number, _leave_it_to_the_thread) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def _note(self, name: str) -> None:
        if self.received:
            self._again(name)
            return
        self.received, self._since = name, time.monotonic()
        self.flag.assign(True)
        log.info("%s: stopping after this step and saving (Ctrl-C once more: leave at once)", name)
        self._then()

    def _again(self, name: str) -> None:
        """A person who presses Ctrl-C twice wants to leave; a supervisor that repeats itself does not."""
        if name == "SIGINT" and time.monotonic() - self._since > REPEAT_SECONDS:
            log.error("SIGINT again: leaving at once, without saving")
            os._exit(ExitCode.STOPPED)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._ears.__exit__(kind, error, trace)
