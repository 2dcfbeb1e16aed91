import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.model import layers
from trainer.model.layers import BatchNorm, InstanceNorm, KeyedDropout, example_keys, fold, inference_keys, mix32

SHAPE = (8, 16, 16, 32)


def reference_mix(value: int) -> int:
    """lowbias32 on Python's integers."""
    mask = 0xFFFFFFFF
    value ^= value >> 16
    value = value * 0x7FEB352D & mask
    value ^= value >> 15
    value = value * 0x846CA68B & mask
    return value ^ value >> 16


def reference_fold(key: int, word: int) -> int:
    return reference_mix((key + 0x9E3779B9 + reference_mix(word)) & 0xFFFFFFFF)


def mask(layer: KeyedDropout, keys: tf.Tensor, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return layer((tf.ones((keys.shape[0], *shape[1:])), keys), training=True).numpy() > 0


def keys_at(step: int, seed: int = 0, places: range = range(8)) -> tf.Tensor:
    return example_keys(seed, tf.constant(step, tf.int64), tf.constant(list(places), tf.uint32))


def test_integer_hash_is_the_published_one() -> None:
    values = [0, 1, 2, 12345, 0xFFFFFFFF]
    assert mix32(tf.constant(values, tf.uint32)).numpy().tolist() == [reference_mix(value) for value in values]
    assert int(fold(tf.constant(7, tf.uint32), 9)) == reference_fold(7, 9)


def test_mask_is_the_hash_of_seed_step_example_layer_and_element() -> None:
    """Recomputed on Python's integers for a few elements."""
    found = mask(KeyedDropout(0.5, 2, at_inference=True), keys_at(41, seed=3))
    for place, element in [(0, 0), (5, 77), (7, 8191)]:
        key = reference_fold(reference_fold(reference_fold(0, 3), 41), place)
        bits = reference_mix(reference_fold(key, 2) ^ reference_mix(element + 0x9E3779B9 & 0xFFFFFFFF))
        assert found[place].ravel()[element] == (bits >= 2**31)


def test_mask_belongs_to_the_place_in_the_global_batch_not_to_the_replica() -> None:
    layer = KeyedDropout(0.5, 0, at_inference=True)
    whole = mask(layer, keys_at(5))
    halves = [mask(layer, keys_at(5, places=places)) for places in (range(4), range(4, 8))]
    np.testing.assert_array_equal(whole, np.concatenate(halves))


def test_seeds_steps_layers_and_examples_have_masks_of_their_own() -> None:
    """Two independent halves agree in half of the elements; 65536 elements, five standard deviations are 0.01."""
    layer = KeyedDropout(0.5, 0, at_inference=True)
    base = mask(layer, keys_at(5))
    others = [
        mask(layer, keys_at(6)),
        mask(layer, keys_at(5, seed=1)),
        mask(KeyedDropout(0.5, 1, at_inference=True), keys_at(5)),
    ]
    for other in [*others, np.roll(base, 1, axis=0)]:
        assert abs((base == other).mean() - 0.5) < 0.01


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropped_share_is_the_rate_and_the_mean_is_kept(rate: float) -> None:
    out = KeyedDropout(rate, 0, at_inference=True)((tf.ones(SHAPE), keys_at(1)), training=True).numpy()
    assert abs((out == 0).mean() - rate) < 5 * (rate * (1 - rate) / out.size) ** 0.5
    np.testing.assert_allclose(out[out > 0], 1 / (1 - rate), rtol=1e-6)


def test_neighbouring_elements_are_uncorrelated() -> None:
    kept = mask(KeyedDropout(0.5, 0, at_inference=True), keys_at(9)).astype(float)
    for axis in (1, 2, 3):
        first, second = np.delete(kept, -1, axis).ravel(), np.delete(kept, 0, axis).ravel()
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.02


def test_mask_is_the_same_under_xla() -> None:
    layer = KeyedDropout(0.5, 3, at_inference=True)
    compiled = tf.function(lambda keys: layer((tf.ones(SHAPE), keys), training=True), jit_compile=True)
    np.testing.assert_array_equal(compiled(keys_at(11)) > 0, mask(layer, keys_at(11)))


def test_at_inference_all_images_share_one_mask_in_paper_mode() -> None:
    out = KeyedDropout(0.5, 0, at_inference=True)((tf.ones(SHAPE), inference_keys(0, 8)), training=False).numpy()
    assert (out == out[:1]).all()
    assert 0.45 < (out[0] == 0).mean() < 0.55


def test_frozen_inference_drops_nothing() -> None:
    out = KeyedDropout(0.5, 0, at_inference=False)((tf.ones(SHAPE), inference_keys(0, 8)), training=False)
    assert (out.numpy() == 1).all()


def images(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3.0, 2.0, (4, 5, 6, 3))


def batch_norm(inference: str, over_replicas: bool = False) -> BatchNorm:
    layer = BatchNorm(
        inference=inference, over_replicas=over_replicas, epsilon=layers.NORM_EPSILON, momentum=layers.NORM_MOMENTUM
    )
    layer.build((None, 5, 6, 3))
    layer.gamma.assign([1.0, 2.0, 0.5])
    layer.beta.assign([0.0, -1.0, 3.0])
    return layer


def normalised(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * [1.0, 2.0, 0.5] + [0.0, -1.0, 3.0]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("over_replicas", [False, True])
def test_batch_norm_in_training_uses_the_batch(over_replicas: bool) -> None:
    layer = batch_norm("paper", over_replicas)
    np.testing.assert_allclose(layer(images(), training=True), normalised(images(), (0, 1, 2)), rtol=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("over_replicas", [False, True])
def test_moving_statistics_take_a_tenth_of_each_batch(over_replicas: bool) -> None:
    layer = batch_norm("paper", over_replicas)
    layer(images(), training=True)
    np.testing.assert_allclose(layer.moving_mean.numpy(), 0.1 * images().mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(layer.moving_variance.numpy(), 0.9 + 0.1 * images().var((0, 1, 2)), rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_paper_inference_uses_each_image_alone_as_batch_size_1_does() -> None:
    out = batch_norm("paper")(images(), training=False)
    np.testing.assert_allclose(out, normalised(images(), (1, 2)), rtol=1e-9)
    np.testing.assert_allclose(out[2:3], batch_norm("paper")(images()[2:3], training=True), rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_frozen_inference_uses_the_moving_statistics() -> None:
    expected = images() / np.sqrt(1 + 1e-5) * [1.0, 2.0, 0.5] + [0.0, -1.0, 3.0]
    np.testing.assert_allclose(batch_norm("frozen")(images(), training=False), expected, rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_instance_norm_is_each_images_own_in_training_too() -> None:
    layer = InstanceNorm(epsilon=layers.NORM_EPSILON, gamma_initializer="ones")
    layer.build((None, 5, 6, 3))
    layer.gamma.assign([1.0, 2.0, 0.5])
    layer.beta.assign([0.0, -1.0, 3.0])
    np.testing.assert_allclose(layer(images()), normalised(images(), (1, 2)), rtol=1e-9)


def test_initial_weights_come_from_seed_and_name_alone() -> None:
    draws = [layers.normal(seed, name)((3, 3)).numpy().tobytes() for seed, name in [(0, "a"), (0, "a"), (1, "a"), (0, "b")]]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def rebuilt(layer: keras.layers.Layer) -> keras.layers.Layer:
    """The same layer from what is written of it in a .keras file, built where the first was."""
    text = json.dumps(keras.saving.serialize_keras_object(layer))
    known = {kind.__name__: kind for kind in (KeyedDropout, BatchNorm, InstanceNorm)}
    return keras.saving.deserialize_keras_object(json.loads(text), custom_objects=known)


@pytest.mark.parametrize("at_inference", [True, False])
def test_dropout_is_rebuilt_with_its_rate_its_masks_and_its_use(at_inference: bool) -> None:
    """A rate and a number that are nobody's default."""
    layer = KeyedDropout(0.3, 2, at_inference=at_inference)
    for training in (True, False):
        given = (tf.ones(SHAPE), keys_at(3))
        np.testing.assert_array_equal(rebuilt(layer)(given, training=training), layer(given, training=training))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("inference", ["paper", "frozen"])
def test_batch_norm_is_rebuilt_with_its_constants_and_its_use(inference: str) -> None:
    layer = BatchNorm(inference=inference, over_replicas=True, epsilon=0.5, momentum=0.6)
    layer.build((None, 5, 6, 3))
    layer.set_weights(list(np.random.default_rng(2).uniform(0.5, 2, (4, 3))))
    other = rebuilt(layer)
    other.set_weights(layer.get_weights())
    assert other.over_replicas
    np.testing.assert_array_equal(other(images(), training=False), layer(images(), training=False))
    np.testing.assert_array_equal(other(images(), training=True), layer(images(), training=True))
    np.testing.assert_array_equal(other.get_weights(), layer.get_weights())


@pytest.mark.usefixtures("float64")
def test_instance_norm_is_rebuilt_with_its_constants_and_its_first_weights() -> None:
    layer = InstanceNorm(epsilon=0.5, gamma_initializer=layers.normal(4, "a", mean=1.0))
    layer.build((None, 5, 6, 3))
    other = rebuilt(layer)
    np.testing.assert_array_equal(other.gamma.numpy(), layer.gamma.numpy())
    np.testing.assert_array_equal(other(images()), layer(images()))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("near", [0.0, 3.0, -40.0])
def test_moments_over_all_replicas_of_one_device_are_numpys(near: float) -> None:
    """Whatever they are computed near to."""
    mean, variance = layers.moments_over_replicas(tf.constant(images()), tf.fill([3], tf.constant(near, tf.float64)))
    np.testing.assert_allclose(mean, images().mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(variance, images().var((0, 1, 2)), rtol=1e-10)


@pytest.mark.usefixtures("float64")
def test_sync_batch_norm_has_the_gradient_of_the_formula() -> None:
    """dx = gamma / s (g - mean(g) - x^ mean(g x^)), with x^ the standardised x and s its deviation."""
    layer = BatchNorm(inference="paper", over_replicas=True, epsilon=1e-5, momentum=0.9)
    layer.build((None, 5, 6, 3))
    layer.gamma.assign([1.0, 2.0, 0.5])
    layer.moving_mean.assign([2.0, -1.0, 3.0])
    x, upstream = tf.constant(images()), np.random.default_rng(3).normal(size=images().shape)
    with tf.GradientTape() as tape:
        tape.watch(x)
        total = tf.reduce_sum(layer(x, training=True) * upstream)
    deviation = np.sqrt(images().var((0, 1, 2)) + 1e-5)
    standard = (images() - images().mean((0, 1, 2))) / deviation
    centred = upstream - upstream.mean((0, 1, 2)) - standard * (upstream * standard).mean((0, 1, 2))
    np.testing.assert_allclose(tape.gradient(total, x), [1.0, 2.0, 0.5] / deviation * centred, rtol=1e-9, atol=1e-12)
