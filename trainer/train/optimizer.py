"""Adam over already reduced gradients, with an update that can be withheld; the clock of a step; the average of weights.

Why not Keras's optimizer: it sums gradients over replicas by itself, clips each replica's gradient before the sum, takes one
pass over the weights for each term of the formula, and has no way to leave weights and moments alone when a gradient is not
finite.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from trainer.config import Config, OptimizerConfig

EPSILON = 1e-8  # the default of the paper's public code; Keras's is 1e-7


class Clock(NamedTuple):
    """All that a step takes from its number, worked out on the host in float64; the rest in the networks' float type.

    Attributes:
        step: uint32 scalar, from 0; the dropout masks hang on it.
        rate: the learning rate.
        power_1, power_2: the betas to the power of step + 1, for the corrections of the moments.
        ema_decay: how much of the averaged weights stays.
    """

    step: tf.Tensor
    rate: tf.Tensor
    power_1: tf.Tensor
    power_2: tf.Tensor
    ema_decay: tf.Tensor


def learning_rate(settings: OptimizerConfig, step: tf.Tensor, steps: int) -> tf.Tensor:
    """The learning rate of a step (int64, counted from 0) in a run of `steps`: float64.

    linear_decay is constant over the first half of the steps and then falls in a line that would reach 0 at `steps`.
    """
    rate = tf.constant(settings.learning_rate, tf.float64)
    if settings.schedule == "constant":
        return rate
    half = steps / 2
    return rate * tf.clip_by_value((steps - tf.cast(step, tf.float64)) / half, 0.0, 1.0)


def ema_decay(largest: float, step: tf.Tensor) -> tf.Tensor:
    """The decay of the average at a step (int64, from 0): float64; small at first, so that the initial weights are forgotten."""
    done = tf.cast(step, tf.float64) + 1
    return tf.minimum(tf.constant(largest, tf.float64), (1 + done) / (10 + done))


def read_clock(config: Config, step: tf.Tensor) -> Clock:
    """The clock of a step (int64, from 0)."""
    number = tf.cast(step, tf.float64) + 1
    betas = (config.optimizer.beta_1, config.optimizer.beta_2)
    powers = [tf.pow(tf.constant(beta, tf.float64), number) for beta in betas]
    rate = learning_rate(config.optimizer, step, config.train.steps)
    scalars = [rate, *powers, ema_decay(config.train.ema_decay, step)]
    return Clock(tf.cast(step, tf.uint32), *(tf.cast(scalar, keras.config.floatx()) for scalar in scalars))


class Adam:
    """Adam (Kingma and Ba 2014, the form with both corrections in the step size) in one fused pass over each variable.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- w - rate sqrt(1 - b2^t) / (1 - b1^t)  m / (sqrt(v) + epsilon)
    """

    def __init__(self, variables: Sequence[tf.Variable], settings: OptimizerConfig) -> None:
        """Make the moments, zero; call it where the variables were made (under the strategy's scope)."""
        self._variables = list(variables)
        self._beta_1, self._beta_2 = settings.beta_1, settings.beta_2
        self.first_moments = [self._zeros(variable) for variable in variables]
        self.second_moments = [self._zeros(variable) for variable in variables]

    def checkpoint(self) -> tf.train.Checkpoint:
        """What is saved: the moments, not the variables that they belong to."""
        return tf.train.Checkpoint(first_moments=self.first_moments, second_moments=self.second_moments)

    @staticmethod
    def _zeros(variable: tf.Variable) -> tf.Variable:
        return tf.Variable(tf.zeros(variable.shape, variable.dtype), trainable=False)

    def apply(self, gradients: Sequence[tf.Tensor], clock: Clock, allowed: tf.Tensor) -> None:
        """Update the variables in replica context.

        Args:
            gradients: one for each variable, already summed over replicas, so the same on each.
            clock: of this step.
            allowed: bool scalar; where false nothing changes at all.
        """
        scalars = (clock.rate, clock.power_1, clock.power_2, allowed)
        tf.distribute.get_replica_context().merge_call(self._update_all, args=(list(gradients), *scalars))

    def _update_all(self, strategy: tf.distribute.Strategy, gradients: list[Any], *scalars: Any) -> None:
        slots = zip(self._variables, self.first_moments, self.second_moments, gradients, strict=True)
        for variable, first, second, gradient in slots:
            strategy.extended.update(variable, self._update, args=(first, second, gradient, *scalars), group=False)

    def _update(
        self,
        variable: tf.Variable,
        first: tf.Variable,
        second: tf.Variable,
        gradient: tf.Tensor,
        rate: tf.Tensor,
        power_1: tf.Tensor,
        power_2: tf.Tensor,
        allowed: tf.Tensor,
    ) -> None:
        dtype = variable.dtype

        def update() -> None:
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=first.handle,
                v=second.handle,
                beta1_power=tf.cast(power_1, dtype),
                beta2_power=tf.cast(power_2, dtype),
                lr=tf.cast(rate, dtype),
                beta1=tf.constant(self._beta_1, dtype),
                beta2=tf.constant(self._beta_2, dtype),
                epsilon=tf.constant(EPSILON, dtype),
                grad=gradient,
            )

        tf.cond(allowed, update, lambda: None)


class Average:
    """A network whose weights follow those of another: a <- d a + (1 - d) w for what is trained, a copy of the rest."""

    def __init__(self, averaged: keras.Model, source: keras.Model) -> None:
        """Pair the weights of two networks of one kind."""
        both = zip(averaged.weights, source.weights, strict=True)
        self._pairs = [(mine.value, other.value, other.trainable) for mine, other in both]

    def follow(self, decay: tf.Tensor, allowed: tf.Tensor) -> None:
        """Take the newest weights in, in replica context, after all replicas hold the same; not where `allowed` is false."""
        tf.distribute.get_replica_context().merge_call(self._update_all, args=(decay, allowed))

    def _update_all(self, strategy: tf.distribute.Strategy, decay: Any, allowed: Any) -> None:
        for mine, other, trained in self._pairs:
            update = self._approach if trained else self._copy
            strategy.extended.update(mine, update, args=(other, decay, allowed), group=False)

    @staticmethod
    def _approach(mine: tf.Variable, other: tf.Variable, decay: tf.Tensor, allowed: tf.Tensor) -> None:
        moved = mine + (1 - tf.cast(decay, mine.dtype)) * (other - mine)
        mine.assign(tf.where(allowed, moved, mine))

    @staticmethod
    def _copy(mine: tf.Variable, other: tf.Variable, decay: tf.Tensor, allowed: tf.Tensor) -> None:
        mine.assign(tf.where(allowed, other, mine))
