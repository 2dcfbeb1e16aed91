"""One device, two and four replicas, two workers: the same step on the same global batches, as real strategies take it."""

from collections import defaultdict
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.equality import MUTATIONS, RATE
from tests.helpers.settings import small_config
from tests.helpers.topologies import Found, Topologies
from trainer.data.pipeline import PairData
from trainer.model.layers import example_keys
from trainer.train.state import TrainState, trainable

QUICK = ("model.norm=sync_batch", "model.norm=instance")
SLOW = (
    *(f"model.norm={norm};model.dropout={rate}" for norm in ("sync_batch", "instance", "none") for rate in (0.0, 0.5)),
    "model.norm=none;optimizer.clip_norm=0.5",
    "model.norm=instance;train.microbatches=1;train.ema_decay=0.9",
)
ROUNDED = (*QUICK, "model.norm=none")
# Relative to a tensor's largest value; 1e-13 and 1e-12 were reached, and 1e-9 would do.
GRADIENT_64, WEIGHT_64 = 1e-12, 1e-10
# In float32 the sums are rounded 2^29 times more coarsely, and five steps of gradient descent spread it.
GRADIENT_32 = 1e-3


def differences(one: Found, other: Found, precision: str) -> dict[str, float]:
    """The largest difference within any tensor of a kind, relative to the tensor's largest value."""
    worst: dict[str, float] = defaultdict(float)
    for name in (name for name in other if name.startswith(f"{precision}/") and "/spoilt/" not in name):
        kind = name.split("/")[2]
        scale = max(np.abs(one[name]).max(), np.finfo(one[name].dtype).tiny)
        worst[kind] = max(worst[kind], float(np.abs(one[name] - other[name]).max() / scale))
    return worst


def assert_equal_in_float64(one: Found, others: list[Found]) -> None:
    for other in others:
        worst = differences(one, other, "float64")
        print({kind: f"{value:.1e}" for kind, value in worst.items()})
        assert max(worst["weight"], worst["statistic"]) < WEIGHT_64
        assert max(worst["gradient"], worst["losses"], worst["first_statistic"]) < GRADIENT_64
        for name in (name for name in other if name.startswith("float64/adam/")):
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(("workers", "devices"), [(1, 2), (2, 1)])
def test_replicas_and_workers_take_the_step_of_one_device(workers: int, devices: int, topologies: Topologies) -> None:
    (one,) = topologies.run(1, 1, "float64", *QUICK)
    assert_equal_in_float64(one, topologies.run(workers, devices, "float64", *QUICK))


@pytest.mark.parametrize(("workers", "devices"), [(1, 2), (2, 1)])
def test_an_infinity_on_one_replica_moves_no_weight_on_any(workers: int, devices: int, topologies: Topologies) -> None:
    for found in topologies.run(workers, devices, "float64", *QUICK):
        said = {name: found[f"float64/spoilt/{name}"].item() for name in ("moved", "healthy", "step")}
        assert said == {"moved": False, "healthy": False, "step": 0}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("workers", "devices"), [(1, 2), (1, 4), (2, 1), (2, 2)])
def test_every_topology_takes_the_step_of_one_device_in_both_precisions(
    workers: int, devices: int, topologies: Topologies
) -> None:
    """Dropout on and off, three norms, clipping, averaging; gradients, weights after five steps, statistics, losses."""
    (one,) = topologies.run(1, 1, "float64", *SLOW)
    assert_equal_in_float64(one, topologies.run(workers, devices, "float64", *SLOW))
    (one,) = topologies.run(1, 1, "float32", *ROUNDED)
    for other in topologies.run(workers, devices, "float32", *ROUNDED):
        worst = differences(one, other, "float32")
        print({kind: f"{value:.1e}" for kind, value in worst.items()})
        assert worst["gradient"] < GRADIENT_32
        assert worst["losses"] < GRADIENT_32
        for name in (name for name in other if name.startswith("float32/adam/")):
            np.testing.assert_array_equal(one[name], other[name])


CAUGHT_IN = {"statistics_of_the_first": "model.norm=batch", "clipped_before_the_sum": "model.norm=none;optimizer.clip_norm=0.5"}


