"""Reading a bucket before it is asked: the coming record numbers are known, so runs of neighbours are fetched by many threads.

A `Needs` is the list of what one reader needs for a while (an epoch, or an evaluation), cut into runs. `ReadAhead` follows one
list after the other. Its threads take the next run whenever they are free: one that is being waited for, or else the one that
will be needed first, as long as the records that wait for their use have room. What is waited for is fetched in any case, so a
small room costs time and never stops the reader.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from trainer.data.keep import Store
from trainer.data.shards import Run, Shards
from trainer.errors import TrainerError

RUN_BYTES = 8 << 20  # a longer run is read no faster at 50 ms a request
IDLE_SECONDS = 5.0
REST_SECONDS = 5.0
_UNTOUCHED, _ON_ITS_WAY, _HERE = 0, 1, 2
log = logging.getLogger(__name__)
Numbers = NDArray[np.int64]
Job = Callable[[], None]


class Runs:
    """Records cut into runs, and which of them are untouched, on their way, or here."""

    def __init__(self, rows: Numbers, shards: Shards, longest: int) -> None:
        """Cut where numbers are missing, where a shard ends, and at every multiple of `longest`.

        Args:
            rows: record numbers, int64, rising.
            shards: where they are.
            longest: in records.
        """
        cut = (np.diff(rows) != 1) | (np.diff(shards.shard_of(rows)) != 0) | (np.diff(rows // longest) != 0)
        self._firsts = rows[np.concatenate([[True], cut])] if rows.size else rows
        self._ends = rows[np.concatenate([cut, [True]])] + 1 if rows.size else rows
        self._state = bytearray(self._firsts.size)
        self.failures: dict[int, TrainerError] = {}

    def __getitem__(self, index: int) -> Run:
        return Run(int(self._firsts[index]), int(self._ends[index]))

    def of(self, number: int) -> int:
        """Which run a record is in."""
        return int(self._firsts.searchsorted(number, side="right")) - 1

    def in_order(self, numbers: Numbers) -> Numbers:
        """The runs of these records, each once, in the order of its first record."""
        runs, first = np.unique(self._firsts.searchsorted(numbers, side="right") - 1, return_index=True)
        return np.asarray(runs[np.argsort(first)], np.int64)

    def begin(self, index: int) -> bool:
        """Mark a run as on its way; whether it was untouched."""
        if self._state[index] != _UNTOUCHED:
            return False
        self.failures.pop(index, None)
        self._state[index] = _ON_ITS_WAY
        return True

    def end(self, index: int, failure: TrainerError | None) -> None:
        """Mark a run as here, or as failed and to be tried again."""
        self._state[index] = _UNTOUCHED if failure else _HERE
        if failure:
            self.failures[index] = failure

    def untouched(self, index: int) -> bool:
        """Whether nobody has asked for a run."""
        return self._state[index] == _UNTOUCHED

    def here(self, index: int) -> bool:
        """Whether a run has been read."""
        return self._state[index] == _HERE


class Needs:
    """The records that are needed for a while, and the runs that bring them."""

    def __init__(self, numbers: Numbers, runs: Runs) -> None:
        """Count uses.

        Args:
            numbers: int64, in the order of need; a number may stand there more than once.
            runs: hold at least these records.
        """
        self.runs = runs
        self._numbers, self._uses = np.unique(numbers, return_counts=True)
        self._order, self._next = runs.in_order(numbers), 0

    def _place(self, number: int) -> int | None:
        place = int(self._numbers.searchsorted(number))
        return place if place < self._numbers.size and self._numbers[place] == number else None

    def needed(self, number: int) -> bool:
        """Whether a record is in the list, and not yet used as often as it stands there."""
        place = self._place(number)
        return place is not None and bool(self._uses[place])

    def use(self, number: int) -> bool:
        """Count one use; whether that was the last."""
        self._uses[self._place(number)] -= 1
        return not self.needed(number)

    def next_run(self) -> int | None:
        """The untouched run that is needed first."""
        while self._next < len(self._order) and not self.runs.untouched(int(self._order[self._next])):
            self._next += 1
        return int(self._order[self._next]) if self._next < len(self._order) else None


class ReadAhead:
    """Records of a split in a known order, from threads that fetch them before they are asked for."""

    def __init__(
        self, shards: Shards, store: Store | None, readers: int, room: int, needs: Callable[[int], Needs], first: int = 0
    ) -> None:
        """Nothing is read before the first record is asked for.

        Args:
            shards: what is read.
            store: what keeps the records; None: a record is given up after its last use in a list.
            readers: requests at the same time.
            room: bytes of records that may wait for their use; not counted where a store keeps them.
            needs: the list of each number, such as that of an epoch; one more than the one in use may be asked for.
            first: the number of the first list.
        """
        self._shards, self._store, self._readers, self._room, self._needs = shards, store, readers, room, needs
        lock = threading.Lock()
        self._lists = threading.Condition(lock)
        self._arrival, self._work = threading.Condition(lock), threading.Condition(lock)
        self._open: dict[int, Needs] = {}
        self._opening: set[int] = set()
        self._held: dict[tuple[int, int], bytes | TrainerError] = {}
        self._bytes = self._threads = self._idle = 0
        self._wanted: deque[Job] = deque()
        self._ahead_in = self._reached = first
        self._again_at = 0.0

    # -- the side of the reader

    def read(self, at: int, numbers: Iterable[int]) -> list[bytes]:
        """Some records of a list, all of them asked for at once.

        A record that the list does not name, or that was used as often as it says, is fetched by itself.

        Raises:
            DataError: a record is damaged, or its shard is not there.
            TrainerError: one could not be read this time.
        """
        asked = list(numbers)
        kept = [self._store.get(number) for number in asked] if self._store else [None] * len(asked)
        if None not in kept:
            return [record for record in kept if record is not None]
        needs = self._list(at)
        with self._work:
            for number, record in zip(asked, kept, strict=True):
                self._want(at, needs, number, record)
            self._stir()
        return [self._one(at, needs, number) if record is None else record for number, record in zip(asked, kept, strict=True)]

    def _one(self, at: int, needs: Needs, number: int) -> bytes:
        found = self._wait(at, needs, number)
        if found is None and self._store:
            found = self._store.get(number)
        if isinstance(found, TrainerError):
            raise found
        return self._shards.read(number) if found is None else found

    def _wait(self, at: int, needs: Needs, number: int) -> bytes | TrainerError | None:
        """Wait for the run of a record; None if it is not held here."""
        with self._arrival:
            if not needs.needed(number):
                return None
            runs, run = needs.runs, needs.runs.of(number)
            while not runs.here(run) and run not in runs.failures:
                self._arrival.wait()
            return runs.failures.get(run) or self._take(at, needs, number)

    def _take(self, at: int, needs: Needs, number: int) -> bytes | TrainerError | None:
        found = self._held.get((at, number))
        if isinstance(found, bytes) and needs.use(number):
            del self._held[at, number]
            self._bytes -= len(found)
            self._stir()
        return found

    def _want(self, at: int, needs: Needs, number: int, kept: bytes | None) -> None:
        """Put a record's run before all that is only read ahead. One that failed while nobody waited is tried again."""
        if kept is None and needs.needed(number):
            runs, run = needs.runs, needs.runs.of(number)
            if not self._is_kept(runs, run) and runs.begin(run):
                self._bytes += self._shards.size(runs[run])
                self._wanted.append(partial(self._fetch, at, needs, run))

    def _is_kept(self, runs: Runs, run: int) -> bool:
        """Whether an untouched run was stored by somebody else; it is here then."""
        if self._store is None or not self._store.has(runs[run]) or not runs.begin(run):
            return False
        runs.end(run, None)
        return True

    # -- the lists

    def _list(self, at: int) -> Needs:
        """The list of a number, made now if the threads have not made it yet; older ones than the last are dropped."""
        while (needs := self._open.get(at)) is None:
            self._make_list(at)
        if at > self._reached:
            with self._lists:
                self._reached = max(self._reached, at)
                self._ahead_in = max(self._ahead_in, at)
                for old in [number for number in self._open if number < self._reached - 1]:
                    self._drop(old)
        return needs

    def _drop(self, old: int) -> None:
        del self._open[old]
        for key in [key for key in self._held if key[0] == old]:
            found = self._held.pop(key)
            self._bytes -= len(found) if isinstance(found, bytes) else 0

    def _make_list(self, at: int) -> None:
        """Make a list, or wait until another thread has made it; the lock is not held meanwhile."""
        with self._lists:
            if at in self._open or at in self._opening:
                self._lists.wait_for(lambda: at not in self._opening)
                return
            self._opening.add(at)
        made = None
        try:
            made = self._needs(at)
        finally:
            with self._lists:
                self._opening.discard(at)
                if made is not None:
                    self._open[at] = made
                self._lists.notify_all()
                self._stir()

    # -- the side of the threads

    def _stir(self) -> None:
        """See that a thread looks for work, if there may be some; the lock is held."""
        missing = min(len(self._wanted) or 1, self._readers) - self._idle
        self._work.notify(max(1, len(self._wanted)))
        for _ in range(min(missing, self._readers - self._threads)):
            self._threads += 1
            threading.Thread(target=self._run, name="bucket-reader", daemon=True).start()

    def _run(self) -> None:
        """The life of a thread. An error that nobody foresaw ends it, with its traceback, and another takes its place."""
        broken = True
        try:
            while job := self._job():
                job()
            broken = False
        finally:
            if broken:
                with self._work:
                    self._threads -= 1
                    self._stir()

    def _job(self) -> Job | None:
        """The next thing to do; None after some seconds without any, and the thread ends."""
        with self._work:
            waited = True
            while not (job := self._wanted.popleft() if self._wanted else self._ahead()):
                if not waited:
                    self._threads -= 1
                    return None
                self._idle += 1
                waited = self._work.wait(IDLE_SECONDS)
                self._idle -= 1
            self._stir()
            return job

    def _ahead(self) -> Job | None:
        """What is needed next and nobody waits for yet; up to one list beyond the one in use."""
        if time.monotonic() < self._again_at:
            return None
        needs = self._open.get(self._ahead_in)
        while needs and (run := needs.next_run()) is not None:
            if self._is_kept(needs.runs, run):
                continue
            size = self._shards.size(needs.runs[run])
            if self._store is None and self._bytes + size > self._room:
                return None
            needs.runs.begin(run)
            self._bytes += size
            return partial(self._fetch, self._ahead_in, needs, run)
        if needs is None or self._ahead_in > self._reached:
            return None
        self._ahead_in += 1
        return partial(self._make_list, self._ahead_in)

    def _fetch(self, at: int, needs: Needs, index: int) -> None:
        """Read a run and hand it over; whatever happens, nobody is left waiting for it."""
        run = needs.runs[index]
        answers: list[bytes | TrainerError] = []
        failure: TrainerError | None = TrainerError(f"{self._shards.describe(run.first)}: the thread that reads it broke")
        try:
            answers, failure = self._kept_of(run, self._shards.read_run(run)), None
        except TrainerError as error:
            failure = error.with_traceback(None)  # it may be kept long
        finally:
            with self._arrival:
                self._rest(failure)
                self._deliver(at, needs, run, answers)
                needs.runs.end(index, failure)
                self._arrival.notify_all()

    def _rest(self, failure: TrainerError | None) -> None:
        """After a failure nothing is read ahead for a while; what is waited for is. The lock is held."""
        if failure and not self._again_at:
            log.warning("%s; it is tried again", failure)
        self._again_at = time.monotonic() + REST_SECONDS if failure else 0.0

    def _kept_of(self, run: Run, answers: list[bytes | TrainerError]) -> list[bytes | TrainerError]:
        """Give the store what it should keep."""
        for number, answer in enumerate(answers, run.first):
            if self._store is not None and isinstance(answer, bytes):
                self._store.put(number, answer)
        return answers

    def _deliver(self, at: int, needs: Needs, run: Run, answers: list[bytes | TrainerError]) -> None:
        self._bytes -= self._shards.size(run)
        if self._open.get(at) is not needs:
            return
        for number, answer in enumerate(answers, run.first):
            if isinstance(answer, TrainerError) or (self._store is None and needs.needed(number)):
                self._held[at, number] = answer
                self._bytes += len(answer) if isinstance(answer, bytes) else 0
