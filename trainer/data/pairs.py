"""A record -> a pair of image tensors: decode, one joint augmentation, the range [-1, 1].

Every function is pure and keeps static shapes, so the same record gives the same bits on any thread.
"""

from typing import NamedTuple

import tensorflow as tf

from trainer.data.records import ImageSpec, Manifest


class Pair(NamedTuple):
    """Two images of one scene, (height, width, channels): as decoded uint8 or uint16, 0 to 2^bits - 1; later float32, [-1, 1]."""

    input: tf.Tensor
    target: tf.Tensor


def maximum(spec: ImageSpec) -> int:
    """The value of white: 255 or 65535."""
    return int(2**spec.bit_depth - 1)


def to_unit_range(image: tf.Tensor, spec: ImageSpec) -> tf.Tensor:
    """Scale 0..maximum of the image's true bit depth, of whatever dtype, to float32 in [-1, 1]."""
    return tf.cast(image, tf.float32) * (2.0 / maximum(spec)) - 1.0


def from_unit_range(image: tf.Tensor, bit_depth: int = 8) -> tf.Tensor:
    """Scale [-1, 1] to whole levels 0..2^bits - 1, still float32: what a picture file of the image would hold."""
    top = 2.0**bit_depth - 1.0
    return tf.round(tf.clip_by_value((image + 1.0) * (top / 2.0), 0.0, top))


def decode_image(encoded: tf.Tensor, image_format: tf.Tensor, spec: ImageSpec) -> tf.Tensor:
    """Decode JPEG, PNG, BMP or WebP bytes to levels 0..maximum, uint8 or (PNG of 16 bits) uint16, (height, width, channels).

    JPEG uses the accurate inverse transform by name: TensorFlow's default is the fast one, off by up to 8 levels.
    """
    channels = spec.channels

    def jpeg() -> tf.Tensor:
        return tf.io.decode_jpeg(encoded, channels=min(channels, 3), dct_method="INTEGER_ACCURATE")

    def other() -> tf.Tensor:
        return tf.io.decode_image(encoded, channels=channels, expand_animations=False)

    if spec.bit_depth == 16:
        image = tf.io.decode_png(encoded, channels=channels, dtype=tf.uint16)
    elif channels == 4:
        image = other()
    else:
        image = tf.cond(image_format == "jpeg", jpeg, other)
    image.set_shape([None, None, channels])
    return image


def _side_features(name: str) -> dict[str, tf.io.FixedLenFeature]:
    text, number = tf.io.FixedLenFeature([], tf.string), tf.io.FixedLenFeature([], tf.int64)
    return {f"{name}/encoded": text, f"{name}/format": text, f"{name}/height": number, f"{name}/width": number}


def decode_record(record: tf.Tensor, manifest: Manifest) -> Pair:
    """Parse a tf.train.Example and decode its two images, whichever of the two layouts it has."""
    names = ["pair"] if manifest.layout == "pair" else ["input", "target"]
    features = {key: value for name in names for key, value in _side_features(name).items()}
    parsed = tf.io.parse_single_example(record, features)
    specs = [manifest.input, manifest.target]
    images = [_decode_checked(parsed, name, spec) for name, spec in zip(names, specs, strict=False)]
    return _split(images[0]) if manifest.layout == "pair" else Pair(*images)


def _decode_checked(parsed: dict[str, tf.Tensor], name: str, spec: ImageSpec) -> tf.Tensor:
    image = decode_image(parsed[f"{name}/encoded"], parsed[f"{name}/format"], spec)
    stated = tf.stack([parsed[f"{name}/height"], parsed[f"{name}/width"]])
    actual = tf.shape(image, tf.int64)[:2]
    check = tf.debugging.assert_equal(actual, stated, message=f"the {name} image is not of the size that the record states")
    with tf.control_dependencies([check]):
        return tf.identity(image)


def _split(side_by_side: tf.Tensor) -> Pair:
    half = tf.shape(side_by_side)[1] // 2
    return Pair(side_by_side[:, :half], side_by_side[:, half : 2 * half])


def resize(image: tf.Tensor, height: int, width: int) -> tf.Tensor:
    """Resize a photograph with bilinear filtering, antialiased where it shrinks; float32.

    Where nothing shrinks the antialiasing filter is the plain one, and takes three times as long.
    """

    def filtered(*, antialias: bool) -> tf.Tensor:
        return tf.image.resize(image, [height, width], method="bilinear", antialias=antialias)

    shrinks = tf.reduce_any(tf.shape(image)[:2] > [height, width])
    return tf.cond(shrinks, lambda: filtered(antialias=True), lambda: filtered(antialias=False))


def nearest(length: tf.Tensor, resized: int) -> tf.Tensor:
    """Which pixel along a side is nearest to each pixel of the resized side: int32, (resized,); centres are half a pixel in."""
    centres = (tf.range(resized, dtype=tf.float32) + 0.5) * (tf.cast(length, tf.float32) / resized)
    return tf.minimum(tf.cast(centres, tf.int32), length - 1)


class _Window(NamedTuple):
    """The part of a resized image that the networks see, and whether it is mirrored."""

    resized: tuple[int, int]
    size: tuple[int, int]
    how: tf.Tensor

    def of(self, image: tf.Tensor, spec: ImageSpec) -> tf.Tensor:
        """This part of an image; of a label map, which gets no colours that were not there, only the pixels that are in it."""
        top, left = self.how[0], self.how[1]
        (height, width), mirrored = self.size, self.how[2] > 0
        if spec.kind == "labels":
            rows = nearest(tf.shape(image)[0], self.resized[0])[top : top + height]
            columns = nearest(tf.shape(image)[1], self.resized[1])[left : left + width]
            columns = tf.where(mirrored, columns[::-1], columns)
            return tf.gather(tf.gather(image, rows), columns, axis=1)
        crop = resize(image, *self.resized)[top : top + height, left : left + width]
        return tf.cond(mirrored, lambda: tf.reverse(crop, [1]), lambda: crop)


def prepare(record: tf.Tensor, manifest: Manifest, size: tuple[int, int], direction: str, jitter: int, how: tf.Tensor) -> Pair:
    """Decode a record and give the networks' pair in [-1, 1] at a static size.

    Args:
        record: scalar string, a serialised tf.train.Example.
        manifest: what the data set says of its images.
        size: height and width in pixels.
        direction: forward, or reverse to swap input and target.
        jitter: pixels that the resize adds to both sides before the crop.
        how: int32 (3,): top and left of the crop in 0..jitter, and 1 to mirror; the same for both images.
    """
    window = _Window((size[0] + jitter, size[1] + jitter), size, how)
    images = []
    for image, spec in zip(decode_record(record, manifest), (manifest.input, manifest.target), strict=True):
        images.append(tf.ensure_shape(to_unit_range(window.of(image, spec), spec), [*size, spec.channels]))
    return Pair(*(images if direction == "forward" else reversed(images)))