@pytest.mark.slow
def test_each_mistake_in_the_scaling_is_seen(topologies: Topologies) -> None:
    """The comparison above has teeth: every mistake that other implementations make moves it by far more than its bound."""
    plain = [*dict.fromkeys(CAUGHT_IN.get(mistake, "model.norm=none") for mistake in MUTATIONS)]
    wrong = {mistake: f"{CAUGHT_IN.get(mistake, 'model.norm=none')};!{mistake}" for mistake in MUTATIONS}
    (right,) = topologies.run(1, 2, "float64", *plain, *wrong.values())
    (one,) = topologies.run(1, 1, "float64", *plain)
    for mistake, case in wrong.items():
        right_case = CAUGHT_IN.get(mistake, "model.norm=none")
        made = {name.replace(case, right_case): array for name, array in right.items() if f"/{case}/" in name}
        reference = right if mistake == "statistics_of_the_first" else one
        worst = differences(reference, made, "float64")
        assert max(worst["gradient"], worst["first_statistic"]) > 1e-3, (mistake, worst)


def cross_entropy(logits: tf.Tensor, label: float) -> tf.Tensor:
    return tf.reduce_mean(keras.ops.binary_crossentropy(tf.fill(logits.shape, tf.cast(label, tf.float64)), logits, True))


@pytest.mark.usefixtures("float64")
def test_batch_norm_over_replicas_is_that_of_each_part_alone(topologies: Topologies, sample_folder: Path) -> None:
    """Two replicas against one device that shows the networks half of the batch at a time, written out with plain tapes."""
    config = small_config("train.batch_size=4", "model.norm=batch", "train.steps=50")
    data = PairData(sample_folder, config)
    state = TrainState(config, data.specs)
    (batch,) = data.training_batches(0, 1)
    keys = example_keys(config.seed, state.step, batch["index"])
    source, target = (tf.cast(batch[side], tf.float64) for side in ("input", "target"))
    halves = [(source[part], target[part], keys[part]) for part in (slice(0, 2), slice(2, 4))]
    statistics = statistics_of_each(state, halves)
    g, d = state.generator, state.discriminator
    with tf.GradientTape() as tape:
        terms = []
        for x, y, k in halves:
            real, made = d([x, y], training=True), d([x, g([x, k], training=True)], training=True)
            terms.append((cross_entropy(real, 1.0) + cross_entropy(made, 0.0)) / 2)
        loss = sum(terms) / 2
    by_d = tape.gradient(loss, trainable(d))
    for variable, gradient in zip(trainable(d), by_d, strict=True):
        variable.assign_sub(RATE * gradient)
    with tf.GradientTape() as tape:
        terms = []
        for x, y, k in halves:
            made = g([x, k], training=True)
            terms.append(cross_entropy(d([x, made], training=True), 1.0) + 100 * tf.reduce_mean(tf.abs(y - made)))
        loss = sum(terms) / 2
    by_g = tape.gradient(loss, trainable(g))
    (two,) = topologies.run(1, 2, "float64", "model.norm=batch")
    for network, gradients in (("d", by_d), ("g", by_g)):
        for place, gradient in enumerate(gradients):
            found = two[f"float64/model.norm=batch/gradient/{network}/{place:02d}"]
            np.testing.assert_allclose(found, gradient, rtol=1e-9, atol=1e-9 * np.abs(gradient).max())
    for place, mean in enumerate(statistics):
        np.testing.assert_allclose(two[f"float64/model.norm=batch/first_statistic/g/{place:02d}"], mean, rtol=1e-9, atol=1e-12)


def statistics_of_each(state: TrainState, parts: list[tuple[tf.Tensor, ...]]) -> list[np.ndarray]:
    """The mean of the moving statistics that a device would have after each part alone."""
    variables = [variable.value for variable in state.generator.non_trainable_variables]
    start, after = [variable.numpy() for variable in variables], []
    for x, _, keys in parts:
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        state.generator([x, keys], training=True)
        after.append([variable.numpy() for variable in variables])
    return [np.mean(each, axis=0) for each in zip(*after, strict=True)]
