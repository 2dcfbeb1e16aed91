import zlib

import numpy as np
import pytest

from tests.helpers import plain_pipeline
from trainer.data import order


def test_mix_is_splitmix64() -> None:
    """The first outputs of the published generator from state 0 are these."""
    states = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(value) for value in order.mix64(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_hash_depends_on_every_word_and_their_order() -> None:
    values = {int(order.hash64(*words)[0]) for words in [(1, 2), (2, 1), (1,), (1, 2, 0), (0, 1, 2)]}
    assert len(values) == 5


@pytest.mark.parametrize(("examples", "batch_size"), [(40, 1), (40, 7), (400, 4), (20_000, 8), (9_001, 3)])
def test_an_epoch_reads_each_record_once_but_the_few_left_over(examples: int, batch_size: int) -> None:
    batches = order.epoch_order(examples, 5, 2, batch_size)
    assert batches.shape == (examples // batch_size, batch_size)
    assert len(np.unique(batches)) == batches.size
    assert batches.min() >= 0
    assert batches.max() < examples


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {order.epoch_order(40, seed, epoch, 1).tobytes() for seed in range(3) for epoch in range(4)}
    assert len(orders) == 12


def test_the_left_over_are_others_in_each_epoch() -> None:
    left = {frozenset(range(10)) - frozenset(order.epoch_order(10, 0, epoch, 4).ravel().tolist()) for epoch in range(20)}
    assert len(left) > 10


def test_the_order_never_changes_between_versions() -> None:
    """Written down once: a run begun with an older version must go on with the same batches."""
    assert order.epoch_order(12, 3, 0, 4).tolist() == GOLDEN_ORDER
    assert order.augmentation(np.arange(3), 3, 1, 30, True).tolist() == GOLDEN_AUGMENTATION


# (examples, batch size, epoch): CRC-32 of the order as int64 and of its augmentation as int32, both little endian, with seed 3.
GOLDEN = {
    (10_000, 1, 0): (0xEA3A621E, 0x6F38C223),
    (10_000, 16, 1): (0x2862A1FE, 0x80C081D2),
    (1_000_000, 1, 2): (0xF934C1DE, 0x58299F67),
    (1_000_000, 16, 0): (0x7B6676AF, 0x23F3B5E9),
}


@pytest.mark.parametrize(("examples", "batch_size", "epoch"), GOLDEN)
def test_the_order_of_large_sets_never_changes_between_versions(examples: int, batch_size: int, epoch: int) -> None:
    """Twelve records fit into one window and one chunk; these do not."""
    batches = order.epoch_order(examples, 3, epoch, batch_size)
    how = order.augmentation(batches[:500].ravel(), 3, epoch, 30, True)
    sums = zlib.crc32(batches.astype("<i8").tobytes()), zlib.crc32(how.astype("<i4").tobytes())
    assert sums == GOLDEN[examples, batch_size, epoch]


@pytest.mark.parametrize(("examples", "batch_size"), [(12, 4), (9_001, 3), (9_001, 64), (20_000, 1)])
def test_the_order_is_that_of_plain_python(examples: int, batch_size: int) -> None:
    """In one window and in several, of chunks of one record and of three."""
    assert order.epoch_order(examples, 7, 2, batch_size).tolist() == plain_pipeline.epoch_order(examples, 7, 2, batch_size)


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("jitter", [0, 30, 1024])
def test_the_augmentation_is_that_of_plain_python(jitter: int, mirror: bool) -> None:
    found = order.augmentation(np.arange(200) * 7_919, 11, 5, jitter, mirror)
    assert found.tolist() == [list(plain_pipeline.augmentation(number * 7_919, 11, 5, jitter, mirror)) for number in range(200)]


GOLDEN_ORDER = [[9, 0, 1, 10], [11, 7, 4, 8], [2, 6, 3, 5]]
GOLDEN_AUGMENTATION = [[2, 3, 1], [21, 18, 0], [12, 8, 0]]


def test_small_sets_are_shuffled_uniformly() -> None:
    """Each record is as often first as any other: chi-square over 1600 epochs, 39 degrees of freedom, 99.9 % point 72.1."""
    first = [int(order.epoch_order(40, 0, epoch, 1)[0, 0]) for epoch in range(1600)]
    counts = np.bincount(first, minlength=40)
    assert ((counts - 40) ** 2 / 40).sum() < 72.1


def test_large_sets_keep_neighbours_together_so_that_buckets_are_read_in_runs() -> None:
    examples, batch_size = 600_000, 4
    assert order.chunk_size(examples) == 64
    batches = order.epoch_order(examples, 0, 0, batch_size)
    window = batches[: order.WINDOW // batch_size]
    chunks = np.unique(window // 64)
    assert len(chunks) <= order.WINDOW // 64 + 2 * batch_size
    correlation = np.corrcoef(window[:-1, 0], window[1:, 0])[0, 1]
    assert abs(correlation) < 0.15


def test_a_place_in_the_batch_owns_its_records_and_their_chunks() -> None:
    batches = order.epoch_order(100_000, 0, 0, 4)
    owners = [set((batches[:, place] // order.chunk_size(100_000)).tolist()) for place in range(4)]
    shared = sum(len(owners[a] & owners[b]) for a in range(4) for b in range(a))
    assert shared <= 3


def test_placement_counts_whole_batches() -> None:
    assert order.placement(0, 10, 4) == (0, 0)
    assert order.placement(5, 10, 4) == (2, 1)


def test_augmentation_covers_all_offsets_evenly_and_mirrors_half() -> None:
    how = order.augmentation(np.arange(31_000), 1, 0, 30, True)
    for column in (0, 1):
        counts = np.bincount(how[:, column], minlength=31)
        assert len(counts) == 31
        assert ((counts - 1000) ** 2 / 1000).sum() < 59.7  # chi-square, 30 degrees of freedom, 99.9 %
    assert abs(how[:, 2].mean() - 0.5) < 0.01
    assert np.abs(np.corrcoef(how.T) - np.eye(3)).max() < 0.02


def test_augmentation_is_of_the_record_and_epoch_not_of_the_batch() -> None:
    together = order.augmentation(np.array([7, 8, 9]), 1, 4, 30, True)
    alone = order.augmentation(np.array([8]), 1, 4, 30, True)
    assert together[1].tolist() == alone[0].tolist()
    assert order.augmentation(np.array([8]), 1, 5, 30, True).tolist() != alone.tolist()


def test_without_jitter_and_mirror_nothing_moves() -> None:
    assert not order.augmentation(np.arange(50), 1, 0, 0, False).any()
