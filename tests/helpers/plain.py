"""The paper's step spelled out with two tapes and a formula, as a reference for the package's."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

Examples = tuple[tf.Tensor, tf.Tensor, tf.Tensor]


def cross_entropy(logits: tf.Tensor, label: float) -> tf.Tensor:
    """The mean over everything, by Keras."""
    return tf.reduce_mean(keras.ops.binary_crossentropy(tf.fill(logits.shape, tf.cast(label, logits.dtype)), logits, True))


def discriminator_loss(d: keras.Model, g: keras.Model, x: tf.Tensor, y: tf.Tensor, keys: tf.Tensor) -> tf.Tensor:
    """Real pairs against ones, drawn ones against zeros, halved."""
    real, drawn = d([x, y], training=True), d([x, g([x, keys], training=True)], training=True)
    return (cross_entropy(real, 1.0) + cross_entropy(drawn, 0.0)) / 2


def generator_losses(d: keras.Model, g: keras.Model, x: tf.Tensor, y: tf.Tensor, keys: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """What D says of the drawing against ones; L1."""
    drawn = g([x, keys], training=True)
    return cross_entropy(d([x, drawn], training=True), 1.0), tf.reduce_mean(tf.abs(y - drawn))


def gradients_of_discriminator(d: keras.Model, g: keras.Model, parts: Sequence[Examples]) -> tuple[tf.Tensor, list[Any]]:
    """D's loss, the mean over equal parts of the batch which the networks see one at a time, and its gradients."""
    with tf.GradientTape() as tape:
        loss = sum(discriminator_loss(d, g, *part) for part in parts) / len(parts)
    return loss, tape.gradient(loss, [variable.value for variable in d.trainable_variables])


def gradients_of_generator(d: keras.Model, g: keras.Model, parts: Sequence[Examples]) -> tuple[list[tf.Tensor], list[Any]]:
    """G's two losses and the gradients of their sum, L1 a hundredfold."""
    with tf.GradientTape() as tape:
        each = [generator_losses(d, g, *part) for part in parts]
        gan, l1 = (sum(losses) / len(parts) for losses in zip(*each, strict=True))
        loss = gan + 100 * l1
    return [gan, l1], tape.gradient(loss, [variable.value for variable in g.trainable_variables])


class PlainAdam:
    """Adam from its formula, in NumPy."""

    def __init__(self, variables: Sequence[keras.Variable]) -> None:
        self._variables = variables
        self._first, self._second = ([np.zeros(variable.shape) for variable in variables] for _ in range(2))
        self._steps = 0

    def apply(self, gradients: Sequence[tf.Tensor], rate: float) -> None:
        """One step with the paper's betas."""
        self._steps += 1
        correction = np.sqrt(1 - 0.999**self._steps) / (1 - 0.5**self._steps)
        for m, v, variable, gradient in zip(self._first, self._second, self._variables, gradients, strict=True):
            m[...] = 0.5 * m + 0.5 * gradient.numpy()
            v[...] = 0.999 * v + 0.001 * gradient.numpy() ** 2
            variable.assign(variable.numpy() - rate * correction * m / (np.sqrt(v) + 1e-8))


class PlainStep:
    """D's step, then a fresh drawing, then G's step against the updated D: the paper's order."""

    def __init__(self, generator: keras.Model, discriminator: keras.Model) -> None:
        self.g, self.d = generator, discriminator
        self._by_d, self._by_g = PlainAdam(discriminator.trainable_variables), PlainAdam(generator.trainable_variables)

    def take(self, x: tf.Tensor, y: tf.Tensor, keys: tf.Tensor, rate: float = 2e-4) -> list[float]:
        """The losses of one step: D's, G's of D's judgement, L1 on the scale of 0 to 255."""
        loss, gradients = gradients_of_discriminator(self.d, self.g, [(x, y, keys)])
        self._by_d.apply(gradients, rate)
        (gan, l1), gradients = gradients_of_generator(self.d, self.g, [(x, y, keys)])
        self._by_g.apply(gradients, rate)
        return [float(loss), float(gan), float(l1) * 127.5]
