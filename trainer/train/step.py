"""The training step: a batch -> losses -> gradients -> update, for one replica and one step.

First one step of the discriminator, then one of the generator, which is judged by the updated discriminator (paper,
section 3.3). The generator draws once: its gradient is the chain rule cut at the generated image.

Every loss is this replica's share of the mean over the global batch (losses.global_mean), so the gradients are added up over
replicas, never averaged, and only then looked at, clipped and applied: any number of replicas takes the same step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from trainer.config import Config
from trainer.model import losses
from trainer.model.layers import example_keys
from trainer.train.optimizer import Adam, Clock
from trainer.train.state import LOSSES, TrainState, trainable

LEVELS_PER_UNIT = 127.5  # of the 0 to 255 scale, in which L1 is reported


class StepResult(NamedTuple):
    """What a step tells, the same on every replica: losses (means over the global batch), was all finite, should it stop."""

    losses: dict[str, tf.Tensor]
    finite: tf.Tensor
    stop: tf.Tensor


class Pairs(NamedTuple):
    """Some examples: input and target (examples, height, width, channels) in [-1, 1], dropout keys uint32 (examples,)."""

    input: tf.Tensor
    target: tf.Tensor
    keys: tf.Tensor


class Drawing(NamedTuple):
    """A generated image, and the tape that knows how it was drawn."""

    image: tf.Tensor
    tape: tf.GradientTape


def all_finite(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """True if no element of any tensor is infinite or not a number: bool scalar."""
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tensors])


def sum_over_replicas(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Add up each tensor over all replicas; every replica gets the sum."""
    return list(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, list(tensors)))


def train_step(state: TrainState, config: Config, batch: Mapping[str, tf.Tensor], clock: Clock, stop: tf.Tensor) -> StepResult:
    """Run one step in replica context on this replica's part of the global batch.

    Args:
        state: networks and optimisers; updated in place unless something was not finite.
        config: the run's config.
        batch: `input` and `target` (examples, height, width, channels) in [-1, 1], `index` uint32 (examples,).
        clock: of this step.
        stop: bool scalar, whether this worker was asked to stop; the result says whether any was.
    """
    source, target = (tf.cast(batch[side], keras.config.floatx()) for side in ("input", "target"))
    pairs = Pairs(source, target, example_keys(config.seed, clock.step, batch["index"]))
    parts = config.train.microbatches
    drawing = draw(state, config, pairs) if parts == 1 else None
    before = [] if drawing else statistics(state.generator)

    def drawn(part: Pairs) -> Drawing:
        """The one drawing; in microbatches it is drawn again for the generator's turn, for its tape would fill the memory."""
        return drawing or draw(state, config, part)

    by_discriminator = in_parts(
        parts,
        pairs,
        lambda part: discriminator_pass(state, config, part, drawn(part).image),
        [None, *trainable(state.discriminator)],
    )
    finite = update(state.discriminator_optimizer, by_discriminator[1:], by_discriminator[:1], config, clock, tf.constant(True))
    for variable, value in before:  # the second drawing counts, not both
        variable.assign(value)
    by_generator = in_parts(
        parts, pairs, lambda part: generator_pass(state, config, part, drawn(part)), [None, None, *trainable(state.generator)]
    )
    objective = by_generator[0] + config.loss.reconstruction_weight * by_generator[1]
    finite = update(state.generator_optimizer, by_generator[2:], [objective], config, clock, finite)
    average_statistics(state)
    if state.average:
        state.average.follow(clock.ema_decay, finite)
    return agree([by_discriminator[0], *by_generator[:2]], finite, stop)


def draw(state: TrainState, config: Config, pairs: Pairs) -> Drawing:
    """Draw the targets of some inputs, dropout on."""
    network = compiled(config, lambda image, keys: state.generator([image, keys], training=True))
    with tf.GradientTape() as tape:
        image = network(pairs.input, pairs.keys)
    return Drawing(image, tape)


