"""Work spread over processes, with results in the order of the items and a bounded number of them in memory."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import Connection
from typing import TypeVar

from trainer.cores import usable_cores
from trainer.errors import TrainerError
from trainer.startup import load_tensorflow
from trainer.storage.service import Patience

CHUNK = 32
LEAVE_SECONDS = 5.0
CHUNKS_AHEAD = 3

Item = TypeVar("Item")
Result = TypeVar("Result")


def _leave_with_the_parent(leash: Connection) -> None:
    """A parent that was killed cannot end its workers, and one that gives up lets go of them: they end themselves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel, leash])
        os._exit(1)


def _start(leash: Connection, patience: float) -> None:
    """Ctrl-C is the parent's to handle; each process decodes one picture at a time, and has its own way to the bucket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Patience.seconds = patience
    threading.Thread(target=_leave_with_the_parent, args=(leash,), daemon=True).start()
    load_tensorflow()
    from trainer.data.convert import limit_threads

    limit_threads()


class Workers:
    """A pool of processes; leave its context and they are gone. One process is this one."""

    def __init__(self, processes: int) -> None:
        self._processes = processes or usable_cores()
        self._pool: ProcessPoolExecutor | None = None
        self._leash, self._held = multiprocessing.Pipe(duplex=False)

    def _started(self) -> ProcessPoolExecutor:
        """The processes, started at the first work that is worth them: each loads TensorFlow."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a forked one would inherit a client that threads are using
            given = (self._leash, Patience.seconds)
            self._pool = ProcessPoolExecutor(self._processes, mp_context=context, initializer=_start, initargs=given)
        return self._pool

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind:
            self._held.close()  # what they are doing is not wanted, and waiting for a bucket that is away may take minutes
        if self._pool:
            self._shut_down(self._pool, LEAVE_SECONDS if kind else None)
        self._held.close()
        self._leash.close()

    @staticmethod
    def _shut_down(pool: ProcessPoolExecutor, seconds: float | None) -> None:
        """Wait for the end of the pool, so long at most: a process that left in the middle of a result keeps it waiting."""
        closing = threading.Thread(target=pool.shutdown, kwargs={"wait": True, "cancel_futures": True}, daemon=True)
        closing.start()
        closing.join(seconds)

    def map(self, function: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]) -> Iterator[Result]:
        """Apply a function of a few items to all items; results come in order.

        Raises:
            TrainerError: a process died.
        """
        chunks = (items[start : start + CHUNK] for start in range(0, len(items), CHUNK))
        if self._processes == 1 or len(items) <= CHUNK:
            for chunk in chunks:
                yield from function(chunk)
            return
        yield from self._spread(self._started(), function, chunks)

    def _spread(
        self, pool: ProcessPoolExecutor, function: Callable[[Sequence[Item]], list[Result]], chunks: Iterator[Sequence[Item]]
    ) -> Iterator[Result]:
        submitted = (pool.submit(function, chunk) for chunk in chunks)
        waiting: deque[Future[list[Result]]] = deque(islice(submitted, CHUNKS_AHEAD * self._processes))
        try:
            while waiting:
                results = waiting.popleft().result()
                waiting.extend(islice(submitted, 1))
                yield from results
        except BrokenProcessPool as error:
            raise TrainerError("a process that read pictures died; was there too little memory? try --processes=1") from error
