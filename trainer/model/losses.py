"""The losses: pure functions of logits or images that give one value for each example, and the one global mean."""

import tensorflow as tf


def _mean_over_example(values: tf.Tensor) -> tf.Tensor:
    return tf.reduce_mean(values, axis=list(range(1, values.shape.rank)))


def cross_entropy(logits: tf.Tensor, label: float) -> tf.Tensor:
    """Sigmoid cross entropy against one label for all patches, the mean over an example's patches: (batch,).

    -label log s(x) - (1 - label) log(1 - s(x)) with s the sigmoid (paper, equation 1, a mean for each patch's verdict).
    """
    labels = tf.fill(tf.shape(logits), tf.cast(label, logits.dtype))
    return _mean_over_example(tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits))


def discriminator_loss(real_logits: tf.Tensor, generated_logits: tf.Tensor, weight: float) -> tf.Tensor:
    """weight (CE(D(x, y), 1) + CE(D(x, G(x)), 0)) for each example; the paper halves it: weight 0.5 (section 3.3)."""
    return weight * (cross_entropy(real_logits, 1.0) + cross_entropy(generated_logits, 0.0))


def generator_gan_loss(generated_logits: tf.Tensor) -> tf.Tensor:
    """CE(D(x, G(x)), 1) for each example: non-saturating, G maximises log D (section 3.3)."""
    return cross_entropy(generated_logits, 1.0)


def l1_loss(target: tf.Tensor, generated: tf.Tensor) -> tf.Tensor:
    """Mean absolute difference over an example's pixels and channels, in units of [-1, 1] (paper, equation 3)."""
    return _mean_over_example(tf.abs(target - generated))


def global_mean(per_example: tf.Tensor, global_batch_size: int) -> tf.Tensor:
    """This replica's share of the mean over the global batch: the sum over its examples / the global batch size.

    The shares of all replicas add up to the mean, however the batch was divided; a mean of means would not.
    """
    return tf.reduce_sum(per_example) / tf.cast(global_batch_size, per_example.dtype)
