"""The inner loop, on the devices: batches dealt to replicas, and a block of steps as one graph."""

import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import tensorflow as tf

from trainer.config import Config
from trainer.data.pipeline import PairData
from trainer.errors import UserError
from trainer.runtime.preemption import StopSignal
from trainer.train.optimizer import Clock, read_clock
from trainer.train.state import TrainState
from trainer.train.step import StepResult, train_step

Batch = Mapping[str, tf.Tensor]
Batches = Iterator[Batch]
READY = "ready"  # when a batch was there
TICKS, WRAP = 1e5, 2**32  # ticks in a second; they wrap after half a day, and are compared over minutes


def fitting_batch_sizes(batch_size: int, parts: int) -> tuple[int, int]:
    """The nearest batch sizes, below (or equal to the least possible) and above, that divide into equal parts."""
    below = batch_size // parts * parts
    return max(parts, below), below + parts


def check_replicas(config: Config, replicas: int) -> None:
    """Refuse what so many replicas cannot do.

    Raises:
        UserError: the global batch cannot be divided evenly (it names the nearest sizes that can), or a norm would have to
            reduce over replicas inside compiled code.
    """
    if replicas > 1 and config.runtime.jit and config.model.norm == "sync_batch":
        raise UserError(
            f"runtime.jit: got true, allowed: false with model.norm=sync_batch on {replicas} replicas: "
            "XLA cannot compile its sums over replicas"
        )
    batch, parts = config.train.batch_size, replicas * config.train.microbatches
    if batch % parts:
        sizes = " or ".join(str(size) for size in sorted(set(fitting_batch_sizes(batch, parts))))
        factors = [(replicas, "replicas"), (config.train.microbatches, "microbatches")]
        shared = " times ".join(f"{count} {name}" for count, name in factors if count > 1)
        raise UserError(f"train.batch_size: got {batch}, allowed: a multiple of {parts} for {shared}, such as {sizes}")


def deal(strategy: tf.distribute.Strategy, data: PairData, config: Config, first_step: int) -> Batches:
    """The global batches from first_step on: replica r of R takes the r-th of R equal runs of places in each batch.

    A worker reads only its own places. One device takes a plain iterator: a distributed one costs a fifth of a small step.
    """
    replicas, batch, exact = strategy.num_replicas_in_sync, config.train.batch_size, config.runtime.deterministic
    if isinstance(strategy, tf.distribute.OneDeviceStrategy):
        return iter(stamped(data.training_batches(first_step, config.train.steps), deterministic=exact))

    def of_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
        share = batch // context.num_input_pipelines
        places = range(context.input_pipeline_id * share, (context.input_pipeline_id + 1) * share)
        batches = data.training_batches(first_step, places=places, replicas=replicas // context.num_input_pipelines)
        return stamped(batches, deterministic=exact)

    return iter(strategy.distribute_datasets_from_function(of_worker))


def _now_in_python() -> np.uint32:
    return np.uint32(int(time.time() * TICKS) % WRAP)


def now(*, deterministic: bool = False) -> tf.Tensor:
    """The time of day in ticks of 10 microseconds, modulo 2^32: a uint32 scalar, which every kind of device can hold.

    Args:
        deterministic: runtime.deterministic, under which TensorFlow refuses its own clock; Python's takes longer.
    """
    if deterministic:
        return tf.ensure_shape(tf.numpy_function(_now_in_python, [], tf.uint32), [])
    return tf.cast(tf.cast(tf.timestamp() * TICKS, tf.int64) % WRAP, tf.uint32)


def stamped(batches: tf.data.Dataset, *, deterministic: bool = False) -> tf.data.Dataset:
    """The same batches, each with the time at which it was ready to be taken.

    That the taking itself is late counts for nothing: on a busy CPU it queues behind operations that need no batch.
    """

    @tf.autograph.experimental.do_not_convert
    def stamp(batch: Batch) -> Batch:
        return {**batch, READY: now(deterministic=deterministic)}

    return batches.map(stamp).prefetch(1)


def fetch(strategy: tf.distribute.Strategy, state: TrainState, batches: Batches, *, deterministic: bool = False) -> Batch:
    """The next batch; how much later it was ready than the devices is added to `state.waited`. Runs in the graph, on the host.

    The loop begins a step when it has the last one's result on the host, so on a GPU too the devices are ready at the end of
    that step and not of its enqueueing. A clock has no input: the control edge holds it in its place.
    """
    with tf.device("/cpu:0"):
        free = now(deterministic=deterministic)
    with tf.control_dependencies([free]):
        batch = dict(next(batches))
    with tf.device("/cpu:0"):
        ready = [tf.cast(tick, tf.int64) for tick in strategy.experimental_local_results(batch.pop(READY))]
        late = (tf.stack(ready) - tf.cast(free, tf.int64) + WRAP // 2) % WRAP - WRAP // 2
        state.waited.assign_add(tf.cast(tf.maximum(tf.reduce_max(late), 0), tf.float64) / TICKS)
    return batch


def make_block(
    strategy: tf.distribute.Strategy, state: TrainState, config: Config, stop: StopSignal, batches: Batches
) -> Callable[[tf.Tensor], None]:
    """A graph function: run steps until `state.step` is its argument, any worker must stop, or one was not finite."""

    def step(batch: Batch, clock: Clock, asked: tf.Tensor) -> StepResult:
        return train_step(state, config, batch, clock, asked)

    @tf.autograph.experimental.do_not_convert  # nothing in it needs that, and rewriting its source takes seconds
    def next_step() -> tf.Tensor:
        batch = fetch(strategy, state, batches, deterministic=config.runtime.deterministic)
        clock = read_clock(config, state.step)
        of_replicas = strategy.run(step, (batch, clock, stop.flag.read_value()))
        result = tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], of_replicas)
        state.record(result.losses, result.finite)
        return result.stop

    def block(until: tf.Tensor) -> None:
        stopping = tf.constant(False)
        while (state.step < until) & state.healthy & ~stopping:
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            stopping = next_step()

    compiled: Callable[[tf.Tensor], None] = tf.function(block)
    return compiled
