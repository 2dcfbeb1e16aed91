"""A program for test_replicas.py: the real inner loop over some number of replicas and workers, its gradients written down.

    equality.py OUTPUT DATA CASES DEVICES

CASES is a list such as `sync_batch,instance:0.0`: norms, a dropout rate after the colon. The CPU is split into DEVICES. With
TF_CONFIG in the environment it is one of several workers, and each has so many.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.cluster import read_cluster
from trainer.startup import load_tensorflow

load_tensorflow()

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

from tests.conftest import small_config  # noqa: E402
from trainer.config import Config, RuntimeConfig  # noqa: E402
from trainer.data.pipeline import PairData  # noqa: E402
from trainer.runtime import strategy as devices  # noqa: E402
from trainer.runtime.preemption import StopSignal  # noqa: E402
from trainer.train.block import deal, make_block  # noqa: E402
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
    norm, _, dropout = case.partition(":")
    return small_config("train.batch_size=4", f"model.norm={norm}", f"model.dropout={dropout or 0.5}", "train.steps=50")


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
    found = values("gradient/d", state.discriminator_optimizer.recorded)
    found |= values("gradient/g", state.generator_optimizer.recorded)
    found["losses/first"] = state.latest.numpy()
    block(tf.constant(STEPS, tf.int64))
    for network, variables in weights.items():
        found |= values(f"weight/{network}", variables)
    found |= values("statistic/g", [v.value for v in state.generator.non_trainable_variables])
    return found | {"losses/last": state.latest.numpy()}


def main() -> None:
    output, folder, cases, cpus = sys.argv[1:]
    runtime, cluster = RuntimeConfig(threads=2, cpu_devices=int(cpus)), read_cluster(os.environ)
    devices.configure_threads(runtime)
    have = devices.configure_devices(runtime)
    strategy = devices.build(devices.choose("auto", cluster, have), cluster, have)
    found: Arrays = {}
    for precision in ("float64", "float32"):
        keras.config.set_floatx(precision)
        keras.config.set_dtype_policy(precision)
        for case in cases.split(","):
            config = config_of(case)
            data = PairData(Path(folder), config)
            for name, array in five_steps(strategy, config, data).items():
                found[f"{precision}/{case}/{name}"] = array
    np.savez(output, **found)
    os._exit(0)


if __name__ == "__main__":
    main()
