"""What the workers of one run agree on: whatever changes the course of a run is decided over all of them first."""

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.cluster import Cluster
from trainer.errors import ExitCode, PeerLostError

log = logging.getLogger(__name__)

LOOK_EVERY_SECONDS = 1.0
FIRST_SECONDS = 300.0  # variables are made, both networks compiled
HURRIED_SECONDS = 60.0  # after a signal
# What TensorFlow raises when a peer is dead or hangs; alone, none of these comes from a healthy step.
PEER_ERRORS = (tf.errors.UnavailableError, tf.errors.DeadlineExceededError, tf.errors.AbortedError, tf.errors.CancelledError)
_REASONS = ("Connection reset by peer", "Socket closed", "Connection refused", "heartbeat timeout", "Broken pipe")
_PEER_WORDS = ("Connection reset by peer", "Socket closed", "coordination service", "Collective ops is aborted", "CollectiveOps")

Vector = NDArray[np.float64]


class Workers(Protocol):
    """The workers of a run, seen from one of them; every method is called by all of them, in the same order."""

    size: int
    index: int

    def add_up(self, values: Vector) -> Vector:
        """The sum of each element over the workers."""

    def any(self, here: bool) -> bool:
        """Whether it is so on any worker."""

    def of_chief(self, number: int) -> int:
        """The chief's number, on all."""

    def leave(self) -> None:
        """Wait until all have done their part; the last thing that a worker does."""


class Alone:
    """A process that trains by itself, on however many devices."""

    size, index = 1, 0

    def add_up(self, values: Vector) -> Vector:
        """What is here is all."""
        return values

    def any(self, here: bool) -> bool:
        """What is here is all."""
        return here

    def of_chief(self, number: int) -> int:
        """This is the chief."""
        return number

    def leave(self) -> None:
        """Nobody to wait for."""


class Together:
    """Workers that reduce over the strategy's own collectives."""

    def __init__(self, strategy: tf.distribute.Strategy, cluster: Cluster) -> None:
        self.size, self.index = cluster.size, cluster.index
        self._strategy = strategy
        self._local = strategy.num_replicas_in_sync // cluster.size
        self._total = tf.function(self._reduce, input_signature=[tf.TensorSpec([None], tf.float64)], autograph=False)

    def _reduce(self, values: tf.Tensor) -> tf.Tensor:
        def once() -> tf.Tensor:
            """One replica of each worker brings the worker's values; the others bring zeros."""
            context = tf.distribute.get_replica_context()
            brings = tf.equal(context.replica_id_in_sync_group % self._local, 0)
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.where(brings, values, tf.zeros_like(values)))

        return self._strategy.experimental_local_results(self._strategy.run(once))[0]

    def add_up(self, values: Vector) -> Vector:
        """The sum of each element over the workers."""
        return np.asarray(self._total(tf.constant(values, tf.float64)).numpy(), np.float64)

    def any(self, here: bool) -> bool:
        """Whether it is so on any worker."""
        return bool(self.add_up(np.array([float(here)]))[0])

    def of_chief(self, number: int) -> int:
        """The chief's number, on all."""
        return int(self.add_up(np.array([float(number) if self.index == 0 else 0.0]))[0])

    def leave(self) -> None:
        """Learn that all have done their part; then wait once more, so that none finds another gone while it learns it.

        A worker that fails in its part never comes here, and the first sum fails for all the others.
        """
        self.any(False)
        try:
            self.any(False)
        except tf.errors.OpError as error:
            log.info("a peer left a moment earlier (%s); all is done here", type(error).__name__)


def meet(strategy: tf.distribute.Strategy, cluster: Cluster) -> Workers:
    """The workers of this run."""
    return Together(strategy, cluster) if cluster.size > 1 else Alone()


@contextmanager
def naming_lost_peers(cluster: Cluster) -> Iterator[None]:
    """Turn what TensorFlow raises when a peer is gone into one line and the code that says: run all again.

    Raises:
        PeerLostError: a collective failed because of a peer.
    """
    try:
        yield
    except tf.errors.OpError as error:
        known = isinstance(error, PEER_ERRORS) or any(words in error.message for words in _PEER_WORDS)
        if cluster.size == 1 or not known:
            raise
        raise PeerLostError(
            f"worker {cluster.index}: {_lost(cluster, error)}; run all workers again: they go on from the newest checkpoint"
        ) from error


def _lost(cluster: Cluster, error: tf.errors.OpError) -> str:
    """Which peer was lost, as far as TensorFlow says, and why."""
    named = re.search(r"/job:worker/replica:\d+/task:(\d+)", error.message)
    number = int(named[1]) if named else cluster.index
    known = number != cluster.index and number < cluster.size
    who = f"worker {number} ({cluster.workers[number]}) was lost" if known else "a peer was lost"
    reasons = [words for words in _REASONS if words in error.message]
    return f"{who} ({reasons[0] if reasons else type(error).__name__})"


class Watchdog:
    """A thread that ends the process when nothing has moved for too long: TensorFlow does not notice every hanging peer."""

    def __init__(self, seconds: float, hurried: Callable[[], bool]) -> None:
        """Allow so many seconds without progress, and fewer where `hurried` says that a signal has come.

        Before the first step there is more to do than in any later one, so less than FIRST_SECONDS is not enough for it.
        """
        self._seconds, self._hurried = seconds, hurried
        self._progress: Callable[[], int] | None = None
        self._over = threading.Event()
        self._moved = time.monotonic()
        self._stepped = self._busy = False

    def follow(self, progress: Callable[[], int]) -> None:
        """Watch a number that grows with every step."""
        self._progress = progress
        self.beat()

    def beat(self) -> None:
        """Something was done that is no step."""
        self._moved = time.monotonic()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Do what may take long and needs no peer, such as a save to a slow bucket after a signal."""
        self._busy = True
        try:
            yield
        finally:
            self.beat()
            self._busy = False

    def leave_time(self) -> None:
        """A signal is no reason to hurry any more: the chief saves, and the others wait for it."""
        self._hurried = lambda: False
        self.beat()

    def __enter__(self) -> "Watchdog":
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        seen: int | None = None
        while not self._over.wait(LOOK_EVERY_SECONDS):
            now = self._progress() if self._progress else None
            if now != seen:
                self._stepped = seen is not None
                seen = now
                self.beat()
            limit = self._seconds if self._stepped else max(self._seconds, FIRST_SECONDS)
            if self._hurried():
                limit = min(limit, HURRIED_SECONDS)
            if not self._busy and time.monotonic() - self._moved > limit:
                self._end(limit, seen or 0)

    def _end(self, limit: float, step: int) -> None:
        print(
            f"trainer: no step for {limit:.0f} s after step {step}: a peer hangs or is out of reach; run all workers "
            "again: they go on from the newest checkpoint (runtime.peer_timeout_seconds sets how long to wait)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(ExitCode.AGAIN)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
