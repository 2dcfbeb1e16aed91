"""One device, two and four replicas, two workers: the same step on the same global batches, as real strategies take it."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.equality import BATCH, OTHERS, RATE, SMALLER, STEPS, scattered
from tests.helpers.plain import Examples, gradients_of_discriminator, gradients_of_generator
from tests.helpers.settings import small_config
from tests.helpers.topologies import Found, Topologies
from trainer.data.pipeline import PairData
from trainer.model.layers import example_keys
from trainer.train.state import TrainState, trainable

SYNC, PARTS = "model.norm=sync_batch", "model.norm=batch"
TOGETHER = ("adam", "deal", "moments", "scores", "agreements")
WIDEST = (2, 2)  # two workers of two devices
MATRIX = (
    PARTS,
    "model.norm=instance;train.microbatches=2;train.ema_decay=0.9",
    "model.norm=none;model.dropout=0.0;optimizer.clip_norm=0.5",
)
# About ten times what was measured, the largest difference relative to the largest value: in float64 gradients 6.3e-14, weights
# 9.7e-16, statistics 2.1e-15 (of the first step 1.3e-15), losses 7.4e-16; in float32 gradients 6.5e-5, weights 3.7e-7, statistics
# 1.7e-6 (1.4e-6), losses 1.2e-9, which three steps from the same weights hardly move: they have the bound of rounding.
BOUNDS = {
    "float64": {"gradient": 6e-13, "weight": 1e-14, "statistic": 2e-14, "first_statistic": 1e-14, "losses": 1e-14},
    "float32": {"gradient": 6e-4, "weight": 4e-6, "statistic": 2e-5, "first_statistic": 1e-5, "losses": 1e-6},
}


def differences(one: Found, other: Found, precision: str) -> dict[str, float]:
    """The largest difference within any tensor of a kind, relative to the tensor's largest value.

    Weights are relative to the largest of all weights of their case: after three steps a bias that began at zero is rounding.
    """
    worst: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = defaultdict(float)
    for name in (name for name in one if "/weight/" in name and name.split("/")[1] not in OTHERS):
        weights[name.split("/")[1]] = max(weights[name.split("/")[1]], np.abs(one[name]).max())
    for name in (name for name in other if name.startswith(f"{precision}/") and name.split("/")[1] not in OTHERS):
        kind = name.split("/")[2]
        if kind == "spoilt":
            continue
        scale = weights[name.split("/")[1]] if kind == "weight" else max(np.abs(one[name]).max(), np.finfo(one[name].dtype).tiny)
        worst[kind] = max(worst[kind], float(np.abs(one[name] - other[name]).max() / scale))
    return worst


def assert_equal(one: Found, others: list[Found], precision: str = "float64") -> None:
    """That all workers have what one device has, to rounding."""
    for other in others:
        worst = differences(one, other, precision)
        print(precision, {kind: f"{value:.1e}" for kind, value in worst.items()})
        assert {kind for kind, value in worst.items() if not value < BOUNDS[precision][kind]} == set(), worst


@pytest.fixture(scope="module")
def one(topologies: Topologies) -> Found:
    """One device."""
    return topologies.run(1, 1, "float64", SYNC, "adam", "scores")[0]


@pytest.fixture(scope="module", params=[(1, 2), pytest.param(WIDEST, marks=pytest.mark.slow)], ids=["1 worker", "2 workers"])
def several(topologies: Topologies, request: pytest.FixtureRequest) -> list[Found]:
    """What one or two workers of two devices have, each."""
    return topologies.run(*request.param, "float64", SYNC, *TOGETHER)


def test_workers_of_two_devices_take_the_step_of_one_device(one: Found, several: list[Found]) -> None:
    """Dropout and a norm over all of the batch: gradients, weights after three steps, statistics, losses."""
    assert_equal(one, several)


def test_the_optimiser_makes_the_same_bits_of_the_same_gradients(one: Found, several: list[Found]) -> None:
    """And nothing of a gradient that is withheld, on any device."""
    for found in several:
        weight = found["float64/adam/weight/00"]
        np.testing.assert_array_equal(weight, one["float64/adam/weight/00"])
        for place in range(6):  # the weight and both moments, on two devices
            expected = one[f"float64/adam/withheld/{place // 2:02d}"]
            np.testing.assert_array_equal(found[f"float64/adam/withheld/{place:02d}"], expected)
        np.testing.assert_array_equal(found["float64/adam/withheld/00"], weight)


def test_an_infinity_on_one_replica_moves_no_weight_on_any(several: list[Found]) -> None:
    for found in several:
        moved, healthy, step = found[f"float64/{SYNC}/spoilt"].tolist()
        assert (moved, healthy, step) == (False, False, STEPS)


def test_each_replica_is_dealt_its_places_of_every_global_batch(several: list[Found], sample_folder: Path) -> None:
    """Worker by worker and device by device, each its next places; from step 5 on, as one device reads them."""
    data = PairData(sample_folder, small_config(*SMALLER))
    whole = list(data.training_batches(5, 7))
    each = BATCH // (2 * len(several))
    for worker, found in enumerate(several):
        for replica in range(2):
            places = range(BATCH)[(2 * worker + replica) * each :][:each]
            for step in range(2):
                assert found["float64/deal/index"][replica, step].tolist() == list(places)
                pictures = whole[step]["input"][places.start : places.stop]
                np.testing.assert_array_equal(found["float64/deal/input"][replica, step], pictures)


def test_moments_over_replicas_are_those_of_the_whole_batch_in_numpy(several: list[Found]) -> None:
    for found in several:
        for name, expected in (("mean", scattered().mean((0, 1, 2))), ("variance", scattered().var((0, 1, 2)))):
            each = found[f"float64/moments/{name}"]
            np.testing.assert_allclose(each, np.stack([expected] * 2), rtol=1e-12)


def test_every_picture_is_scored_once_whoever_takes_it(one: Found, several: list[Found]) -> None:
    """15 pictures, four at a time for each replica."""
    for found in several:
        for name in ("l1", "psnr", "ssim"):
            expected = one[f"float64/scores/{name}"]
            assert expected.shape == (15,)
            np.testing.assert_allclose(found[f"float64/scores/{name}"], expected, rtol=1e-5)


def test_a_worker_counts_once_however_many_devices_it_has(several: list[Found]) -> None:
    for found in several:
        assert found["float64/agreements/sum"].tolist() == [len(several), 1.0 if len(several) == 1 else 11.0]
        assert found["float64/agreements/of_chief"] == 7
        assert found["float64/agreements/any"].tolist() == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "devices"), [(1, 4), (2, 1)])
def test_other_topologies_take_the_step_of_one_device_too(workers: int, devices: int, one: Found, topologies: Topologies) -> None:
    found = topologies.run(workers, devices, "float64", SYNC, "adam", "scores", "agreements")
    assert_equal(one, found)
    for other in found:
        np.testing.assert_array_equal(other["float64/adam/weight/00"], one["float64/adam/weight/00"])
        np.testing.assert_allclose(other["float64/scores/l1"], one["float64/scores/l1"], rtol=1e-5)
        assert other["float64/agreements/sum"].tolist() == [workers, 1.0 if workers == 1 else 11.0]


@pytest.fixture(scope="module")
def matrix(topologies: Topologies) -> list[Found]:
    """Two workers of two devices, in all kinds of steps."""
    return topologies.run(*WIDEST, "float64", *MATRIX)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_workers_of_two_devices_take_every_kind_of_step(topologies: Topologies, matrix: list[Found]) -> None:
    """Three norms, dropout on and off, clipping, microbatches and averaging."""
    (alone,) = topologies.run(1, 1, "float64", *MATRIX[1:])
    assert_equal(alone, [{name: array for name, array in found.items() if f"/{PARTS}/" not in name} for found in matrix])


@pytest.mark.slow
def test_replicas_with_compiled_networks_take_the_step_of_one_device(topologies: Topologies) -> None:
    """Each replica compiles its own, which captures its own weights."""
    case = "model.norm=instance;runtime.jit=true"
    (alone,) = topologies.run(1, 1, "float64", case)
    assert_equal(alone, topologies.run(1, 2, "float64", case))


@pytest.mark.slow
def test_in_float32_only_the_rounding_differs(topologies: Topologies) -> None:
    """The sums are rounded 2^29 times more coarsely than in float64, and gradient descent spreads it."""
    (alone,) = topologies.run(1, 1, "float32", SYNC, "adam")
    several = topologies.run(*WIDEST, "float32", SYNC, "adam")
    assert_equal(alone, several, "float32")
    for other in several:
        np.testing.assert_array_equal(other["float32/adam/weight/00"], alone["float32/adam/weight/00"])


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_batch_norm_over_replicas_is_that_of_each_part_alone(matrix: list[Found], sample_folder: Path) -> None:
    """Four replicas against one device that shows the networks a quarter of the batch at a time, written out with plain tapes."""
    config = small_config(*SMALLER, PARTS)
    data = PairData(sample_folder, config)
    state = TrainState(config, data.specs)
    (batch,) = data.training_batches(0, 1)
    keys = example_keys(config.seed, state.step, batch["index"])
    whole = [tf.cast(batch["input"], tf.float64), tf.cast(batch["target"], tf.float64), keys]
    parts = list(zip(*(tf.split(tensor, 4) for tensor in whole), strict=True))
    statistics = statistics_of_each(state, parts)
    _, by_d = gradients_of_discriminator(state.discriminator, state.generator, parts)
    for variable, gradient in zip(trainable(state.discriminator), by_d, strict=True):
        variable.assign_sub(RATE * gradient)
    _, by_g = gradients_of_generator(state.discriminator, state.generator, parts)
    for found in matrix:
        for network, gradients in (("d", by_d), ("g", by_g)):
            for place, gradient in enumerate(gradients):
                ours = found[f"float64/{PARTS}/gradient/{network}/{place:02d}"]
                np.testing.assert_allclose(ours, gradient, rtol=0, atol=3e-11 * np.abs(gradient).max())  # 3e-12
        for place, mean in enumerate(statistics):
            np.testing.assert_allclose(found[f"float64/{PARTS}/first_statistic/g/{place:02d}"], mean, rtol=1e-12, atol=1e-14)


def statistics_of_each(state: TrainState, parts: list[Examples]) -> list[np.ndarray]:
    """The mean of the moving statistics that a device would have after each part alone."""
    variables = [variable.value for variable in state.generator.non_trainable_variables]
    start, after = [variable.numpy() for variable in variables], []
    for x, _, keys in parts:
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        state.generator([x, keys], training=True)
        after.append([variable.numpy() for variable in variables])
    return [np.mean(each, axis=0) for each in zip(*after, strict=True)]
