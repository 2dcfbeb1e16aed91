"""Pairs -> global batches: a function of (seed, step) alone, read from the shards at the manifest's byte offsets."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.config import Config
from trainer.data import order, pairs, records
from trainer.data.records import ImageSpec, Manifest
from trainer.errors import DataError

READS_AT_ONCE = 4
BATCHES_AHEAD = 4


@dataclass(frozen=True)
class Specs:
    """The two sides of the pairs after `data.direction` was applied."""

    input: ImageSpec
    target: ImageSpec


class Split:
    """One split of a prepared data set: random access to its records by number, counted over all shards."""

    def __init__(self, folder: Path, manifest: Manifest, name: str, *, cache: bool = False) -> None:
        self.name = name
        self.manifest = manifest
        self._folder = folder
        self._shards = manifest.splits.get(name, [])
        self._starts = np.cumsum([0] + [shard.examples for shard in self._shards])
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
            DataError: the shard cannot be read or the record is damaged; names both.
        """
        if self._cache is not None and number in self._cache:
            return self._cache[number]
        try:
            record = self._read_from_shard(*self._locate(number))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"{self.describe(number)}: {reason}; copy the shard again or prepare the data again") from error
        if self._cache is not None:
            self._cache[number] = record
        return record

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


class PairData:
    """A prepared data set as the networks see it."""

    def __init__(self, folder: Path, config: Config) -> None:
        """Read the manifest and compare the shards' sizes with it.

        Raises:
            DataError: the folder, the manifest or a shard is missing or wrong.
        """
        self.folder = folder
        self.manifest = records.read_manifest(folder)
        self._config = config
        for shards in self.manifest.splits.values():
            records.check_shard_sizes(folder, shards)
        self.train = self.split("train")
        self._check_counts()

    def _check_counts(self) -> None:
        batch = self._config.train.batch_size
        if batch > self.train.examples:
            raise DataError(
                f"{self.folder}: train.batch_size: got {batch}, allowed: up to the {self.train.examples} training pairs"
            )

    def split(self, name: str) -> Split:
        """A split by name; one that the data set does not have is empty."""
        return Split(self.folder, self.manifest, name, cache=self._config.data.cache == "memory")

    @property
    def specs(self) -> Specs:
        """What the networks' input and target look like."""
        sides = (self.manifest.input, self.manifest.target)
        return Specs(*(sides if self._config.data.direction == "forward" else sides[::-1]))

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the training pairs."""
        return order.steps_per_epoch(self.train.examples, self._config.train.batch_size)

    def batch_records(self, step: int) -> NDArray[np.int64]:
        """Record numbers of the global batch of a step: int64, (batch_size,)."""
        size = self._config.train.batch_size
        place = order.placement(step, self.train.examples, size)
        records_of_epoch = order.epoch_order(self.train.examples, self._config.seed, place.epoch, size)
        return np.asarray(records_of_epoch[place.batch], np.int64)

    def _augmentation(self, step: int) -> NDArray[np.int32]:
        data = self._config.data
        epoch = order.placement(step, self.train.examples, self._config.train.batch_size).epoch
        return order.augmentation(self.batch_records(step), self._config.seed, epoch, data.jitter, data.mirror)

    def training_batches(self, first_step: int, last_step: int) -> tf.data.Dataset:
        """The global batches of the steps first_step <= step < last_step, in order.

        Each element is a dict: `input` and `target`, float32 (batch, height, width, channels) in [-1, 1], and `index`,
        uint32 (batch,), the place of each example in the global batch.
        """

        def read_step(step: NDArray[np.int64]) -> tuple[NDArray[np.object_], NDArray[np.int32]]:
            encoded = [self.train.read_or_note(int(number)) for number in self.batch_records(int(step))]
            return np.array(encoded, dtype=object), self._augmentation(int(step))

        size = self._config.train.batch_size

        def read(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            encoded, how = tf.numpy_function(read_step, [step], [tf.string, tf.int32])
            return tf.ensure_shape(encoded, [size]), tf.ensure_shape(how, [size, 3]), tf.cast(tf.range(size), tf.uint32)

        steps = tf.data.Dataset.range(first_step, last_step)
        elements = steps.map(read, num_parallel_calls=READS_AT_ONCE).unbatch()
        examples = elements.map(self._prepare(self._config.data.jitter), num_parallel_calls=_decoders())
        return examples.batch(size, drop_remainder=True).prefetch(BATCHES_AHEAD).with_options(_in_order())

    def evaluation_batches(self, split: Split, batch_size: int, examples: int | None = None) -> tf.data.Dataset:
        """The pairs of a split in their stored order, not augmented; the last batch may be smaller.

        Args:
            split: which pairs.
            batch_size: pairs in a batch.
            examples: only the first so many; None: all.
        """

        def read_one(number: NDArray[np.int64]) -> bytes:
            return split.read_or_note(int(number))

        def read(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            encoded = tf.ensure_shape(tf.numpy_function(read_one, [number], tf.string), [])
            return encoded, tf.zeros([3], tf.int32), tf.cast(number, tf.uint32)

        numbers = tf.data.Dataset.range(split.examples if examples is None else min(examples, split.examples))
        elements = numbers.map(read, num_parallel_calls=READS_AT_ONCE)
        prepared = elements.map(self._prepare(0), num_parallel_calls=_decoders())
        return prepared.batch(batch_size).prefetch(BATCHES_AHEAD).with_options(_in_order())

    def _prepare(self, jitter: int) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], dict[str, tf.Tensor]]:
        data = self._config.data

        def prepare(record: tf.Tensor, how: tf.Tensor, index: tf.Tensor) -> dict[str, tf.Tensor]:
            pair = pairs.prepare(record, self.manifest, data.image_size, data.direction, jitter, how)
            return {"input": pair.input, "target": pair.target, "index": index}

        return prepare

    @contextmanager
    def naming_damage(self, split: Split, numbers: Callable[[], Iterable[int]]) -> Iterator[None]:
        """Turn a failure of the input pipeline into the DataError that names the record.

        Args:
            split: what is being read.
            numbers: called after a failure; the records among which the damaged one must be.
        """
        try:
            yield
        except tf.errors.OpError as error:
            damage = split.damage or self.find_damage(split, numbers())
            if damage is None:
                raise
            raise damage from error

    def find_damage(self, split: Split, numbers: Iterable[int]) -> DataError | None:
        """Read and decode the records one by one, and name the first that fails; None if all are sound.

        A failure inside the input pipeline does not say which record it met; the order is known, so a second look does.
        """
        for number in numbers:
            try:
                self._prepare(0)(tf.constant(split.read(number)), tf.zeros([3], tf.int32), tf.constant(0, tf.uint32))
            except DataError as error:
                return error
            except tf.errors.OpError as error:
                return DataError(f"{split.describe(number)}: {_plain(error)}; prepare the data again without this pair")
        return None


def _decoders() -> int:
    return max(2, os.cpu_count() or 2)


def _in_order() -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    return options


def _plain(error: tf.errors.OpError) -> str:
    """TensorFlow's message without the names of its internal nodes."""
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*?\]|name:\s*$", "", error.message)
    return " ".join(text.split()) or type(error).__name__
