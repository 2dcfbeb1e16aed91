import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.config import Config, OptimizerConfig, TrainConfig
from trainer.train.optimizer import Adam, ema_decay, learning_rate, read_clock

RNG = np.random.default_rng(1)
START = RNG.normal(size=(7, 3))
GRADIENTS = [RNG.normal(size=(7, 3)) * 10.0 ** RNG.integers(-9, 3, (7, 3)) for _ in range(6)]
SETTINGS = OptimizerConfig(learning_rate=0.01)

pytestmark = pytest.mark.usefixtures("float64")


def apply(
    optimizer: Adam, gradient: np.ndarray, number: int, *, allowed: bool = True, settings: OptimizerConfig = SETTINGS
) -> None:
    clock = read_clock(Config(optimizer=settings), tf.constant(number - 1, tf.int64))
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


def test_adam_takes_the_steps_of_keras() -> None:
    """With settings that float32, in which Keras keeps them, holds exactly; no difference at all was measured."""
    settings = OptimizerConfig(learning_rate=2**-7, beta_1=0.75, beta_2=1 - 2**-10)
    ours, theirs = tf.Variable(START), keras.Variable(START, dtype="float64")
    adam = Adam([ours], settings)
    other = keras.optimizers.Adam(2**-7, beta_1=0.75, beta_2=1 - 2**-10, epsilon=1e-8)
    for number, gradient in enumerate(GRADIENTS, 1):
        apply(adam, gradient, number, settings=settings)
        other.apply([tf.constant(gradient)], [theirs])
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=0, atol=1e-15)


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


@pytest.mark.parametrize(
    ("largest", "step", "decay"),
    [(0.999, 0, 2 / 11), (0.999, 89, 91 / 100), (0.999, 99_999, 0.999), (0.25, 0, 2 / 11), (0.25, 3, 0.25)],
)
def test_decay_of_the_average_rises_to_what_the_config_says(largest: float, step: int, decay: float) -> None:
    assert float(ema_decay(largest, tf.constant(step, tf.int64))) == pytest.approx(decay, rel=1e-12)


@pytest.mark.parametrize("step", [0, 19, 30, 39])
def test_the_clock_of_a_step_is_worked_out_from_the_config(step: int) -> None:
    """All that hangs on the number of the step, each from another setting."""
    config = Config(
        optimizer=OptimizerConfig(learning_rate=0.003, beta_1=0.4, beta_2=0.99, schedule="linear_decay"),
        train=TrainConfig(steps=40, ema_decay=0.3),
    )
    clock = read_clock(config, tf.constant(step, tf.int64))
    expected = {
        "step": step,
        "rate": 0.003 * min(1, (40 - step) / 20),
        "power_1": 0.4 ** (step + 1),
        "power_2": 0.99 ** (step + 1),
        "ema_decay": min(0.3, (step + 2) / (step + 11)),
    }
    assert {name: float(value) for name, value in clock._asdict().items()} == pytest.approx(expected, rel=1e-12)
