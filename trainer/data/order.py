"""The order of training: which record stands where in which global batch, and how each one is augmented.

Everything here is a pure function of integers (seed, epoch, record), worked out by an integer hash of our own: the same on
every machine, in every version of every library, for any number of threads, devices and workers.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# A data set of more than this many records is shuffled by chunks of neighbours, so that a bucket is read in long runs.
WHOLE_SHUFFLE_LIMIT = 8192
MAX_CHUNK = 64
WINDOW = 4096

_ORDER_STREAM, _WITHIN_STREAM, _WINDOW_STREAM, _AUGMENT_STREAM = 1, 2, 3, 4

U64 = NDArray[np.uint64]


def mix64(value: U64) -> U64:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit integers that looks random."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def hash64(*words: int | U64) -> U64:
    """Fold non-negative integers (or one array of them) into 64 bits that depend on every word and on their order."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = mix64(state + np.uint64(0x9E3779B97F4A7C15) + mix64(np.atleast_1d(np.asarray(word)).astype(np.uint64)))
    return state


class Placement(NamedTuple):
    """Where in an epoch a step lies."""

    epoch: int
    batch: int


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Whole global batches in one pass; the few records left over are others in each epoch."""
    return examples // batch_size


def placement(step: int, examples: int, batch_size: int) -> Placement:
    """The epoch of a global step (from 0) and the number of its batch in that epoch."""
    return Placement(*divmod(step, steps_per_epoch(examples, batch_size)))


def chunk_size(examples: int) -> int:
    """Records that stay neighbours in the coarse shuffle: 1 in small sets (a perfect shuffle), 64 at the most."""
    return min(MAX_CHUNK, -(-examples // WHOLE_SHUFFLE_LIMIT))


@lru_cache(maxsize=4)
def epoch_order(examples: int, seed: int, epoch: int, batch_size: int) -> NDArray[np.int64]:
    """Record numbers of every global batch of an epoch: int64, shape (steps, batch_size), each record at most once.

    Chunks of neighbouring records are permuted; the result is cut into batch_size streams, one for each place in the
    batch; each stream is shuffled inside windows. So a worker that owns some places of the batch reads its own records
    and no others, and reads each chunk at about one time.
    """
    steps = steps_per_epoch(examples, batch_size)
    coarse = _by_chunks(examples, seed, epoch)[: steps * batch_size]
    windows = np.arange(steps) // max(1, WINDOW // batch_size)
    shuffled = [
        stream[np.lexsort((hash64(seed, _WINDOW_STREAM, epoch, stream.astype(np.uint64)), windows))]
        for stream in coarse.reshape(batch_size, steps)
    ]
    order = np.stack(shuffled, axis=1)
    order.flags.writeable = False
    return order


def _by_chunks(examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    records = np.arange(examples)
    chunks = (records // chunk_size(examples)).astype(np.uint64)
    within = hash64(seed, _WITHIN_STREAM, epoch, records.astype(np.uint64))
    return np.lexsort((within, hash64(seed, _ORDER_STREAM, epoch, chunks))).astype(np.int64)


def augmentation(records: NDArray[np.int64], seed: int, epoch: int, jitter: int, mirror: bool) -> NDArray[np.int32]:
    """Crop offsets and mirroring of each record in this epoch: int32, shape (records, 3): top, left, mirrored (0 or 1).

    The offsets are uniform over 0..jitter, both included (paper, section 6.2: random jitter and mirroring).
    """
    bits = hash64(seed, _AUGMENT_STREAM, epoch, records.astype(np.uint64))
    low, high = bits & np.uint64(0x7FFFFFFF), bits >> np.uint64(32)
    flip = mix64(bits) & np.uint64(1 if mirror else 0)
    span = np.uint64(jitter + 1)
    return np.stack([low % span, high % span, flip], axis=1).astype(np.int32)
