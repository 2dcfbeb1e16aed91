"""A program for test_replicas.py: the real inner loop over some number of replicas and workers, its gradients written down.

    equality.py OUTPUT DATA CASES PRECISIONS DEVICES

CASES is a list such as `model.norm=none|model.norm=instance;model.dropout=0.0|scores`: settings of the inner loop, and names of
what else is compared (OTHERS). PRECISIONS is a list of float64 and float32. The CPU is split into DEVICES; with TF_CONFIG in
the environment this is one of several workers, each with so many.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from trainer.cluster import Cluster, read_cluster
from trainer.startup import load_tensorflow

load_tensorflow()

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

from tests.helpers.settings import small_config  # noqa: E402
from trainer.config import Config, OptimizerConfig, RuntimeConfig  # noqa: E402
from trainer.data.pipeline import PairData  # noqa: E402
from trainer.model import losses  # noqa: E402
from trainer.model.layers import moments_over_replicas  # noqa: E402
from trainer.runtime import strategy as devices  # noqa: E402
from trainer.runtime.preemption import StopSignal  # noqa: E402
from trainer.runtime.workers import meet  # noqa: E402
from trainer.train.block import deal, make_block  # noqa: E402
from trainer.train.evaluate import Evaluator  # noqa: E402
from trainer.train.optimizer import Adam, read_clock  # noqa: E402
from trainer.train.state import TrainState, build_generator, trainable  # noqa: E402

STEPS = 3
RATE = 0.01
BATCH = 8
SMALLER = ("data.image_size=[32,48]", f"train.batch_size={BATCH}", "train.steps=50")
Arrays = dict[str, np.ndarray]


class Place(NamedTuple):
    """Where this process stands, and on what it works."""

    strategy: tf.distribute.Strategy
    cluster: Cluster
    data: Path


class RecordingSgd:
    """Plain gradient descent, under which a wrong scale shows; keeps the gradients that it was given, if it may."""

    def __init__(self, variables: Sequence[tf.Variable]) -> None:
        self.recorded = [tf.Variable(tf.zeros(v.shape, v.dtype), trainable=False) for v in variables]
        self._variables = variables

    def apply(self, gradients: Sequence[tf.Tensor], clock: object, allowed: tf.Tensor) -> None:
        tf.distribute.get_replica_context().merge_call(self._all, args=(list(gradients), allowed))

    def _all(self, strategy: tf.distribute.Strategy, gradients: Sequence[Any], allowed: Any) -> None:
        for variable, kept, gradient in zip(self._variables, self.recorded, gradients, strict=True):
            strategy.extended.update(variable, self._one, args=(kept, gradient, allowed), group=False)

    @staticmethod
    def _one(variable: tf.Variable, kept: tf.Variable, gradient: tf.Tensor, allowed: tf.Tensor) -> None:
        kept.assign(gradient)
        variable.assign(tf.where(allowed, variable - tf.cast(RATE, variable.dtype) * gradient, variable))


def config_of(case: str) -> Config:
    return small_config(*SMALLER, *case.split(";"))


def values(name: str, variables: Sequence[tf.Variable]) -> Arrays:
    return {f"{name}/{place:02d}": variable.numpy() for place, variable in enumerate(variables)}


@contextmanager
def spoiling(switch: tf.Variable) -> Iterator[None]:
    """Let the last replica's L1 be infinite while the switch is on."""
    plain = losses.l1_loss

    def spoilt(target: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        bad = switch & tf.equal(context.replica_id_in_sync_group, context.num_replicas_in_sync - 1)
        return plain(target, drawn) + tf.where(bad, tf.cast(np.inf, drawn.dtype), tf.cast(0, drawn.dtype))

    with mock.patch.object(losses, "l1_loss", spoilt):
        yield


def few_steps(at: Place, case: str) -> Arrays:
    """The reduced gradients of the first step; weights, moving statistics and losses after a few; then a step that is spoilt."""
    config, strategy = config_of(case), at.strategy
    data = PairData(at.data, config)
    state = TrainState(config, data.specs, strategy)
    weights = {"d": trainable(state.discriminator), "g": trainable(state.generator)}
    with strategy.scope():
        state.discriminator_optimizer, state.generator_optimizer = (RecordingSgd(of) for of in weights.values())
    block = make_block(strategy, state, config, StopSignal(), deal(strategy, data, config, 0))
    with strategy.scope():
        switch = tf.Variable(False, trainable=False)  # on each device: compiled code reads none of another
    with spoiling(switch):
        block(tf.constant(1, tf.int64))
    found = values("first_statistic/g", [v.value for v in state.generator.non_trainable_variables])
    found |= values("gradient/d", state.discriminator_optimizer.recorded)
    found |= values("gradient/g", state.generator_optimizer.recorded)
    found["losses/first"] = state.latest.numpy()
    block(tf.constant(STEPS, tf.int64))
    for network, variables in weights.items():
        found |= values(f"weight/{network}", variables)
    found |= values("statistic/g", [v.value for v in state.generator.non_trainable_variables])
    found["losses/last"] = state.latest.numpy()
    switch.assign(True)
    before = [copy.numpy() for variable in weights["g"] for copy in strategy.experimental_local_results(variable)]
    block(tf.constant(2 * STEPS, tf.int64))
    after = [copy.numpy() for variable in weights["g"] for copy in strategy.experimental_local_results(variable)]
    moved = any(np.any(old != new) for old, new in zip(before, after, strict=True))
    return found | {"spoilt": np.array([moved, state.healthy.numpy(), state.step.numpy()])}


def adam_steps(at: Place) -> Arrays:
    """The real optimiser, given the same gradients everywhere; the last of them is withheld."""
    random = np.random.default_rng(7)
    start, gradients = random.normal(size=(9, 5)), random.normal(size=(4, 9, 5)) * 10.0 ** random.integers(-9, 3, (4, 9, 5))
    with at.strategy.scope():
        variable = tf.Variable(tf.constant(start, keras.config.floatx()))
        adam = Adam([variable], OptimizerConfig())

    @tf.function
    def apply(gradient: tf.Tensor, number: tf.Tensor, allowed: tf.Tensor) -> None:
        clock = read_clock(Config(), number)
        at.strategy.run(lambda: adam.apply([tf.identity(gradient)], clock, allowed))

    for number, gradient in enumerate(gradients):
        apply(tf.constant(gradient, keras.config.floatx()), tf.constant(number, tf.int64), tf.constant(True))
    found = values("weight", [variable])
    apply(tf.fill([9, 5], tf.constant(np.inf, keras.config.floatx())), tf.constant(4, tf.int64), tf.constant(False))
    state = [variable, *adam.first_moments, *adam.second_moments]
    return found | values("withheld", [copy for one in state for copy in at.strategy.experimental_local_results(one)])


def scattered() -> np.ndarray:
    """Numbers in the shape of the images of a global batch, each image and channel with a mean and deviation of its own."""
    random = np.random.default_rng(8)
    centres, widths = random.normal(0, 5, (BATCH, 1, 1, 3)), random.uniform(0.5, 4, (BATCH, 1, 1, 3))
    return centres + widths * random.normal(size=(BATCH, 5, 6, 3))


def moments(at: Place) -> Arrays:
    """Mean and variance over replicas of numbers of which each replica has its part."""

    def of_part() -> tuple[tf.Tensor, tf.Tensor]:
        context = tf.distribute.get_replica_context()
        parts = tf.split(tf.constant(scattered(), keras.config.floatx()), context.num_replicas_in_sync)
        part = tf.stack(parts)[context.replica_id_in_sync_group]
        return moments_over_replicas(part, tf.constant([1.0, -2.0, 0.0], part.dtype))

    both = tf.function(lambda: at.strategy.run(of_part), autograph=False)()
    return {
        name: np.stack(at.strategy.experimental_local_results(of)) for name, of in zip(("mean", "variance"), both, strict=True)
    }


def scores(at: Place) -> Arrays:
    """Each score of each picture of the test split, shared out over all replicas."""
    config = config_of("model.norm=none")
    data = PairData(at.data, config)
    with at.strategy.scope():
        generator = build_generator(config, data.specs)
    evaluator = Evaluator(generator, data, config, at.strategy, meet(at.strategy, at.cluster))
    return evaluator.per_image(data.split("test"), lambda: False)


def agreements(at: Place) -> Arrays:
    """What the workers add up, what the chief says, and whether it is so for any: each brings something else."""
    workers = meet(at.strategy, at.cluster)
    brought = np.array([1.0, 10.0**workers.index])
    last = workers.index == workers.size - 1
    found = {"sum": workers.add_up(brought), "of_chief": np.array(workers.of_chief(7 + workers.index))}
    return found | {"any": np.array([workers.any(last), workers.any(False)])}


def dealt(at: Place) -> Arrays:
    """What each replica of this worker is dealt of two global batches, from step 5 on: (replicas, steps, places, ...)."""
    config = config_of("model.norm=none")
    batches = deal(at.strategy, PairData(at.data, config), config, 5)
    steps = [next(batches) for _ in range(2)]
    local = at.strategy.experimental_local_results
    return {side: np.stack([[part.numpy() for part in local(step[side])] for step in steps], 1) for side in ("index", "input")}


OTHERS: dict[str, Callable[[Place], Arrays]] = {
    "adam": adam_steps,
    "deal": dealt,
    "moments": moments,
    "scores": scores,
    "agreements": agreements,
}


def main() -> None:
    output, folder, cases, precisions, cpus = sys.argv[1:]
    runtime, cluster = RuntimeConfig(threads=2, cpu_devices=int(cpus)), read_cluster(os.environ)
    devices.configure_threads(runtime)
    have = devices.configure_devices(runtime)
    strategy = devices.build(devices.choose("auto", cluster, have), cluster, have)
    at = Place(strategy, cluster, Path(folder))
    found: Arrays = {}
    for precision in precisions.split(","):
        keras.config.set_floatx(precision)
        keras.config.set_dtype_policy(precision)
        for case in cases.split("|"):
            arrays = OTHERS[case](at) if case in OTHERS else few_steps(at, case)
            found |= {f"{precision}/{case}/{name}": array for name, array in arrays.items()}
    np.savez(output, **found)
    os._exit(0)


if __name__ == "__main__":
    main()
