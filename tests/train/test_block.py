"""The block of steps as one graph: what replicas can share, where a batch comes from, when a block ends."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.plain import PlainStep
from tests.helpers.settings import small_config
from trainer.config import Config
from trainer.data.pipeline import PairData
from trainer.errors import UserError
from trainer.model.layers import example_keys
from trainer.runtime.preemption import StopSignal
from trainer.train.block import READY, check_replicas, deal, fetch, fitting_batch_sizes, make_block, now
from trainer.train.state import TrainState, trainable

SETTINGS = (
    "data.image_size=[32,48]", "data.jitter=4", "train.batch_size=2", "train.steps=3", "optimizer.schedule=linear_decay",
    "optimizer.learning_rate=0.001", "model.norm=instance",
)  # fmt: skip


def shared(batch: int, microbatches: int = 1, **more: object) -> Config:
    return Config.model_validate({"train": {"batch_size": batch, "microbatches": microbatches}, **more})


@pytest.mark.parametrize(("batch", "parts", "sizes"), [(5, 4, (4, 8)), (8, 4, (8, 12)), (3, 4, (4, 4)), (7, 1, (7, 8))])
def test_fitting_sizes_are_the_nearest_multiples(batch: int, parts: int, sizes: tuple[int, int]) -> None:
    assert fitting_batch_sizes(batch, parts) == sizes


@pytest.mark.parametrize(("batch", "replicas", "microbatches"), [(1, 1, 1), (4, 4, 1), (8, 2, 2), (12, 2, 3)])
def test_batches_that_can_be_shared_are_taken(batch: int, replicas: int, microbatches: int) -> None:
    check_replicas(shared(batch, microbatches), replicas)


@pytest.mark.parametrize(
    ("batch", "replicas", "microbatches", "allowed"),
    [
        (5, 2, 1, "a multiple of 2 for 2 replicas, such as 4 or 6"),
        (6, 1, 4, "a multiple of 4 for 4 microbatches, such as 4 or 8"),
        (6, 2, 2, "a multiple of 4 for 2 replicas times 2 microbatches, such as 4 or 8"),
        (1, 4, 1, "a multiple of 4 for 4 replicas, such as 4"),
    ],
)
def test_batches_that_cannot_be_shared_are_refused_with_the_nearest_that_can(
    batch: int, replicas: int, microbatches: int, allowed: str
) -> None:
    with pytest.raises(UserError) as refused:
        check_replicas(shared(batch, microbatches), replicas)
    assert str(refused.value) == f"train.batch_size: got {batch}, allowed: {allowed}"


def test_compiling_is_refused_where_a_norm_reduces_over_replicas() -> None:
    config = shared(2, model={"norm": "sync_batch"}, runtime={"jit": True})
    check_replicas(config, 1)
    with pytest.raises(UserError, match=r"^runtime.jit: got true, allowed: false with model.norm=sync_batch on 2 replicas"):
        check_replicas(config, 2)
    check_replicas(shared(2, model={"norm": "batch"}, runtime={"jit": True}), 2)


@pytest.fixture(scope="module")
def one_device() -> tf.distribute.Strategy:
    return tf.distribute.OneDeviceStrategy("/cpu:0")


def test_one_device_is_dealt_whole_batches_from_a_step_to_the_last(
    one_device: tf.distribute.Strategy, sample_folder: Path
) -> None:
    config = small_config(*SETTINGS)
    data = PairData(sample_folder, config)
    dealt, expected = list(deal(one_device, data, config, 1)), list(data.training_batches(1, 3))
    assert len(dealt) == len(expected) == 2
    for batch, plain in zip(dealt, expected, strict=True):
        assert set(batch) == {*plain, READY}
        for name, tensor in plain.items():
            np.testing.assert_array_equal(batch[name], tensor)


@pytest.mark.parametrize(("seconds", "waited"), [(-500, 0), (500, 500), (20_000, 20_000)])
def test_the_wait_is_how_much_later_a_batch_was_ready_than_the_devices(
    seconds: int, waited: int, one_device: tf.distribute.Strategy, state: TrainState
) -> None:
    """A batch stamped with a time to come, or with one before; a clock of 32 bits may wrap in between."""
    state.waited.assign(7.0)

    def batches() -> Iterator[dict[str, tf.Tensor]]:
        yield {"input": tf.constant(3), READY: tf.constant((int(now()) + seconds * 100_000) % 2**32, tf.uint32)}

    batch = fetch(one_device, state, batches())
    assert {name: int(value) for name, value in batch.items()} == {"input": 3}
    assert float(state.waited) == pytest.approx(7 + waited, abs=2)


@pytest.fixture(scope="module")
def state(sample_folder: Path) -> TrainState:
    config = small_config(*SETTINGS)
    return TrainState(config, PairData(sample_folder, config).specs)


@pytest.mark.usefixtures("float64")
def test_a_block_takes_the_plain_steps_up_to_its_end_or_a_wish_to_stop(
    one_device: tf.distribute.Strategy, sample_folder: Path
) -> None:
    """Weights by NumPy's Adam, of the rate that falls towards train.steps, under the masks of each step's number."""
    config, stop = small_config(*SETTINGS), StopSignal()
    data = PairData(sample_folder, config)
    ours, theirs = TrainState(config, data.specs, one_device), TrainState(config, data.specs)
    block = make_block(one_device, ours, config, stop, deal(one_device, data, config, 0))
    block(tf.constant(1, tf.int64))
    assert int(ours.step) == 1
    stop.flag.assign(True)
    block(tf.constant(3, tf.int64))
    assert int(ours.step) == 2, "the step that is under way is finished"
    stop.flag.assign(False)
    block(tf.constant(3, tf.int64))
    assert int(ours.step) == 3
    plain, losses = PlainStep(theirs.generator, theirs.discriminator), []
    for number, batch in enumerate(data.training_batches(0, 3)):
        pair = (tf.cast(batch["input"], tf.float64), tf.cast(batch["target"], tf.float64))
        keys = example_keys(config.seed, tf.constant(number, tf.int64), batch["index"])
        losses.append(plain.take(*pair, keys, rate=0.001 * min(1, (3 - number) / 1.5)))
    np.testing.assert_allclose(list(ours.latest_losses().values()), losses[-1], rtol=1e-9)
    np.testing.assert_allclose(list(ours.mean_losses().values()), np.mean(losses, 0), rtol=1e-9)
    for mine, other in zip(networks(ours), networks(theirs), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-14)  # 7e-16 was measured


def networks(state: TrainState) -> list[tf.Variable]:
    return [*trainable(state.generator), *trainable(state.discriminator)]
