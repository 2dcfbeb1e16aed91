"""Signals heard at once, also while the main thread is inside TensorFlow and Python's handlers have to wait.

The interpreter writes each signal's number to a pipe as soon as it comes; a thread waits at the other end.
"""

import signal
import socket
import threading
from collections.abc import Callable
from types import TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Ears:
    """A context in which a function is called, in a thread of its own, for every SIGINT and SIGTERM that has a handler."""

    def __init__(self, heard: Callable[[signal.Signals], None]) -> None:
        self._heard = heard

    def __enter__(self) -> "Ears":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def _listen(self) -> None:
        while numbers := self._reader.recv(16):
            for number in numbers:
                if number in SIGNALS:
                    self._heard(signal.Signals(number))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._old_descriptor)
        self._writer.close()
        self._thread.join()
        self._reader.close()
