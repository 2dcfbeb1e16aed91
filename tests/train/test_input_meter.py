"""The time that devices wait for input, against sleeps of known length on both sides of the queue between them."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import small_config
from trainer.data.pipeline import PairData
from trainer.runtime.preemption import StopSignal
from trainer.train import block
from trainer.train.state import LOSSES, TrainState
from trainer.train.step import StepResult

STEPS = 30


def sleeping(dataset: tf.data.Dataset, seconds: float) -> tf.data.Dataset:
    """The same elements, each so much later than the one before."""

    def sleep(_: Any) -> np.int64:
        time.sleep(seconds)
        return np.int64(0)

    def late(element: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        with tf.control_dependencies([tf.numpy_function(sleep, [element["index"]], tf.int64)]):
            return tf.nest.map_structure(tf.identity, element)

    return dataset.map(late)


def sleeping_step(seconds: float) -> Callable[..., StepResult]:
    """A step that takes a known time and leaves no weight changed."""

    def sleep(_: Any) -> np.float32:
        time.sleep(seconds)
        return np.float32(1.0)

    def step(state: TrainState, config: object, batch: dict[str, tf.Tensor], clock: object, stop: tf.Tensor) -> StepResult:
        loss = tf.ensure_shape(tf.numpy_function(sleep, [batch["index"]], tf.float32), [])
        return StepResult(dict.fromkeys(LOSSES, loss), loss > 0, stop)

    return step


def wait_share(data: PairData, batches: tf.data.Dataset) -> tuple[float, float]:
    """The measured share of a block of steps, after a first block that is not looked at; and the block's seconds."""
    config = small_config("train.batch_size=2", "train.steps=100")
    state, strategy = TrainState(config, data.specs), tf.distribute.OneDeviceStrategy("/cpu:0")
    iterator = iter(batches)
    run = block.make_block(strategy, state, config, StopSignal(), iterator)
    run(tf.constant(3, tf.int64))
    before, began = float(state.waited.numpy()), time.perf_counter()
    run(tf.constant(3 + STEPS, tf.int64))
    seconds = time.perf_counter() - began
    return (float(state.waited.numpy()) - before) / seconds, seconds


@pytest.fixture
def ready(small_data: PairData) -> Iterator[tf.data.Dataset]:
    """One batch that costs nothing, again and again."""
    yield small_data.training_batches(0, 1).cache().repeat()


@pytest.mark.parametrize(
    ("input_seconds", "step_seconds", "queue", "share"),
    [
        (0.03, 0.03, 0, 0.5),  # one after the other
        (0.06, 0.02, 1, 2 / 3),  # at the same time: what the input takes longer is waited for
        (0.02, 0.01, 4, 1 / 2),
        (0.01, 0.03, 1, 0.0),  # the step is the slower one
    ],
)
def test_the_share_is_what_the_sleeps_say(
    input_seconds: float,
    step_seconds: float,
    queue: int,
    share: float,
    small_data: PairData,
    ready: tf.data.Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block, "train_step", sleeping_step(step_seconds))
    late = sleeping(ready, input_seconds)
    measured, _ = wait_share(small_data, late.prefetch(queue) if queue else late)
    assert measured == pytest.approx(share, abs=0.06)


def test_a_fast_input_under_a_real_step_is_hardly_waited_for(small_data: PairData, ready: tf.data.Dataset) -> None:
    share, _ = wait_share(small_data, ready.prefetch(4))
    assert share < 0.05


def test_a_slow_input_under_a_real_step_is_what_the_step_leaves(small_data: PairData, ready: tf.data.Dataset) -> None:
    """The independent measure: what the same steps take by themselves, and what they take with the slow input."""
    _, alone = wait_share(small_data, ready.prefetch(4))
    late = 2.5 * alone / STEPS
    share, seconds = wait_share(small_data, sleeping(ready, late).prefetch(2))
    assert share == pytest.approx(1.0 - alone / seconds, abs=0.1)
    assert share > 0.4
