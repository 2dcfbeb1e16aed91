"""The inner loop, on the devices: batches dealt to replicas, and a block of steps as one graph."""

from collections.abc import Callable, Iterator, Mapping

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
    replicas, batch = strategy.num_replicas_in_sync, config.train.batch_size
    if isinstance(strategy, tf.distribute.OneDeviceStrategy):
        return iter(data.training_batches(first_step, config.train.steps))

    def of_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
        share = batch // context.num_input_pipelines
        places = range(context.input_pipeline_id * share, (context.input_pipeline_id + 1) * share)
        return data.training_batches(first_step, places=places, replicas=replicas // context.num_input_pipelines)

    return iter(strategy.distribute_datasets_from_function(of_worker))


def fetch(batches: Batches, state: TrainState) -> Batch:
    """The next batch; the time until it is there is added to `state.waited`. Runs inside the graph, on the host.

    The loop begins a step when it has the last one's result on the host, so on a GPU too the first look at the clock is at
    the end of a step and not of its enqueueing. The clock has no input of its own: control edges hold it in its place.
    """
    with tf.device("/cpu:0"):
        began = tf.timestamp()
    with tf.control_dependencies([began]):
        batch = next(batches)
    with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)), tf.device("/cpu:0"):
        state.waited.assign_add(tf.maximum(tf.timestamp() - began, 0.0))  # it is the time of day, which may be set back
    return batch


def make_block(
    strategy: tf.distribute.Strategy, state: TrainState, config: Config, stop: StopSignal, batches: Batches
) -> Callable[[tf.Tensor], None]:
    """A graph function: run steps until `state.step` is its argument, any worker must stop, or one was not finite."""

    def step(batch: Batch, clock: Clock, asked: tf.Tensor) -> StepResult:
        return train_step(state, config, batch, clock, asked)

    def block(until: tf.Tensor) -> None:
        stopping = tf.constant(False)
        while (state.step < until) & state.healthy & ~stopping:
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            batch = fetch(batches, state)
            clock = read_clock(config, state.step)
            of_replicas = strategy.run(step, (batch, clock, stop.flag.read_value()))
            result = tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], of_replicas)
            state.record(result.losses, result.finite)
            stopping = result.stop

    compiled: Callable[[tf.Tensor], None] = tf.function(block)
    return compiled
