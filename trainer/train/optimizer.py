"""Adam over already reduced gradients, with an update that can be withheld, and the learning-rate schedules.

Why not Keras's optimizer: it sums gradients over replicas by itself, takes one pass over the weights for each term of the
formula, and has no way to leave weights and moments alone when a gradient is not finite.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from trainer.config import OptimizerConfig

EPSILON = 1e-8  # the default of the paper's public code; Keras's is 1e-7


def learning_rate(settings: OptimizerConfig, step: tf.Tensor, steps: int) -> tf.Tensor:
    """The learning rate of a step (int64, counted from 0) in a run of `steps`: float64.

    linear_decay is constant over the first half of the steps and then falls in a line that would reach 0 at `steps`.
    """
    rate = tf.constant(settings.learning_rate, tf.float64)
    if settings.schedule == "constant":
        return rate
    half = steps / 2
    return rate * tf.clip_by_value((steps - tf.cast(step, tf.float64)) / half, 0.0, 1.0)


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

    def apply(self, gradients: Sequence[tf.Tensor], rate: tf.Tensor, number: tf.Tensor, allowed: tf.Tensor) -> None:
        """Update the variables in replica context.

        Args:
            gradients: one for each variable, already summed over replicas, so the same on each.
            rate: learning rate, a float64 scalar.
            number: which update this is, int64, from 1.
            allowed: bool scalar; where false nothing changes at all.
        """
        powers = [tf.pow(tf.constant(beta, tf.float64), tf.cast(number, tf.float64)) for beta in (self._beta_1, self._beta_2)]
        context = tf.distribute.get_replica_context()
        context.merge_call(self._update_all, args=(list(gradients), rate, *powers, allowed))

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
