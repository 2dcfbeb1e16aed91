"""How good the pictures are: L1, PSNR and SSIM on a split, and the fixed sample grid."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.config import Config
from trainer.data.pairs import from_unit_range, maximum
from trainer.data.pipeline import PairData, elements
from trainer.data.split import Split
from trainer.model.generators import translate
from trainer.runtime.workers import Alone, Workers

EVALUATION_BATCH = 4
SAMPLE_PAIRS = 4
MULTISCALE_SIDE = 176
IDENTICAL_PSNR = 100.0  # decibels; stands for infinity, which JSON does not have

PerImage = dict[str, NDArray[np.float64]]


class InterruptedEvaluation(Exception):  # noqa: N818 - not a failure
    """A stop was asked for in the middle of an evaluation; nothing of it is kept."""


def score(output: tf.Tensor, target: tf.Tensor, *, multiscale: bool = False) -> dict[str, tf.Tensor]:
    """Compare images (batch, height, width, channels) on the 0 to 255 scale; each score is float32 (batch,).

    l1: mean absolute difference. psnr: peak signal-to-noise ratio in decibels, 100 for equal images. ssim: structural
    similarity (Wang et al. 2004: Gaussian window of 11, sigma 1.5), mean over channels, at most 1. ms_ssim, if asked for and
    both sides are 176 pixels or more: SSIM over five scales (Wang, Simoncelli and Bovik 2003).
    """
    output, target = tf.cast(output, tf.float32), tf.cast(target, tf.float32)
    squared = tf.reduce_mean(tf.math.squared_difference(output, target), axis=[1, 2, 3])
    psnr = 10.0 / tf.math.log(10.0) * tf.math.log(255.0**2 / squared)
    scores = {
        "l1": tf.reduce_mean(tf.abs(output - target), axis=[1, 2, 3]),
        "psnr": tf.minimum(psnr, IDENTICAL_PSNR),
        "ssim": tf.image.ssim(output, target, max_val=255.0),
    }
    if multiscale and min(output.shape[1:3]) >= MULTISCALE_SIDE:
        scores["ms_ssim"] = tf.image.ssim_multiscale(output, target, max_val=255.0)
    return scores


def own_numbers(examples: int, at_once: int, workers: Workers) -> tuple[range, list[int]]:
    """Which pictures of a split this worker measures, and the same filled up with its last to whole batches.

    Every worker gets as many batches as any other, because they agree before each on whether to go on.
    """
    most = -(-examples // (at_once * workers.size)) * at_once
    first = min(workers.index * most, examples)
    padded = [min(number, examples - 1) for number in range(workers.index * most, (workers.index + 1) * most)]
    return range(first, min(first + most, examples)), padded


class Evaluator:
    """Measures a generator in its inference mode, on the pictures as they would be written to files.

    The pictures are shared out over all replicas of all workers, so many at a time to each; a score depends on its picture
    alone, so it does not depend on who took it, and the means weigh every picture once.
    """

    def __init__(
        self,
        generator: keras.Model,
        data: PairData,
        config: Config,
        strategy: tf.distribute.Strategy | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._generator = generator
        self._strategy = strategy or tf.distribute.get_strategy()
        self._workers = workers or Alone()
        self._replicas = self._strategy.num_replicas_in_sync // self._workers.size
        self._data = data
        self._seed = config.seed
        self._spec = data.specs.target
        shapes = [(None, *config.data.image_size, spec.channels) for spec in (data.specs.input, data.specs.target)]
        self._signature = [tf.TensorSpec(shape, tf.float32) for shape in shapes]
        self._draw = tf.function(
            lambda images: translate(generator, images, config.seed), input_signature=self._signature[:1], autograph=False
        )
        self._scores = self._scorer(multiscale=False)

    def _levels(self, image: tf.Tensor) -> tf.Tensor:
        """[-1, 1] to the levels of the data's bit depth, then to the 0 to 255 scale."""
        return from_unit_range(image, self._spec.bit_depth) * (255.0 / maximum(self._spec))

    def _scorer(self, *, multiscale: bool) -> Callable[[tf.Tensor, tf.Tensor], dict[str, tf.Tensor]]:
        """A graph that takes one batch for each replica of this worker, and gives their scores one after the other."""

        def score_batch(images: tf.Tensor, target: tf.Tensor) -> dict[str, tf.Tensor]:
            drawn = self._levels(translate(self._generator, images, self._seed))
            return score(drawn, self._levels(target), multiscale=multiscale)

        def score_all(images: tf.Tensor, target: tf.Tensor) -> dict[str, tf.Tensor]:
            scores = self._strategy.run(score_batch, (images, target))
            return {name: tf.concat(self._strategy.experimental_local_results(of), 0) for name, of in scores.items()}

        compiled: Callable[[tf.Tensor, tf.Tensor], dict[str, tf.Tensor]] = tf.function(score_all, autograph=False)
        return compiled

    def _shared(self, images: tf.Tensor) -> Any:
        """Cut a batch into one part for each replica of this worker."""
        if self._replicas == 1:
            return images
        parts, first = tf.split(images, self._replicas), self._workers.index * self._replicas
        return self._strategy.experimental_distribute_values_from_function(
            lambda context: parts[context.replica_id_in_sync_group - first]
        )

    def per_image(self, split: Split, interrupted: Callable[[], bool], *, multiscale: bool = False) -> PerImage:
        """Every score of every image of a split, in stored order: float64 (images,) by name.

        Args:
            split: what to measure on.
            interrupted: asked before each batch.
            multiscale: also MS-SSIM, where the images are large enough for its five scales.

        Raises:
            InterruptedEvaluation: `interrupted()` became true.
            DataError: a record is damaged.
        """
        columns: dict[str, list[NDArray[np.float32]]] = {}
        scores = self._scorer(multiscale=True) if multiscale else self._scores
        size = EVALUATION_BATCH * self._replicas
        own, padded = own_numbers(split.examples, size, self._workers)
        with self._data.naming_damage(split, lambda: own):
            for batch in elements(self._data.batches_of(split, padded, size)):
                if self._workers.any(interrupted()):
                    raise InterruptedEvaluation
                for name, values in scores(self._shared(batch["input"]), self._shared(batch["target"])).items():
                    columns.setdefault(name, []).append(values.numpy())
        return {name: self._of_all(split.examples, own, np.concatenate(column)) for name, column in columns.items()}

    def _of_all(self, examples: int, own: range, measured: NDArray[np.float32]) -> NDArray[np.float64]:
        """The scores of a whole split from what each worker measured; nothing but zeros is added to any of them."""
        scores = np.zeros(examples)
        scores[own.start : own.stop] = measured[: len(own)]
        return self._workers.add_up(scores)

    def measure(self, split: Split, interrupted: Callable[[], bool]) -> dict[str, float | int]:
        """Mean of each score over a split, each image weighing the same: {"images": n, "l1": ..., "psnr": ..., "ssim": ...}.

        Raises:
            InterruptedEvaluation: `interrupted()` became true.
            DataError: a record is damaged.
        """
        scores = self.per_image(split, interrupted)
        return {"images": split.examples, **{name: round(float(values.mean()), 6) for name, values in scores.items()}}

    def sample_columns(self) -> list[tuple[str, NDArray[np.uint8]]]:
        """Input, target and output of the first few validation pairs (of training, if there is no val), uint8."""
        split = self._data.split("val")
        split = split if split.examples else self._data.train
        return self.columns(split, range(min(SAMPLE_PAIRS, split.examples)))

    def columns(self, split: Split, numbers: Sequence[int]) -> list[tuple[str, NDArray[np.uint8]]]:
        """Input, target and output of some pairs of a split, as uint8 pictures."""
        with self._data.naming_damage(split, lambda: numbers):
            batch = next(iter(self._data.batches_of(split, numbers, len(numbers))))
        images = {"input": batch["input"], "target": batch["target"], "output": self._draw(batch["input"])}
        return [(name, from_unit_range(image).numpy().astype(np.uint8)) for name, image in images.items()]
