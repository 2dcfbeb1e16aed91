"""The training step: a batch -> losses -> gradients -> update, for one replica and one step.

First one step of the discriminator, then one of the generator, which is judged by the updated discriminator (paper,
section 3.3). The generator draws once: its gradient is the chain rule cut at the generated image.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf

from trainer.config import Config
from trainer.model import losses
from trainer.model.layers import example_keys
from trainer.train.optimizer import learning_rate
from trainer.train.state import TrainState, trainable

LEVELS_PER_UNIT = 127.5  # of the 0 to 255 scale, in which L1 is reported


class StepResult(NamedTuple):
    """What a step tells: the losses, means over the global batch, and whether all was finite, the same on every replica."""

    losses: dict[str, tf.Tensor]
    finite: tf.Tensor


def all_finite(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """True if no element of any tensor is infinite or not a number: bool scalar."""
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tensors])


def sum_over_replicas(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Add up each tensor over all replicas; every replica gets the sum."""
    return list(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, list(tensors)))


def train_step(state: TrainState, config: Config, batch: Mapping[str, tf.Tensor]) -> StepResult:
    """Run one step in replica context on this replica's part of the global batch.

    Args:
        state: networks and optimisers; updated in place unless something was not finite.
        config: the run's config.
        batch: `input` and `target` (examples, height, width, channels) in [-1, 1], `index` uint32 (examples,).
    """
    rate = learning_rate(config.optimizer, state.step, config.train.steps)
    keys = example_keys(config.seed, state.step, batch["index"])
    with tf.GradientTape() as drawing:
        generated = state.generator([batch["input"], keys], training=True)
    discriminator_loss, sound = discriminator_step(state, config, batch, generated, rate)
    gan, l1, finite = generator_step(state, config, batch, generated, drawing, rate, sound)
    names = ("discriminator", "generator_gan", "l1")
    means = sum_over_replicas([discriminator_loss, gan, l1 * LEVELS_PER_UNIT])
    return StepResult(dict(zip(names, means, strict=True)), finite)


def discriminator_step(
    state: TrainState, config: Config, batch: Mapping[str, tf.Tensor], generated: tf.Tensor, rate: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Update D on real pairs against ones and generated against zeros; return its loss and whether it was sound."""
    weights = trainable(state.discriminator)
    with tf.GradientTape() as tape:
        real_logits = state.discriminator([batch["input"], batch["target"]], training=True)
        generated_logits = state.discriminator([batch["input"], tf.stop_gradient(generated)], training=True)
        per_example = losses.discriminator_loss(real_logits, generated_logits, config.loss.discriminator_weight)
        loss = losses.global_mean(per_example, config.train.batch_size)
    gradients = sum_over_replicas(tape.gradient(loss, weights))
    sound = all_finite([*gradients, *sum_over_replicas([loss])])
    state.discriminator_optimizer.apply(gradients, rate, state.step + 1, sound)
    return loss, sound


def generator_step(
    state: TrainState,
    config: Config,
    batch: Mapping[str, tf.Tensor],
    generated: tf.Tensor,
    drawing: tf.GradientTape,
    rate: tf.Tensor,
    sound: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Update G by what the updated D says of its picture and by L1; return both terms and whether all was finite."""
    weights = trainable(state.generator)
    with tf.GradientTape(watch_accessed_variables=False) as judging:
        judging.watch(generated)
        logits = state.discriminator([batch["input"], generated], training=True)
        gan = losses.global_mean(losses.generator_gan_loss(logits), config.train.batch_size)
        l1 = losses.global_mean(losses.l1_loss(batch["target"], generated), config.train.batch_size)
        loss = gan + config.loss.reconstruction_weight * l1
    by_picture = judging.gradient(loss, generated)
    gradients = sum_over_replicas(drawing.gradient(generated, weights, output_gradients=by_picture))
    finite = sound & all_finite([*gradients, *sum_over_replicas([loss])])
    state.generator_optimizer.apply(gradients, rate, state.step + 1, finite)
    return gan, l1, finite
