"""How good the pictures are: L1, PSNR and SSIM on a split, and the fixed sample grid."""

from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.config import Config
from trainer.data.pairs import from_unit_range, maximum
from trainer.data.pipeline import PairData, Split
from trainer.model.generators import translate

EVALUATION_BATCH = 4
SAMPLE_PAIRS = 4
IDENTICAL_PSNR = 100.0  # decibels; stands for infinity, which JSON does not have


class InterruptedEvaluation(Exception):  # noqa: N818 - not a failure
    """A stop was asked for in the middle of an evaluation; nothing of it is kept."""


class Scores(NamedTuple):
    """One value for each image, float (images,).

    Attributes:
        l1: mean absolute difference, on the 0 to 255 scale whatever the bit depth.
        psnr: peak signal-to-noise ratio in decibels, 100 for equal images.
        ssim: structural similarity (Wang et al. 2004: Gaussian window of 11, sigma 1.5), mean over channels; at most 1.
    """

    l1: tf.Tensor
    psnr: tf.Tensor
    ssim: tf.Tensor


def score(output: tf.Tensor, target: tf.Tensor) -> Scores:
    """Compare images (batch, height, width, channels) on the 0 to 255 scale."""
    output, target = tf.cast(output, tf.float32), tf.cast(target, tf.float32)
    squared = tf.reduce_mean(tf.math.squared_difference(output, target), axis=[1, 2, 3])
    psnr = 10.0 / tf.math.log(10.0) * tf.math.log(255.0**2 / squared)
    return Scores(
        l1=tf.reduce_mean(tf.abs(output - target), axis=[1, 2, 3]),
        psnr=tf.minimum(psnr, IDENTICAL_PSNR),
        ssim=tf.image.ssim(output, target, max_val=255.0),
    )


class Evaluator:
    """Measures a generator in its inference mode, on the pictures as they would be written to files."""

    def __init__(self, generator: keras.Model, data: PairData, config: Config) -> None:
        self._generator = generator
        self._data = data
        self._seed = config.seed
        self._spec = data.specs.target
        self._scores = tf.function(self._score_batch, reduce_retracing=True)
        self._draw = tf.function(lambda images: translate(generator, images, config.seed), reduce_retracing=True)

    def _levels(self, image: tf.Tensor) -> tf.Tensor:
        """[-1, 1] to the levels of the data's bit depth, then to the 0 to 255 scale."""
        return from_unit_range(image, self._spec.bit_depth) * (255.0 / maximum(self._spec))

    def _score_batch(self, images: tf.Tensor, target: tf.Tensor) -> Scores:
        return score(self._levels(translate(self._generator, images, self._seed)), self._levels(target))

    def measure(self, split: Split, interrupted: Callable[[], bool]) -> dict[str, float | int]:
        """Mean of each score over a split, each image weighing the same: {"images": n, "l1": ..., "psnr": ..., "ssim": ...}.

        Raises:
            InterruptedEvaluation: `interrupted()` became true.
            DataError: a record is damaged.
        """
        columns: list[list[NDArray[np.float32]]] = [[] for _ in Scores._fields]
        with self._data.naming_damage(split, lambda: range(split.examples)):
            for batch in self._data.evaluation_batches(split, EVALUATION_BATCH):
                if interrupted():
                    raise InterruptedEvaluation
                for column, values in zip(columns, self._scores(batch["input"], batch["target"]), strict=True):
                    column.append(values.numpy())
        means = {
            name: round(float(np.concatenate(column).mean(dtype=np.float64)), 6)
            for name, column in zip(Scores._fields, columns, strict=True)
        }
        return {"images": split.examples, **means}

    def sample_columns(self) -> list[tuple[str, NDArray[np.uint8]]]:
        """Input, target and output of the first few validation pairs (of training, if there is no val), uint8."""
        split = self._data.split("val")
        split = split if split.examples else self._data.train
        with self._data.naming_damage(split, lambda: range(min(SAMPLE_PAIRS, split.examples))):
            batch = next(iter(self._data.evaluation_batches(split, SAMPLE_PAIRS, SAMPLE_PAIRS)))
        images = {"input": batch["input"], "target": batch["target"], "output": self._draw(batch["input"])}
        return [(name, from_unit_range(image).numpy().astype(np.uint8)) for name, image in images.items()]
