"""One split of a prepared data set: random access to its records, and the line that names a damaged one."""

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tensorflow as tf

from trainer.data import pairs, records
from trainer.data.records import Manifest
from trainer.data.vet import vet
from trainer.errors import DataError, TrainerError


class Split:
    """One split of a prepared data set: random access to its records by number, counted over all shards."""

    def __init__(self, folder: Path, manifest: Manifest, name: str, *, cache: bool = False) -> None:
        self.name = name
        self.manifest = manifest
        self._folder = folder
        self._shards = manifest.splits.get(name, [])
        self._starts = np.cumsum([0] + [shard.examples for shard in self._shards])
        self._vetted: set[int] = set()
        self.damage: DataError | None = None
        self._cache: dict[int, bytes] | None = {} if cache else None

    @property
    def examples(self) -> int:
        """Number of pairs."""
        return int(self._starts[-1])

    def _locate(self, number: int) -> tuple[records.Shard, int]:
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._shards[shard], number - int(self._starts[shard])

    def describe(self, number: int) -> str:
        """`FOLDER/train-00000-of-00002.tfrecord, record 17`, both counted from 0."""
        shard, index = self._locate(number)
        return f"{self._folder / shard.file}, record {index}"

    def read(self, number: int) -> bytes:
        """The bytes of one record.

        Raises:
            DataError: the shard is not there or the record is damaged; names both.
            TrainerError: the shard could not be read this time.
        """
        if self._cache is not None and number in self._cache:
            return self._cache[number]
        try:
            record = self._read_from_shard(*self._locate(number))
            self._vet_once(number, record)
        except ValueError as error:
            raise DataError(f"{self.describe(number)}: {error}; copy the shard again, or prepare the data again") from error
        except OSError as error:
            kind = DataError if error.errno in (errno.ENOENT, errno.EACCES) else TrainerError  # others may pass by themselves
            raise kind(f"{self.describe(number)}: cannot be read: {error.strerror}") from error
        if self._cache is not None:
            self._cache[number] = record
        return record

    def _vet_once(self, number: int, record: bytes) -> None:
        """Look at what a record states the first time it is read; the checksum guards it from then on."""
        if number not in self._vetted:
            vet(record, self.manifest)
            self._vetted.add(number)

    def read_or_note(self, number: int) -> bytes:
        """The bytes of one record; of a damaged one b"", which no decoder takes, and the reason is kept in `damage`.

        TensorFlow would print an exception that passes through it, with its traceback, beside the one line we give.
        """
        try:
            return self.read(number)
        except DataError as error:
            self.damage = error
            return b""

    def _read_from_shard(self, shard: records.Shard, index: int) -> bytes:
        ends = shard.offsets[index + 1 : index + 2] or [shard.bytes]
        descriptor = os.open(self._folder / shard.file, os.O_RDONLY)
        try:
            return records.read_framed(descriptor, shard.offsets[index], ends[0])
        finally:
            os.close(descriptor)

    def key(self, number: int) -> str:
        """The name of one pair."""
        return bytes(tf.train.Example.FromString(self.read(number)).features.feature["key"].bytes_list.value[0]).decode()

    def problem_of(self, number: int) -> DataError | None:
        """Read and decode one record; None if it is sound, else the error that names it."""
        try:
            pairs.decode_record(tf.constant(self.read(number)), self.manifest)
        except DataError as error:
            return error
        except tf.errors.OpError as error:
            return DataError(f"{self.describe(number)}: {plain(error)}; prepare the data again without this pair")
        return None

    def find_damage(self, numbers: Iterable[int]) -> DataError | None:
        """The first damaged record among some; None if all are sound.

        A failure inside the input pipeline does not say which record it met; the order is known, so a second look does.
        """
        return next((problem for number in numbers if (problem := self.problem_of(number))), None)


def plain(error: tf.errors.OpError) -> str:
    """TensorFlow's message without the names of its internal nodes."""
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*?\]|name:\s*$", "", error.message)
    return " ".join(text.split()) or type(error).__name__
