"""`trainer export`: the trained generator for other programs, as a SavedModel and as a .keras file, with a model card.

TensorFlow and Keras are given folders of this machine only; what is for a bucket is uploaded from there.
"""

import keras
import tensorflow as tf

from trainer.config import ModelConfig
from trainer.data.pairs import decode_image, from_unit_range, to_unit_range
from trainer.data.split import plain
from trainer.errors import TrainerError, UserError
from trainer.model.generators import translate
from trainer.model.layers import BatchNorm, InstanceNorm, KeyedDropout, inference_keys
from trainer.model_card import model_card
from trainer.runtime.files import replacing_folder, write_bytes
from trainer.storage.bucket import BucketPath
from trainer.storage.places import Place
from trainer.trained import TrainedRun

EXPORT_MARK = ".trainer-export"
FORMATS = ("saved_model", "keras")


class Served(tf.Module):
    """What a SavedModel offers: pictures as numbers, and pictures as files; any size, seed as wanted."""

    def __init__(self, run: TrainedRun) -> None:
        super().__init__()
        self.generator = run.generator()
        self._specs, self._multiple, self._seed = run.specs, run.multiple, run.config.seed
        channels = self._specs.input.channels
        seed = tf.TensorSpec((), tf.int32, name="seed")
        images = tf.TensorSpec((None, None, None, channels), tf.float32, name="images")
        self.images = tf.function(self._images, input_signature=[images])
        self.images_seeded = tf.function(self._images, input_signature=[images, seed])
        self.encoded = tf.function(self._encoded, input_signature=[tf.TensorSpec((None,), tf.string, name="encoded")])
        self.encoded_seeded = tf.function(
            self._encoded, input_signature=[tf.TensorSpec((None,), tf.string, name="encoded"), seed]
        )

    def signatures(self) -> dict[str, tf.Tensor]:
        """Each of the two, without and with a seed."""
        return {
            "serving_default": self.images,
            "images_seeded": self.images_seeded,
            "encoded": self.encoded,
            "encoded_seeded": self.encoded_seeded,
        }

    def _images(self, images: tf.Tensor, seed: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
        """float32 (batch, height, width, channels) in [-1, 1] -> the same of the target."""
        chosen = self._seed if seed is None else seed
        size = tf.shape(images)[1:3]
        missing = -size % self._multiple
        before = missing // 2
        padded = _pad(images, size, before, missing - before)
        drawn = translate(self.generator, padded, chosen)
        return {"outputs": drawn[:, before[0] : before[0] + size[0], before[1] : before[1] + size[1]]}

    def _encoded(self, encoded: tf.Tensor, seed: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
        """Files (JPEG, PNG, BMP or WebP bytes, upright), string (batch,), of any sizes -> PNG bytes of the same sizes."""
        return {"png": tf.map_fn(lambda one: self._draw_file(one, seed), encoded)}

    def _draw_file(self, encoded: tf.Tensor, seed: tf.Tensor | None) -> tf.Tensor:
        spec, target = self._specs.input, self._specs.target
        is_jpeg = tf.strings.substr(encoded, 0, 2) == b"\xff\xd8"
        image = to_unit_range(decode_image(encoded, tf.where(is_jpeg, "jpeg", "other"), spec), spec)
        drawn = self._images(image[None], seed)["outputs"][0]
        levels = from_unit_range(drawn, target.bit_depth)
        return tf.io.encode_png(tf.cast(levels, tf.uint8 if target.bit_depth == 8 else tf.uint16))


def _pad(images: tf.Tensor, size: tf.Tensor, before: tf.Tensor, after: tf.Tensor) -> tf.Tensor:
    """Pad evenly by reflection; a picture too small for that repeats its edge. Rows and columns are gathered by number."""
    reflects = tf.reduce_all(tf.maximum(before, after) < size)
    for axis in (0, 1):
        places = tf.range(-before[axis], size[axis] + after[axis])
        last = size[axis] - 1
        reflected = last - tf.abs(last - tf.abs(places))
        images = tf.gather(images, tf.where(reflects, reflected, tf.clip_by_value(places, 0, last)), axis=axis + 1)
    return images


def stock_model(run: TrainedRun) -> keras.Model:
    """The generator at its training size, of Keras's own layers alone, so that it loads where this package is not.

    Its dropout masks, which are functions of seed and layer at inference, become constants.
    """
    return stock_copy(run.generator(any_size=False), run)


def stock_copy(network: keras.Model, run: TrainedRun) -> keras.Model:
    """Rebuild a generator layer by layer and copy its weights."""
    image = keras.Input(network.inputs[0].shape[1:], name="image")
    keys = inference_keys(run.config.seed, tf.constant(1))

    outputs: dict[int, keras.KerasTensor] = {id(network.inputs[0]): image}
    copies: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []
    for layer in network.layers:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        given = [tensor for tensor in tf.nest.flatten(layer.input) if id(tensor) in outputs]
        copy = _stock_layer(layer, keys, run.config.model)
        arguments = [outputs[id(tensor)] for tensor in given]
        outputs[id(layer.output)] = copy(arguments if len(arguments) > 1 else arguments[0])
        copies.append((layer, copy))
    model = keras.Model(image, outputs[id(network.outputs[0])], name="generator")
    for layer, copy in copies:
        if layer.weights and not isinstance(layer, KeyedDropout):
            copy.set_weights(layer.get_weights()[: len(copy.weights)])
    return model


def _stock_layer(layer: keras.layers.Layer, keys: tf.Tensor, model: ModelConfig) -> keras.layers.Layer:
    """The layer itself if it is Keras's own, else one that computes the same at inference."""
    named = {"name": layer.name, "dtype": layer.dtype_policy}
    if isinstance(layer, KeyedDropout):
        ones = tf.ones((1, *layer.output.shape[1:]))
        mask = layer((ones, keys), training=False).numpy()[0]
        return keras.layers.Rescaling(mask.tolist(), **named)
    if isinstance(layer, InstanceNorm) or (isinstance(layer, BatchNorm) and model.inference == "paper"):
        return keras.layers.GroupNormalization(groups=-1, epsilon=layer.epsilon, **named)
    if isinstance(layer, BatchNorm):
        return keras.layers.BatchNormalization(epsilon=layer.epsilon, momentum=layer.momentum, **named)
    copy: keras.layers.Layer = type(layer).from_config(layer.get_config())
    return copy


def own_folder(output: Place) -> None:
    """Refuse to write among somebody's files; what an earlier export wrote may be replaced.

    Raises:
        UserError: the folder is a file, or holds something else.
    """
    if _holds_something_else(output):
        raise UserError(f"--output={output}: is there and holds no export; choose another folder")
    write_bytes(output / EXPORT_MARK, b"")


def _holds_something_else(output: Place) -> bool:
    if isinstance(output, BucketPath):
        there = output.listing()
        return output.is_file() or (bool(there) and EXPORT_MARK not in there)
    return output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / EXPORT_MARK).is_file()))


