"""A program for test_replicas.py: the real inner loop over some number of replicas and workers, its gradients written down.

    equality.py OUTPUT DATA CASES PRECISIONS DEVICES

CASES is a list such as `model.norm=none,model.norm=instance;model.dropout=0.0`; a case may end in `;!MUTATION`, a mistake that
is made on purpose. PRECISIONS is a list of float64 and float32. The CPU is split into DEVICES; with TF_CONFIG in the
environment this is one of several workers, and each has so many.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from trainer.cluster import read_cluster
from trainer.startup import load_tensorflow

load_tensorflow()

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

from tests.helpers.settings import small_config  # noqa: E402
from trainer.config import Config, OptimizerConfig, RuntimeConfig  # noqa: E402
from trainer.data.pipeline import PairData  # noqa: E402
from trainer.model import losses  # noqa: E402
from trainer.runtime import strategy as devices  # noqa: E402
from trainer.runtime.preemption import StopSignal  # noqa: E402
from trainer.train import step  # noqa: E402
from trainer.train.block import deal, make_block  # noqa: E402
from trainer.train.optimizer import Adam, read_clock  # noqa: E402
from trainer.train.state import TrainState, trainable  # noqa: E402

STEPS = 5
RATE = 0.01
Arrays = dict[str, np.ndarray]


class RecordingSgd:
    """Plain gradient descent, under which a wrong scale shows; keeps the gradients that it was given."""

    def __init__(self, variables: Sequence[tf.Variable]) -> None:
        self.recorded = [tf.Variable(tf.zeros(v.shape, v.dtype), trainable=False) for v in variables]
        self._variables = variables

    def apply(self, gradients: Sequence[tf.Tensor], clock: object, allowed: tf.Tensor) -> None:
        tf.distribute.get_replica_context().merge_call(self._all, args=(list(gradients),))

    def _all(self, strategy: tf.distribute.Strategy, gradients: Sequence[Any]) -> None:
        for variable, kept, gradient in zip(self._variables, self.recorded, gradients, strict=True):
            strategy.extended.update(variable, self._one, args=(kept, gradient), group=False)

    @staticmethod
    def _one(variable: tf.Variable, kept: tf.Variable, gradient: tf.Tensor) -> None:
        kept.assign(gradient)
        variable.assign_sub(tf.cast(RATE, variable.dtype) * gradient)


def config_of(case: str) -> Config:
    overrides = [part for part in case.split(";") if not part.startswith("!")]
    return small_config("train.batch_size=4", "train.steps=50", *overrides)


def replicas() -> int:
    return int(tf.distribute.get_replica_context().num_replicas_in_sync)


def unchanged(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    return list(tensors)


def clipped_here(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    return sum_over_replicas(tf.clip_by_global_norm(tensors, 0.5 / replicas())[0])


sum_over_replicas, l1_loss, d_loss = step.sum_over_replicas, losses.l1_loss, losses.discriminator_loss
MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "mean_of_means": (losses, "global_mean", lambda each, size: tf.reduce_mean(each)),
    "no_division": (losses, "global_mean", lambda each, size: tf.reduce_sum(each)),
    "divided_twice": (losses, "global_mean", lambda each, size: tf.reduce_sum(each) / size / replicas()),
    "discriminator_not_halved": (losses, "discriminator_loss", lambda real, drawn, weight: d_loss(real, drawn, 1.0)),
    "l1_divided_twice": (losses, "l1_loss", lambda target, drawn: l1_loss(target, drawn) / replicas()),
    "not_reduced": (step, "sum_over_replicas", unchanged),
    "clipped_before_the_sum": (step, "sum_over_replicas", clipped_here),
    "statistics_of_the_first": (step, "average_statistics", lambda state: None),
}


@contextmanager
def mutated(case: str) -> Iterator[None]:
    """Make the mistake that the case names, if it names one."""
    names = [part[1:] for part in case.split(";") if part.startswith("!")]
    with ExitStack() as stack:
        for module, attribute, mistake in (MUTATIONS[name] for name in names):
            stack.enter_context(mock.patch.object(module, attribute, mistake))
        yield


def values(name: str, variables: Sequence[tf.Variable]) -> Arrays:
    return {f"{name}/{place:02d}": variable.numpy() for place, variable in enumerate(variables)}


def five_steps(strategy: tf.distribute.Strategy, config: Config, data: PairData) -> Arrays:
    """The reduced gradients of the first step; the weights, moving statistics and losses after five."""
    state = TrainState(config, data.specs, strategy)
    weights = {"d": trainable(state.discriminator), "g": trainable(state.generator)}
    with strategy.scope():
        state.discriminator_optimizer, state.generator_optimizer = (RecordingSgd(of) for of in weights.values())
    block = make_block(strategy, state, config, StopSignal(), deal(strategy, data, config, 0))
    block(tf.constant(1, tf.int64))
    found = values("first_statistic/g", [v.value for v in state.generator.non_trainable_variables])
    found |= values("gradient/d", state.discriminator_optimizer.recorded)
    found |= values("gradient/g", state.generator_optimizer.recorded)
    found["losses/first"] = state.latest.numpy()
    block(tf.constant(STEPS, tf.int64))
    for network, variables in weights.items():
        found |= values(f"weight/{network}", variables)
    found |= values("statistic/g", [v.value for v in state.generator.non_trainable_variables])
    return found | {"losses/last": state.latest.numpy()}


def spoilt_step(strategy: tf.distribute.Strategy, data: PairData, config: Config) -> Arrays:
    """The real optimisers; the last replica's L1 is infinite in the first step: what has moved, and what is said of it."""

    def spoilt(target: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        bad = tf.equal(context.replica_id_in_sync_group, context.num_replicas_in_sync - 1)
        return l1_loss(target, drawn) + tf.where(bad, tf.cast(np.inf, drawn.dtype), tf.cast(0, drawn.dtype))

    state = TrainState(config, data.specs, strategy)
    before = [variable.numpy() for variable in trainable(state.generator)]
    with mock.patch.object(losses, "l1_loss", spoilt):
        make_block(strategy, state, config, StopSignal(), deal(strategy, data, config, 0))(tf.constant(STEPS, tf.int64))
    moved = [np.any(old != new.numpy()) for old, new in zip(before, trainable(state.generator), strict=True)]
    return {"moved": np.any(moved), "healthy": state.healthy.numpy(), "step": state.step.numpy()}


def adam_steps(strategy: tf.distribute.Strategy) -> Arrays:
    """The real optimiser, given the same gradients everywhere."""
    random = np.random.default_rng(7)
    start, gradients = random.normal(size=(9, 5)), random.normal(size=(4, 9, 5)) * 10.0 ** random.integers(-9, 3, (4, 9, 5))
    with strategy.scope():
        variable = tf.Variable(tf.constant(start, keras.config.floatx()))
        adam = Adam([variable], OptimizerConfig())

    @tf.function
    def apply(gradient: tf.Tensor, number: tf.Tensor) -> None:
        clock = read_clock(Config(), number)
        strategy.run(lambda: adam.apply([tf.identity(gradient)], clock, tf.constant(True)))

    for number, gradient in enumerate(gradients):
        apply(tf.constant(gradient, keras.config.floatx()), tf.constant(number, tf.int64))
    return values("weight", [variable])


def main() -> None:
    output, folder, cases, precisions, cpus = sys.argv[1:]
    runtime, cluster = RuntimeConfig(threads=2, cpu_devices=int(cpus)), read_cluster(os.environ)
    devices.configure_threads(runtime)
    have = devices.configure_devices(runtime)
    strategy = devices.build(devices.choose("auto", cluster, have), cluster, have)
    found: Arrays = {}
    for precision in precisions.split(","):
        keras.config.set_floatx(precision)
        keras.config.set_dtype_policy(precision)
        for case in cases.split(","):
            config = config_of(case)
            data = PairData(Path(folder), config)
            with mutated(case):
                for name, array in five_steps(strategy, config, data).items():
                    found[f"{precision}/{case}/{name}"] = array
        for name, array in adam_steps(strategy).items():
            found[f"{precision}/adam/{name}"] = array
        for name, array in spoilt_step(strategy, data, config_of("model.norm=none")).items():
            found[f"{precision}/spoilt/{name}"] = array
    np.savez(output, **found)
    os._exit(0)


if __name__ == "__main__":
    main()
