"""The whole step against a plain one written with two tapes and Keras's Adam, in float64."""

from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.settings import small_config
from trainer.config import Config
from trainer.data.pipeline import Specs
from trainer.data.records import ImageSpec
from trainer.model.layers import example_keys
from trainer.train.optimizer import Clock, read_clock
from trainer.train.state import TrainState, trainable
from trainer.train.step import StepResult, all_finite, train_step, update

PHOTO = ImageSpec(kind="photo", channels=3, bit_depth=8)
SPECS = Specs(PHOTO, PHOTO)
RNG = np.random.default_rng(3)
BATCHES = [
    {
        "input": tf.constant(RNG.uniform(-1, 1, (2, 64, 64, 3))),
        "target": tf.constant(RNG.uniform(-1, 1, (2, 64, 64, 3))),
        "index": tf.constant([0, 1], tf.uint32),
    }
    for _ in range(3)
]

pytestmark = pytest.mark.usefixtures("float64")


def make(*overrides: str) -> tuple[Config, TrainState]:
    config = small_config("train.batch_size=2", *overrides)
    return config, TrainState(config, SPECS)


def take_step(state: TrainState, config: Config, batch: dict[str, tf.Tensor]) -> StepResult:
    return train_step(state, config, batch, read_clock(config, state.step), tf.constant(False))


def cross_entropy(logits: tf.Tensor, label: float) -> tf.Tensor:
    return tf.reduce_mean(keras.ops.binary_crossentropy(tf.fill(logits.shape, tf.cast(label, tf.float64)), logits, True))


def plain_step(
    state: TrainState, config: Config, batch: dict[str, tf.Tensor], optimizers: list[keras.optimizers.Adam]
) -> list[float]:
    """D step, then a fresh drawing, then G step against the updated D: the paper's order, spelled out."""
    g, d = state.generator, state.discriminator
    keys = example_keys(config.seed, state.step, batch["index"])
    x, y = batch["input"], batch["target"]
    with tf.GradientTape() as tape:
        real, made = d([x, y], training=True), d([x, g([x, keys], training=True)], training=True)
        d_loss = (cross_entropy(real, 1.0) + cross_entropy(made, 0.0)) / 2
    optimizers[0].apply(tape.gradient(d_loss, d.trainable_variables), d.trainable_variables)
    with tf.GradientTape() as tape:
        picture = g([x, keys], training=True)
        gan = cross_entropy(d([x, picture], training=True), 1.0)
        l1 = tf.reduce_mean(tf.abs(y - picture))
        loss = gan + 100 * l1
    optimizers[1].apply(tape.gradient(loss, g.trainable_variables), g.trainable_variables)
    return [float(d_loss), float(gan), float(l1) * 127.5]


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_three_steps_give_the_plain_steps_losses_and_weights(norm: str) -> None:
    config, ours = make(f"model.norm={norm}")
    _, theirs = make(f"model.norm={norm}")
    adam = [keras.optimizers.Adam(2e-4, beta_1=0.5, beta_2=0.999, epsilon=1e-8) for _ in range(2)]
    for batch in BATCHES:
        result = take_step(ours, config, batch)
        expected = plain_step(theirs, config, batch, adam)
        np.testing.assert_allclose([float(value) for value in result.losses.values()], expected, rtol=1e-6)
        ours.record(result.losses, result.finite)
        theirs.step.assign_add(1)
    for mine, other in zip(all_weights(ours), all_weights(theirs), strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-7)


def all_weights(state: TrainState) -> list[np.ndarray]:
    return [variable.numpy() for network in (state.generator, state.discriminator) for variable in trainable(network)]


class Recorder:
    """Stands in the optimiser's place and keeps the gradients, so that no update hides their scale."""

    def __init__(self) -> None:
        self.gradients: list[np.ndarray] = []

    def apply(self, gradients: list[tf.Tensor], clock: Clock, allowed: tf.Tensor) -> None:
        self.gradients = [gradient.numpy() for gradient in gradients]


