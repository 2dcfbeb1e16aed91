"""The shards of one split as a single row of records: where each lies, and how a run of neighbours is read.

The records of a shard touch each other, so neighbours come in one read: from a bucket one request, however many they are.
"""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data import records
from trainer.data.records import Shard
from trainer.errors import TrainerError
from trainer.storage.places import Place

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """Neighbouring records of one shard, by their numbers in the split: from `first` up to `end`."""

    first: int
    end: int


class Shards:
    """The records of a split, numbered over all its shards from 0."""

    def __init__(self, folder: Place, shards: Sequence[Shard]) -> None:
        self._folder, self._shards = folder, shards
        self.starts = np.cumsum([0] + [shard.examples for shard in shards])
        self.positions = _positions(shards)
        self.local = isinstance(folder, Path)
        self.bytes_read = 0
        self._counting = threading.Lock()

    @property
    def examples(self) -> int:
        """Number of records."""
        return int(self.starts[-1])

    def size(self, run: Run) -> int:
        """Bytes of a run in its shard."""
        return int(self.positions[run.end] - self.positions[run.first])

    def shard_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which shard each record is in: int64, of the same shape."""
        return np.asarray(np.searchsorted(self.starts, numbers, side="right") - 1, np.int64)

    def _locate(self, number: int) -> tuple[Shard, int]:
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self._shards[shard], number - int(self.starts[shard])

    def describe(self, number: int) -> str:
        """`FOLDER/train-00000-of-00002.tfrecord, record 17`, both counted from 0."""
        shard, index = self._locate(number)
        return f"{self._folder / shard.file}, record {index}"

    def count(self, size: int) -> None:
        """Add to the bytes that were read."""
        with self._counting:
            self.bytes_read += size

    def _framed(self, run: Run) -> bytes:
        shard, index = self._locate(run.first)
        start = shard.offsets[index]
        content = records.read_part(self._folder / shard.file, start, start + self.size(run))
        self.count(len(content))
        return content

    def read(self, number: int) -> bytes:
        """One record, its checksum compared; one that arrives damaged from a bucket is fetched once more.

        Raises:
            DataError: the shard is not there or the record is damaged; names both.
            TrainerError: it could not be read this time: the bucket is away, or the disk fails.
        """
        run = Run(number, number + 1)
        try:
            try:
                return records.unframe(self._framed(run), self.size(run))
            except ValueError:
                if self.local:
                    raise
                return self._again(run)
        except (ValueError, OSError) as error:
            raise records.unreadable(self.describe(number), error) from error

    def _again(self, run: Run) -> bytes:
        record = records.unframe(self._framed(run), self.size(run))
        log.info("%s: arrived damaged, and sound when it was fetched again", self.describe(run.first))
        return record

    def read_run(self, run: Run) -> list[bytes | TrainerError]:
        """The records of a run; in the place of a damaged one, the error that names it.

        Raises:
            DataError: the shard is not there.
            TrainerError: it could not be read this time.
        """
        try:
            content = self._framed(run)
        except OSError as error:
            raise records.unreadable(self.describe(run.first), error) from error
        return [self._sound(number, content, number - run.first, run) for number in range(run.first, run.end)]

    def _sound(self, number: int, content: bytes, index: int, run: Run) -> bytes | TrainerError:
        start, end = (int(self.positions[at] - self.positions[run.first]) for at in (number, number + 1))
        try:
            return records.unframe(content[start:end], end - start)
        except ValueError:
            return self._read_alone(number)

    def _read_alone(self, number: int) -> bytes | TrainerError:
        """What the second look at a record gives, which is the last one."""
        run = Run(number, number + 1)
        try:
            return self._again(run)
        except (ValueError, OSError) as error:
            return records.unreadable(self.describe(number), error)


def _positions(shards: Sequence[Shard]) -> NDArray[np.int64]:
    """Where each record begins if all shards lay one behind the other, and where the last one ends: int64, (records + 1,)."""
    bases = np.cumsum([0] + [shard.bytes for shard in shards])
    parts = [np.array(shard.offsets, np.int64) + base for shard, base in zip(shards, bases, strict=False)]
    return np.concatenate([*parts, bases[-1:]])
