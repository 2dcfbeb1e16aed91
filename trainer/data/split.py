"""One split of a prepared data set: access to its records, here or in a bucket, and the line that names a damaged one."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.data import pairs
from trainer.data.keep import Cache, InMemory, OnDisk, Store
from trainer.data.reading import RUN_BYTES, Needs, ReadAhead, Runs
from trainer.data.records import Manifest
from trainer.data.shards import Shards
from trainer.data.vet import vet
from trainer.errors import DataError, TrainerError
from trainer.storage.places import Place

LIST_SHARE = 4  # a list beside the training, such as an evaluation, may take this part of the room
Reader = Callable[[int, Sequence[int]], list[bytes]]


@dataclass(frozen=True)
class Means:
    """How a split is read.

    Attributes:
        cache: where records are kept after the first read.
        readers: requests to a bucket at the same time.
        room: bytes of records that are read from a bucket ahead of their use, where none are kept.
    """

    cache: Cache = "none"
    readers: int = 16
    room: int = 1 << 30


class Split:
    """One split of a prepared data set: access to its records by number, counted over all shards."""

    def __init__(self, folder: Place, manifest: Manifest, name: str, means: Means | None = None) -> None:
        self.name = name
        self.manifest = manifest
        self._means = means or Means()
        self._shards = Shards(folder, manifest.splits.get(name, []))
        self._vetted = bytearray(self.examples)
        self.damage: TrainerError | None = None
        self._store = self._make_store()

    def _make_store(self) -> Store | None:
        if self._means.cache == "none" or not self.examples:
            return None
        return InMemory() if self._means.cache == "memory" else OnDisk(self._shards)

    @property
    def examples(self) -> int:
        """Number of pairs."""
        return self._shards.examples

    @property
    def bytes_read(self) -> int:
        """Bytes that have come from disk or bucket so far."""
        return self._shards.bytes_read

    def describe(self, number: int) -> str:
        """`FOLDER/train-00000-of-00002.tfrecord, record 17`, both counted from 0."""
        return self._shards.describe(number)

    def read(self, number: int) -> bytes:
        """The bytes of one record.

        Raises:
            DataError: the shard is not there or the record is damaged; names both.
            TrainerError: the shard could not be read this time.
        """
        if self._store is not None and (kept := self._store.get(number)) is not None:
            return kept
        record = self._vet_once(number, self._shards.read(number))
        if self._store is not None:
            self._store.put(number, record)
        return record

    def _vet_once(self, number: int, record: bytes) -> bytes:
        """Look at what a record states the first time it is read; the checksum guards it from then on.

        Raises:
            DataError: it is not what the manifest says.
        """
        if not self._vetted[number]:
            try:
                vet(record, self.manifest)
            except ValueError as error:
                raise DataError(f"{self.describe(number)}: {error}; copy the shard again, or prepare the data again") from error
            self._vetted[number] = 1
        return record

    # -- many records in a known order

    def reader(self, needs: Callable[[int], NDArray[np.int64]], run: int, first: int) -> Reader:
        """What reads records that are needed list by list; from a bucket they are fetched before they are asked for.

        Args:
            needs: the record numbers of a list, in the order of need: int64, (records,).
            run: how many neighbours a bucket is asked for at once, where records are not kept.
            first: the number of the first list.

        Returns:
            (number of the list, some of its record numbers) -> their bytes. It raises what `read` raises.
        """
        return self._reader(needs, run, first, self._means.room)

    def _reader(self, needs: Callable[[int], NDArray[np.int64]], run: int, first: int, room: int) -> Reader:
        if self._shards.local:
            return lambda _, numbers: [self.read(number) for number in numbers]
        kept = None if self._store is None else Runs(np.arange(self.examples), self._shards, self.usual_run)

        def listed(at: int) -> Needs:
            numbers = needs(at)
            return Needs(numbers, kept or Runs(np.unique(numbers), self._shards, run))

        ahead = ReadAhead(self._shards, self._store, self._means.readers, room, listed, first)

        def read(at: int, numbers: Sequence[int]) -> list[bytes]:
            found = ahead.read(at, numbers)
            return [self._vet_once(number, record) for number, record in zip(numbers, found, strict=True)]

        return read

    def in_turn(self, numbers: Iterable[int]) -> Reader:
        """What reads list 0, these records, which are asked for in about this order."""
        listed = np.array(list(numbers), np.int64)
        return self._reader(lambda at: listed[: 0 if at else None], self.usual_run, 0, self._means.room // LIST_SHARE)

    @property
    def usual_run(self) -> int:
        """How many neighbours are as long as one good request."""
        return max(1, RUN_BYTES // self.mean_bytes)

    @property
    def mean_bytes(self) -> int:
        """Bytes of a record, on the average."""
        return max(1, int(self._shards.positions[-1]) // max(1, self.examples))

    @property
    def room(self) -> int:
        """Bytes of records that may be read ahead."""
        return self._means.room

    def noting(self, reader: Reader) -> Reader:
        """The same, but a failure is kept in `damage`, and the records are b"", which no decoder takes.

        TensorFlow would print an exception that passes through it, with its traceback, beside the one line we give. Nothing is
        read after the first failure: it ends the pipeline, and reads that are tried for minutes would keep it waiting.
        """

        def read(at: int, numbers: Sequence[int]) -> list[bytes]:
            try:
                if self.damage is None:
                    return reader(at, numbers)
            except TrainerError as error:
                self.damage = self.damage or error
            return [b""] * len(numbers)

        return read

    # -- what is in them

    def keys(self, numbers: Sequence[int] | None = None) -> list[str]:
        """The names of some pairs; of all in stored order by default."""
        asked = range(self.examples) if numbers is None else numbers
        reader = self.in_turn(asked)
        return [_key(reader(0, [number])[0]) for number in asked]

    def key(self, number: int) -> str:
        """The name of one pair."""
        return _key(self.read(number))

    def problem_of(self, number: int, reader: Reader) -> DataError | None:
        """Read and decode one record; None if it is sound, else the error that names it."""
        try:
            pairs.decode_record(tf.constant(reader(0, [number])[0]), self.manifest)
        except DataError as error:
            return error
        except tf.errors.OpError as error:
            return DataError(f"{self.describe(number)}: {plain(error)}; prepare the data again without this pair")
        return None

    def find_damage(self, numbers: Iterable[int]) -> DataError | None:
        """The first damaged record among some; None if all are sound.

        A failure inside the input pipeline does not say which record it met; the order is known, so a second look does.
        """
        again = list(numbers)
        reader = self.in_turn(again)
        return next((problem for number in again if (problem := self.problem_of(number, reader))), None)


def _key(record: bytes) -> str:
    return bytes(tf.train.Example.FromString(record).features.feature["key"].bytes_list.value[0]).decode()


def plain(error: tf.errors.OpError) -> str:
    """TensorFlow's message without the names of its internal nodes."""
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*?\]|name:\s*$", "", error.message)
    return " ".join(text.split()) or type(error).__name__
