"""Everything that a checkpoint holds: both networks, both optimisers, the step, the running sums of the losses."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import keras
import tensorflow as tf

from trainer.config import Config
from trainer.data.pipeline import Specs
from trainer.errors import TrainerError
from trainer.model.discriminators import patchgan
from trainer.model.generators import unet
from trainer.train.optimizer import Adam, Average

LOSSES = ("discriminator", "generator_gan", "l1")


def trainable(network: keras.Model) -> list[tf.Variable]:
    """The TensorFlow variables behind a network's trainable weights, in the order of its layers."""
    return [variable.value for variable in network.trainable_variables]


def build_generator(config: Config, specs: Specs) -> keras.Model:
    """The generator as the config says, its weights drawn from the seed."""
    return unet(config.model, config.data.image_size, specs.input.channels, specs.target.channels, config.seed)


def build_networks(config: Config, specs: Specs) -> tuple[keras.Model, keras.Model]:
    """Generator and discriminator as the config says, their weights drawn from the seed."""
    channels = (specs.input.channels, specs.target.channels)
    return build_generator(config, specs), patchgan(config.model, config.data.image_size, *channels, config.seed)


class TrainState:
    """The state of a run: networks and optimisers on every replica, counters on each worker's host.

    Attributes:
        generator, discriminator: the networks.
        averaged: the generator whose weights are the moving average, or None without train.ema_decay.
        step: int64 variable, the steps done.
        latest: float64 (3,) variable, the losses of the newest step, finite or not.
        healthy: bool variable, false once a loss or gradient was not finite.
        waited: float64 variable, seconds that this worker's devices waited for input in this process; not saved.
    """

    def __init__(self, config: Config, specs: Specs, strategy: tf.distribute.Strategy | None = None) -> None:
        """Make everything; call it outside the strategy's scope, where the counters are to be."""
        with (strategy or tf.distribute.get_strategy()).scope():
            self.generator, self.discriminator = build_networks(config, specs)
            self.generator_optimizer = Adam(trainable(self.generator), config.optimizer)
            self.discriminator_optimizer = Adam(trainable(self.discriminator), config.optimizer)
            self.averaged = build_generator(config, specs) if config.train.ema_decay else None
        self.average = Average(self.averaged, self.generator) if self.averaged else None
        self.step = self._counter(0, tf.int64)
        self.healthy = self._counter(True, tf.bool)
        self.waited = self._counter(0.0, tf.float64)
        self.latest = self._counter([0.0] * len(LOSSES), tf.float64)
        self._sums = self._counter([0.0] * len(LOSSES), tf.float64)
        self._count = self._counter(0, tf.int64)

    @staticmethod
    def _counter(value: object, dtype: tf.DType) -> tf.Variable:
        """A variable on the host: the loop over steps runs there, and a TPU has no float64."""
        with tf.device("/cpu:0"):
            return tf.Variable(value, trainable=False, dtype=dtype)

    @property
    def drawer(self) -> keras.Model:
        """The generator that is measured and used: the averaged one if there is one."""
        return self.averaged or self.generator

    def checkpoint(self) -> tf.train.Checkpoint:
        """The objects that are saved and restored; the sums are among them, so that resumed summaries are the same."""
        averaged = {"averaged": self.averaged} if self.averaged else {}
        return tf.train.Checkpoint(
            **averaged,
            generator=self.generator,
            discriminator=self.discriminator,
            generator_optimizer=self.generator_optimizer.checkpoint(),
            discriminator_optimizer=self.discriminator_optimizer.checkpoint(),
            step=self.step,
            loss_sums=self._sums,
            loss_count=self._count,
        )

    def record(self, losses: Mapping[str, tf.Tensor], finite: tf.Tensor) -> None:
        """Note a step's losses (global means); the step counts only if it was finite. Runs inside the graph."""
        values = tf.stack([tf.cast(losses[name], tf.float64) for name in LOSSES])
        self.latest.assign(values)
        self.healthy.assign(finite)
        done = tf.cast(finite, tf.int64)
        self._sums.assign_add(tf.where(finite, values, tf.zeros_like(values)))
        self._count.assign_add(done)
        self.step.assign_add(done)

    def mean_losses(self) -> dict[str, float]:
        """Mean of each loss over the steps since the last reset; empty before the first step."""
        count = int(self._count.numpy())
        return dict(zip(LOSSES, (self._sums.numpy() / count).tolist(), strict=True)) if count else {}

    def latest_losses(self) -> dict[str, float]:
        """Each loss of the newest step, finite or not."""
        return dict(zip(LOSSES, self.latest.numpy().tolist(), strict=True))

    @contextmanager
    def keeping_sums(self) -> Iterator[None]:
        """Put the sums of the losses back if what is done with them fails."""
        sums, count = self._sums.numpy(), int(self._count.numpy())
        try:
            yield
        except TrainerError:
            self._sums.assign(sums)
            self._count.assign(count)
            raise

    def reset_losses(self) -> None:
        """Begin new means."""
        self._sums.assign(tf.zeros_like(self._sums))
        self._count.assign(0)