def export(run: TrainedRun, output: Place, formats: list[str]) -> str:
    """Write the formats and README.md into the output folder; return what is where.

    Raises:
        UserError: a format is not known.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise UserError(f"--formats={','.join(formats)}: allowed: {', '.join(FORMATS)}, one or both")
    own_folder(output)
    lines = []
    if "saved_model" in formats:
        lines.append(export_for_serving(run, output / "saved_model"))
    if "keras" in formats:
        with replacing_folder(output / "keras") as folder:
            stock_model(run).save(folder / "generator.keras")
        lines.append(f"Keras       {output / 'keras' / 'generator.keras'}")
    write_bytes(output / "README.md", model_card(run.config, run.about, run.marker, run.folder).encode())
    return "\n".join([*lines, f"model card  {output / 'README.md'}"])


def export_for_serving(run: TrainedRun, folder: Place) -> str:
    """Write the SavedModel, and nothing beside it, into a folder that holds nothing else; return where it is.

    At no moment is there a part of it that can be loaded, in a bucket either: saved_model.pb goes first and comes last.

    Raises:
        TrainerError: it could not be written, for lack of room for example; what was there is untouched.
    """
    with replacing_folder(folder, key_file="saved_model.pb") as written:
        served = Served(run)
        try:
            tf.saved_model.save(served, str(written), signatures=served.signatures())
        except tf.errors.OpError as error:
            raise TrainerError(f"{folder}: the SavedModel could not be written: {plain(error)}") from error
    return f"SavedModel  {folder}"
