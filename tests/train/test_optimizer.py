import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.config import Config, OptimizerConfig
from trainer.train.optimizer import Adam, learning_rate, read_clock

RNG = np.random.default_rng(1)
START = RNG.normal(size=(7, 3))
GRADIENTS = [RNG.normal(size=(7, 3)) * 10.0 ** RNG.integers(-9, 3, (7, 3)) for _ in range(6)]
SETTINGS = OptimizerConfig(learning_rate=0.01)

pytestmark = pytest.mark.usefixtures("float64")


def apply(optimizer: Adam, gradient: np.ndarray, number: int, allowed: bool = True) -> None:
    clock = read_clock(Config(optimizer=SETTINGS), tf.constant(number - 1, tf.int64))
    optimizer.apply([tf.constant(gradient)], clock, tf.constant(allowed))


def reference(steps: int) -> np.ndarray:
    """Adam in NumPy from the formula, float64."""
    w, m, v = START.copy(), np.zeros_like(START), np.zeros_like(START)
    for t, g in enumerate(GRADIENTS[:steps], 1):
        m, v = 0.5 * m + 0.5 * g, 0.999 * v + 0.001 * g**2
        w -= 0.01 * np.sqrt(1 - 0.999**t) / (1 - 0.5**t) * m / (np.sqrt(v) + 1e-8)
    return w


def test_adam_is_its_formula() -> None:
    variable = tf.Variable(START)
    optimizer = Adam([variable], SETTINGS)
    for number, gradient in enumerate(GRADIENTS, 1):
        apply(optimizer, gradient, number)
        np.testing.assert_allclose(variable, reference(number), rtol=1e-12)


def test_adam_agrees_with_keras() -> None:
    variable = keras.Variable(START, dtype="float64")
    theirs = keras.optimizers.Adam(0.01, beta_1=0.5, beta_2=0.999, epsilon=1e-8)
    for gradient in GRADIENTS:
        theirs.apply([tf.constant(gradient)], [variable])
    np.testing.assert_allclose(variable.numpy(), reference(len(GRADIENTS)), atol=1e-6)  # its rate is float32


@pytest.mark.parametrize("gradient", [np.full((7, 3), np.nan), np.full((7, 3), np.inf), np.ones((7, 3))])
def test_a_withheld_update_changes_neither_weights_nor_moments(gradient: np.ndarray) -> None:
    variable = tf.Variable(START)
    optimizer = Adam([variable], SETTINGS)
    apply(optimizer, GRADIENTS[0], 1)
    before = [t.numpy() for t in (variable, *optimizer.first_moments, *optimizer.second_moments)]
    apply(optimizer, gradient, 2, allowed=False)
    for old, new in zip(before, (variable, *optimizer.first_moments, *optimizer.second_moments), strict=True):
        np.testing.assert_array_equal(old, new)


def test_constant_schedule_never_falls() -> None:
    assert float(learning_rate(OptimizerConfig(), tf.constant(79_999, tf.int64), 80_000)) == 2e-4


@pytest.mark.parametrize(("step", "share"), [(0, 1.0), (500, 1.0), (750, 0.5), (999, 0.002), (1000, 0.0)])
def test_linear_decay_is_flat_for_half_and_then_falls_to_zero(step: int, share: float) -> None:
    settings = OptimizerConfig(schedule="linear_decay")
    rate = float(learning_rate(settings, tf.constant(step, tf.int64), 1000))
    np.testing.assert_allclose(rate, 2e-4 * share, atol=1e-12)