def discriminator_pass(state: TrainState, config: Config, pairs: Pairs, generated: tf.Tensor) -> list[tf.Tensor]:
    """D's loss on real pairs against ones and generated ones against zeros, and its gradients."""

    def passes(source: tf.Tensor, target: tf.Tensor, image: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            real_logits = state.discriminator([source, target], training=True)
            generated_logits = state.discriminator([source, tf.stop_gradient(image)], training=True)
            per_example = losses.discriminator_loss(real_logits, generated_logits, config.loss.discriminator_weight)
            loss = losses.global_mean(per_example, config.train.batch_size)
        return [loss, *tape.gradient(loss, trainable(state.discriminator))]

    return list(compiled(config, passes)(pairs.input, pairs.target, generated))


def generator_pass(state: TrainState, config: Config, pairs: Pairs, drawing: Drawing) -> list[tf.Tensor]:
    """G's two losses, what the updated D says of its image and L1, and the gradients of their weighted sum."""

    def judge(source: tf.Tensor, target: tf.Tensor, image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(image)
            logits = state.discriminator([source, image], training=True)
            gan = losses.global_mean(losses.generator_gan_loss(logits), config.train.batch_size)
            l1 = losses.global_mean(losses.l1_loss(target, image), config.train.batch_size)
            loss = gan + config.loss.reconstruction_weight * l1
        return gan, l1, tape.gradient(loss, image)

    gan, l1, by_image = compiled(config, judge)(pairs.input, pairs.target, drawing.image)
    gradients = drawing.tape.gradient(drawing.image, trainable(state.generator), output_gradients=by_image)
    return [gan, l1, *gradients]


def compiled(config: Config, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled by XLA if the config says so. Made anew for each replica, whose own variables it captures."""
    if not config.runtime.jit:
        return function
    jitted: Callable[..., Any] = tf.function(function, jit_compile=True, autograph=False)
    return jitted


def in_parts(
    count: int, pairs: Pairs, work: Callable[[Pairs], list[tf.Tensor]], like: Sequence[tf.Variable | None]
) -> list[tf.Tensor]:
    """The sum of what `work` gives for `count` equal parts of the examples, one part after the other.

    Args:
        count: how many parts; 1 calls `work` once.
        pairs: their number is a multiple of count.
        work: gives tensors of the shapes of `like`.
        like: variables, or None for a scalar.
    """
    if count == 1:
        return work(pairs)
    dtype = pairs.input.dtype
    parts = Pairs(*(tf.reshape(tensor, [count, tensor.shape[0] // count, *tensor.shape[1:]]) for tensor in pairs))
    zeros = [tf.zeros([], dtype) if variable is None else tf.zeros(variable.shape, variable.dtype) for variable in like]

    def body(number: tf.Tensor, sums: list[tf.Tensor]) -> tuple[tf.Tensor, list[tf.Tensor]]:
        values = work(Pairs(*(tensor[number] for tensor in parts)))
        return number + 1, [total + value for total, value in zip(sums, values, strict=True)]

    loop = tf.while_loop(lambda number, _: number < count, body, (tf.constant(0), zeros), parallel_iterations=1)
    return list(loop[1])


def update(
    optimizer: Adam,
    gradients: Sequence[tf.Tensor],
    terms: Sequence[tf.Tensor],
    config: Config,
    clock: Clock,
    allowed: tf.Tensor,
) -> tf.Tensor:
    """Add the gradients up over replicas and apply them, unless one, or a term of the loss, is not finite; say whether."""
    reduced = sum_over_replicas([*gradients, *terms])
    summed = reduced[: len(gradients)]
    norm = tf.linalg.global_norm(summed)  # finite only if every element is, and its square, which Adam takes
    finite = allowed & all_finite([norm, *reduced[len(gradients) :]])
    if config.optimizer.clip_norm:
        summed, _ = tf.clip_by_global_norm(summed, config.optimizer.clip_norm, use_norm=norm)
    optimizer.apply(summed, clock, finite)
    return finite


def statistics(network: Any) -> list[tuple[tf.Variable, tf.Tensor]]:
    """The moving statistics of a network's norms on this replica, and their values now."""
    return [(variable.value, tf.identity(variable.value)) for variable in network.non_trainable_variables]


def average_statistics(state: TrainState) -> None:
    """Give every replica the mean of all replicas' moving statistics, so that it does not matter whose are saved."""
    replicas = tf.distribute.get_replica_context().num_replicas_in_sync
    own = [*statistics(state.generator), *statistics(state.discriminator)]
    if replicas > 1 and own:
        for (variable, _), total in zip(own, sum_over_replicas([value for _, value in own]), strict=True):
            variable.assign(total / replicas)


def agree(shares: Sequence[tf.Tensor], finite: tf.Tensor, stop: tf.Tensor) -> StepResult:
    """One sum over all replicas: the losses' means, whether the step was finite everywhere, whether any worker must stop."""
    discriminator, gan, l1 = shares
    flags = [tf.cast(flag, l1.dtype) for flag in (~finite, stop)]
    total = sum_over_replicas([tf.stack([discriminator, gan, l1 * LEVELS_PER_UNIT, *flags])])[0]
    means = dict(zip(LOSSES, tf.unstack(total[:3]), strict=True))
    return StepResult(means, total[3] == 0, total[4] > 0)
