import numpy as np
import pytest
import tensorflow as tf

from trainer.model import losses

RNG = np.random.default_rng(7)
REAL, GENERATED = RNG.normal(0, 4, (3, 5, 6, 1)), RNG.normal(0, 4, (3, 5, 6, 1))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def entropy(logits: np.ndarray, label: int) -> np.ndarray:
    return -(np.log(sigmoid(logits)) if label else np.log(1 - sigmoid(logits))).mean((1, 2, 3))


@pytest.mark.parametrize("label", [0, 1])
def test_cross_entropy_is_its_formula(label: int) -> None:
    np.testing.assert_allclose(losses.cross_entropy(tf.constant(REAL), float(label)), entropy(REAL, label), rtol=1e-9)


def test_cross_entropy_is_finite_for_certain_verdicts() -> None:
    far = tf.constant([[[[-1e4]]], [[[1e4]]]], tf.float64)
    np.testing.assert_allclose(losses.cross_entropy(far, 1.0), [1e4, 0.0])


def test_discriminator_wants_real_one_generated_zero_and_is_halved() -> None:
    expected = 0.5 * (entropy(REAL, 1) + entropy(GENERATED, 0))
    np.testing.assert_allclose(losses.discriminator_loss(tf.constant(REAL), tf.constant(GENERATED), 0.5), expected, rtol=1e-9)


def test_generator_wants_generated_one() -> None:
    np.testing.assert_allclose(losses.generator_gan_loss(tf.constant(GENERATED)), entropy(GENERATED, 1), rtol=1e-9)


def test_generator_loss_does_not_saturate() -> None:
    """Where D is sure that the picture is generated, the gradient is still 1; log(1 - D) would give none."""
    logits = tf.constant([[[[-30.0]]]], tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = losses.generator_gan_loss(logits)
    assert abs(float(tape.gradient(loss, logits)[0, 0, 0, 0]) + 1) < 1e-9


def test_l1_is_the_mean_absolute_difference() -> None:
    a, b = RNG.normal(size=(2, 4, 5, 3)), RNG.normal(size=(2, 4, 5, 3))
    np.testing.assert_allclose(losses.l1_loss(tf.constant(a), tf.constant(b)), np.abs(a - b).mean((1, 2, 3)), rtol=1e-9)


@pytest.mark.parametrize("parts", [[6], [3, 3], [1, 2, 3], [5, 1]])
def test_shares_of_the_global_mean_add_up_however_the_batch_is_divided(parts: list[int]) -> None:
    values = tf.constant(RNG.normal(size=6))
    shares = [losses.global_mean(part, 6) for part in tf.split(values, parts)]
    np.testing.assert_allclose(sum(shares), np.mean(values), rtol=1e-12)