def recorded_gradients(*overrides: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    config, state = make("model.norm=none", *overrides)
    recorders = Recorder(), Recorder()
    state.discriminator_optimizer, state.generator_optimizer = recorders  # type: ignore[assignment]
    take_step(state, config, BATCHES[0])
    return recorders[0].gradients, recorders[1].gradients


def numeric_gradient(loss: Callable[[], tf.Tensor], variable: tf.Variable, index: tuple[int, ...]) -> float:
    """Central difference of the loss in one weight."""
    value, step = variable.numpy(), 1e-6
    sides = []
    for sign in (1, -1):
        moved = value.copy()
        moved[index] += sign * step
        variable.assign(moved)
        sides.append(float(loss()))
    variable.assign(value)
    return (sides[0] - sides[1]) / (2 * step)


def test_gradients_are_the_slopes_of_the_papers_losses() -> None:
    """D halved, lambda 100: seen in gradients, which Adam would hide."""
    _, state = make("model.norm=none")
    batch = BATCHES[0]
    keys = example_keys(0, state.step, batch["index"])
    g, d = state.generator, state.discriminator

    def d_loss() -> tf.Tensor:
        made = g([batch["input"], keys], training=True)
        real, fake = d([batch["input"], batch["target"]]), d([batch["input"], made])
        return (cross_entropy(real, 1.0) + cross_entropy(fake, 0.0)) / 2

    def g_loss() -> tf.Tensor:
        made = g([batch["input"], keys], training=True)
        return cross_entropy(d([batch["input"], made]), 1.0) + 100 * tf.reduce_mean(tf.abs(batch["target"] - made))

    by_d, by_g = recorded_gradients()
    for network, loss, gradients in ((d, d_loss, by_d), (g, g_loss, by_g)):
        for position in (0, len(gradients) // 2, len(gradients) - 1):
            index = np.unravel_index(np.argmax(np.abs(gradients[position])), gradients[position].shape)
            slope = numeric_gradient(loss, trainable(network)[position], index)
            np.testing.assert_allclose(gradients[position][index], slope, rtol=0.02, atol=1e-7)  # the losses have kinks


@pytest.mark.parametrize(("override", "network", "factor"), [("loss.discriminator_weight=1.0", 0, 2.0)])
def test_discriminator_weight_scales_its_gradient(override: str, network: int, factor: float) -> None:
    before, after = recorded_gradients()[network], recorded_gradients(override)[network]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new, factor * old, rtol=1e-12)


def test_generator_is_judged_by_the_updated_discriminator() -> None:
    """With a large D step, the GAN term is that of the weights after it, not before."""
    config, state = make("model.norm=none", "optimizer.learning_rate=0.05")
    batch = BATCHES[0]
    keys = example_keys(0, state.step, batch["index"])
    picture = state.generator([batch["input"], keys], training=True)
    before = float(cross_entropy(state.discriminator([batch["input"], picture]), 1.0))
    gan = float(take_step(state, config, batch).losses["generator_gan"])
    after = float(cross_entropy(state.discriminator([batch["input"], picture]), 1.0))
    assert abs(gan - after) < 1e-9
    assert abs(gan - before) > 0.1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_changes_no_weight(value: float) -> None:
    config, state = make()
    spoilt = dict(BATCHES[0], target=tf.constant(np.full((2, 64, 64, 3), value)))
    before = all_weights(state)
    result = take_step(state, config, spoilt)
    state.record(result.losses, result.finite)
    assert not bool(result.finite)
    assert not bool(state.healthy)
    assert int(state.step) == 0
    for old, new in zip(before, all_weights(state), strict=True):
        np.testing.assert_array_equal(old, new)


def test_generator_alone_not_finite_keeps_the_generator() -> None:
    """lambda so large that only the generator's loss overflows."""
    config, state = make("loss.reconstruction_weight=1.0e308")
    before = [variable.numpy() for variable in trainable(state.generator)]
    result = take_step(state, config, dict(BATCHES[0], target=BATCHES[0]["target"] * 1000.0))
    assert np.isfinite(float(result.losses["discriminator"]))
    assert not bool(result.finite)
    for old, variable in zip(before, trainable(state.generator), strict=True):
        np.testing.assert_array_equal(old, variable)


def test_one_bad_element_is_seen() -> None:
    good = tf.ones((100, 100))
    assert bool(all_finite([good, good]))
    assert not bool(all_finite([good, tf.tensor_scatter_nd_update(good, [[50, 50]], [np.nan])]))


def test_losses_are_summed_over_steps_until_reset() -> None:
    _, state = make()
    for value in (1.0, 3.0):
        state.record(dict.fromkeys(("discriminator", "generator_gan", "l1"), tf.constant(value)), tf.constant(True))
    assert state.mean_losses() == {"discriminator": 2.0, "generator_gan": 2.0, "l1": 2.0}
    state.reset_losses()
    assert state.mean_losses() == {}
    assert state.latest_losses()["l1"] == 3.0
    assert int(state.step) == 2


@pytest.mark.parametrize("norm", ["instance", "none"])
def test_microbatches_give_the_gradients_of_the_whole_batch(norm: str) -> None:
    whole = recorded_gradients(f"model.norm={norm}")
    parts = recorded_gradients(f"model.norm={norm}", "train.microbatches=2")
    for network_of_whole, network_of_parts in zip(whole, parts, strict=True):
        for expected, found in zip(network_of_whole, network_of_parts, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())


def test_microbatches_move_the_generators_statistics_once() -> None:
    """Both halves of the batch equal: each half moves the statistics once, though the generator draws twice."""
    config, state = make("train.microbatches=2", "model.dropout=0.0")
    twice = {name: tf.repeat(value[:1], 2, axis=0) for name, value in BATCHES[0].items()}
    take_step(state, config, twice)
    _, plain = make("model.dropout=0.0")
    keys = example_keys(0, plain.step, twice["index"][:1])
    for _ in range(2):
        plain.generator([twice["input"][:1], keys], training=True)
    for mine, other in zip(state.generator.non_trainable_variables, plain.generator.non_trainable_variables, strict=True):
        np.testing.assert_allclose(mine.numpy(), other.numpy(), rtol=1e-9)


@pytest.mark.parametrize("network", [0, 1])
def test_clipping_keeps_the_direction_and_limits_the_norm(network: int) -> None:
    whole = recorded_gradients()[network]
    norm = np.sqrt(sum(np.sum(gradient**2) for gradient in whole))
    clipped = recorded_gradients(f"optimizer.clip_norm={norm / 4}")[network]
    for before, after in zip(whole, clipped, strict=True):
        np.testing.assert_allclose(after, before / 4, rtol=1e-9)
    untouched = recorded_gradients(f"optimizer.clip_norm={norm * 2}")[network]
    for before, after in zip(whole, untouched, strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-12)


def test_the_average_follows_the_weights_by_its_formula() -> None:
    config, state = make("train.ema_decay=0.5")
    assert state.averaged is not None
    expected = [weight.numpy() for weight in state.averaged.trainable_variables]
    for number, batch in enumerate(BATCHES, 1):
        result = take_step(state, config, batch)
        state.record(result.losses, result.finite)
        decay = min(0.5, (1 + number) / (10 + number))
        weights = [variable.numpy() for variable in trainable(state.generator)]
        expected = [decay * mean + (1 - decay) * weight for mean, weight in zip(expected, weights, strict=True)]
    for mine, other in zip(state.averaged.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(mine.numpy(), other, rtol=1e-9)
    both = zip(state.averaged.non_trainable_variables, state.generator.non_trainable_variables, strict=True)
    assert all(np.array_equal(mine.numpy(), other.numpy()) for mine, other in both)
    assert state.drawer is state.averaged


def test_the_average_stays_where_a_step_is_not_finite() -> None:
    config, state = make("train.ema_decay=0.5")
    assert state.averaged is not None
    before = [weight.numpy() for weight in state.averaged.trainable_variables]
    take_step(state, config, dict(BATCHES[0], target=tf.constant(np.full((2, 64, 64, 3), np.nan))))
    for old, weight in zip(before, state.averaged.trainable_variables, strict=True):
        np.testing.assert_array_equal(old, weight.numpy())


def test_a_wish_to_stop_comes_back_from_the_step() -> None:
    config, state = make()
    clock = read_clock(config, state.step)
    assert not bool(train_step(state, config, BATCHES[0], clock, tf.constant(False)).stop)
    assert bool(train_step(state, config, BATCHES[0], clock, tf.constant(True)).stop)


def test_a_gradient_whose_square_overflows_is_not_finite() -> None:
    """Clipping would make it NaN, and Adam's second moment would be infinite for ever."""
    config, state = make("optimizer.clip_norm=1.0")
    before = all_weights(state)
    huge = [tf.fill(variable.shape, tf.constant(1e200, tf.float64)) for variable in trainable(state.generator)]
    clock = read_clock(config, state.step)
    finite = update(state.generator_optimizer, huge, [tf.constant(0.0, tf.float64)], config, clock, tf.constant(True))
    assert not bool(finite)
    for old, new in zip(before, all_weights(state), strict=True):
        np.testing.assert_array_equal(old, new)
