"""Pairs -> global batches: a function of (seed, step) alone, read from the shards at the manifest's byte offsets."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.config import Config
from trainer.data import keep, order, pairs, records
from trainer.data.reading import RUN_BYTES
from trainer.data.records import ImageSpec
from trainer.data.split import Means, Reader, Split
from trainer.errors import DataError
from trainer.storage.places import Place

# Record, augmentation and index of an example -> what the networks get of it.
Prepare = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], dict[str, tf.Tensor]]

READS_AT_ONCE = 4
BATCHES_AHEAD = 4
# What a lost worker raises; no record has to be looked at again for it.
_NOT_OF_DATA = (tf.errors.UnavailableError, tf.errors.DeadlineExceededError, tf.errors.AbortedError, tf.errors.CancelledError)


@dataclass(frozen=True)
class Specs:
    """The two sides of the pairs after `data.direction` was applied."""

    input: ImageSpec
    target: ImageSpec


class PairData:
    """A prepared data set as the networks see it."""

    def __init__(self, folder: Place, config: Config) -> None:
        """Read the manifest and compare the shards' sizes with it.

        Raises:
            DataError: the folder, the manifest or a shard is missing or wrong.
            TrainerError: the bucket is away, or refuses.
        """
        self.folder = folder
        self.manifest = records.read_manifest(folder)
        self._config = config
        records.check_shard_sizes(folder, (shard for shards in self.manifest.splits.values() for shard in shards))
        cache = keep.choose(config.data, folder, self.manifest)
        self._means = Means(cache, config.data.readers, config.data.read_ahead_mb * 10**6)
        self._splits: dict[str, Split] = {}
        self.train = self.split("train")

    @classmethod
    def without_config(cls, folder: Place) -> "PairData":
        """The data set as it is, at 128 pixels square: for looking at it."""
        settings = {"dir": str(folder), "image_size": (128, 128)}
        return cls(folder, Config.model_validate({"data": settings}))

    def check_training(self) -> "PairData":
        """The data set itself, if it can be trained on.

        Raises:
            DataError: there are no training pairs, or fewer than a batch.
        """
        batch = self._config.train.batch_size
        if self.train.examples == 0:
            raise DataError(f"{self.folder}: no pairs in the split 'train'; it has {', '.join(self.manifest.splits) or 'none'}")
        if batch > self.train.examples:
            raise DataError(
                f"{self.folder}: train.batch_size: got {batch}, allowed: up to the {self.train.examples} training pairs"
            )
        return self

    def split(self, name: str) -> Split:
        """A split by name; one that the data set does not have is empty."""
        if name not in self._splits:
            self._splits[name] = Split(self.folder, self.manifest, name, self._means)
        return self._splits[name]

    @property
    def bytes_read(self) -> int:
        """Bytes of records that have come from disk or bucket so far."""
        return sum(split.bytes_read for split in list(self._splits.values()))

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

    def _augmentation(self, step: int, numbers: NDArray[np.int64]) -> NDArray[np.int32]:
        data = self._config.data
        epoch = order.placement(step, self.train.examples, self._config.train.batch_size).epoch
        return order.augmentation(numbers, self._config.seed, epoch, data.jitter, data.mirror)

    def _reader(self, first_step: int, last_step: int | None, own: range) -> Reader:
        """What reads this worker's records of each epoch from a step on, and only those."""
        size, steps = self._config.train.batch_size, self.steps_per_epoch

        def needs(epoch: int) -> NDArray[np.int64]:
            first = max(first_step - epoch * steps, 0)
            last = steps if last_step is None else min(max(last_step - epoch * steps, 0), steps)
            whole = order.epoch_order(self.train.examples, self._config.seed, epoch, size)
            return np.asarray(whole[first:last, own.start : own.stop], np.int64).ravel()

        run = run_length(*self._runs_in_use(len(own)), self.train.mean_bytes, self.train.room)
        return self.train.noting(self.train.reader(needs, run, first_step // max(1, steps)))

    def _runs_in_use(self, own: int) -> tuple[Sequence[int], int]:
        """The lengths that runs of neighbours may have, and how many records those in use at a time hold together.

        A perfect shuffle uses all of them at a time; else those of the windows, and of the chunks that begin or end there.
        """
        neighbours = order.chunk_size(self.train.examples)
        if neighbours == 1:
            return range(self.train.usual_run, 0, -1), own * self.steps_per_epoch
        steps = max(order.WINDOW // self._config.train.batch_size, neighbours) + neighbours // 2
        return [length for length in range(neighbours, 0, -1) if neighbours % length == 0], own * steps

    def training_batches(
        self, first_step: int, last_step: int | None = None, *, places: range | None = None, replicas: int = 1
    ) -> tf.data.Dataset:
        """The global batches of the steps from first_step on, in order; or one worker's places in them.

        Only the records of these places are read (of a bucket whose records are kept, the runs of neighbours that they lie in).
        Shapes are static, so that a TPU's compiler can take them.

        Args:
            first_step: the step of the first batch, from 0.
            last_step: the step before which they end; None: they never do.
            places: which examples of each global batch; all of them by default.
            replicas: how many devices share them: so many elements in a row make a step.

        Returns:
            A data set of dicts: `input` and `target`, float32 (examples, height, width, channels) in [-1, 1], and `index`,
            uint32 (examples,), the place of each example in the global batch.
        """
        own = range(self._config.train.batch_size) if places is None else places
        reader = self._reader(first_step, last_step, own)

        def read_step(step: NDArray[np.int64]) -> tuple[NDArray[np.object_], NDArray[np.int32]]:
            numbers = self.batch_records(int(step))[own.start : own.stop]
            encoded = reader(int(step) // self.steps_per_epoch, numbers.tolist())
            return np.array(encoded, dtype=object), self._augmentation(int(step), numbers)

        @tf.autograph.experimental.do_not_convert
        def read(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            encoded, how = tf.numpy_function(read_step, [step], [tf.string, tf.int32])
            index = tf.cast(tf.range(own.start, own.stop), tf.uint32)
            return tf.ensure_shape(encoded, [len(own)]), tf.ensure_shape(how, [len(own), 3]), index

        steps = tf.data.Dataset.counter(first_step) if last_step is None else tf.data.Dataset.range(first_step, last_step)
        elements = steps.map(read, num_parallel_calls=READS_AT_ONCE).unbatch()
        examples = elements.map(self._prepare(self._config.data.jitter), num_parallel_calls=_decoders())
        batches = examples.batch(len(own) // replicas, drop_remainder=True).prefetch(BATCHES_AHEAD * replicas)
        if last_step is None:  # `unbatch` forgets it, and with it a strategy need not look for the end before every step
            batches = batches.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
        return batches.with_options(_in_order())

    def batches_of(self, split: Split, numbers: Sequence[int], batch_size: int) -> tf.data.Dataset:
        """Some pairs of a split, not augmented; the last batch may be smaller. It can be iterated over once.

        TensorFlow keeps the function that reads as long as the process lives, so it gives its reader up when it has read all.
        """
        readers, total, done = [split.noting(split.in_turn(numbers))], len(numbers), itertools.count(1)

        def read_one(number: NDArray[np.int64]) -> bytes:
            record = readers[0](0, [int(number)])[0]
            if next(done) == total:
                readers.clear()
            return record

        @tf.autograph.experimental.do_not_convert
        def read(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            encoded = tf.ensure_shape(tf.numpy_function(read_one, [number], tf.string), [])
            return encoded, tf.zeros([3], tf.int32), tf.cast(number, tf.uint32)

        listed = tf.data.Dataset.from_tensor_slices(tf.constant(list(numbers), tf.int64))
        elements = listed.map(read, num_parallel_calls=READS_AT_ONCE)
        prepared = elements.map(self._prepare(0), num_parallel_calls=_decoders())
        return prepared.batch(batch_size).prefetch(BATCHES_AHEAD).with_options(_in_order())

    def _prepare(self, jitter: int) -> Prepare:
        data = self._config.data

        def prepare(record: tf.Tensor, how: tf.Tensor, index: tf.Tensor) -> dict[str, tf.Tensor]:
            pair = pairs.prepare(record, self.manifest, data.image_size, data.direction, jitter, how)
            return {"input": pair.input, "target": pair.target, "index": index}

        as_it_is: Prepare = tf.autograph.experimental.do_not_convert(prepare)
        return as_it_is

    @contextmanager
    def naming_damage(self, split: Split, numbers: Callable[[], Iterable[int]]) -> Iterator[None]:
        """Turn a failure of the input pipeline into the error that names the record, or into what the bucket said.

        Args:
            split: what is being read.
            numbers: called after a failure; the records among which the damaged one must be.
        """
        try:
            yield
        except tf.errors.OpError as error:
            if split.damage is None and isinstance(error, _NOT_OF_DATA):
                raise
            damage = split.damage or split.find_damage(numbers())
            if damage is None:
                raise
            raise damage from error


def run_length(lengths: Iterable[int], at_once: int, mean_bytes: int, room: int) -> int:
    """How many neighbouring records a bucket is asked for at once.

    Runs of r records, used in a shuffled order, leave x - x^r of them waiting when x is still to be used, at the most
    where x^(r-1) = 1/r. The longest run is taken that leaves a quarter of the room for reading ahead.

    Args:
        lengths: what it may be, the longest first.
        at_once: records in all the runs that are in use at a time.
        mean_bytes: of a record.
        room: bytes that may wait for their use.
    """
    for run in lengths:
        most = run ** (-1 / (run - 1)) if run > 1 else 1.0
        if run * mean_bytes <= RUN_BYTES and at_once * mean_bytes * (most - most**run) <= room * 3 / 4:
            return run
    return 1


_ABANDONED: list[Iterator[dict[str, tf.Tensor]]] = []


def elements(dataset: tf.data.Dataset) -> Iterator[dict[str, tf.Tensor]]:
    """Iterate over a data set; one that is left before its end is kept, not freed.

    TensorFlow frees an iterator by waiting for its threads, and they may be waiting for the interpreter lock that the caller
    holds. A run leaves a pipeline early only when it ends, so what is kept is little.
    """
    iterator, finished = iter(dataset), False
    try:
        yield from iterator
        finished = True
    finally:
        if not finished:
            _ABANDONED.append(iterator)


def _decoders() -> int:
    return max(2, os.cpu_count() or 2)


def _in_order() -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    return options
