"""Is a record what the manifest says, before TensorFlow decodes it?

A decoder that meets a header of 60,000 x 60,000 pixels asks for gigabytes first; a missing feature makes an error a riddle.
"""

import google.protobuf.message
import tensorflow as tf

from trainer.data import images
from trainer.data.records import ImageSpec, Manifest

STORED_FORMATS = ("jpeg", "png", "webp", "bmp")


def vet(record: bytes, manifest: Manifest) -> None:
    """Check features, key, formats, sizes, channels and depth of a record, from its headers alone.

    Raises:
        ValueError: the first thing that is wrong.
    """
    try:
        features = tf.train.Example.FromString(record).features.feature
    except google.protobuf.message.DecodeError as error:
        raise ValueError("the record is no tf.train.Example") from error
    _check_key(_bytes(features, "key"))
    if manifest.layout == "pair":
        _check_image(features, "pair", manifest.input)
        if _number(features, "pair/width") % 2:
            raise ValueError("pair/width: odd, so it has no middle to split it at")
    else:
        _check_image(features, "input", manifest.input)
        _check_image(features, "target", manifest.target)


def _check_key(key: bytes) -> None:
    try:
        key.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"key: {key[:20]!r} is not UTF-8 text") from error


def _bytes(features: dict[str, tf.train.Feature], name: str) -> bytes:
    feature = features[name] if name in features else None  # noqa: SIM401 - a protobuf map makes what `get` asks for
    if feature is None or len(feature.bytes_list.value) != 1:
        raise ValueError(f"{name}: missing, or not one value of bytes")
    return bytes(feature.bytes_list.value[0])


def _number(features: dict[str, tf.train.Feature], name: str) -> int:
    feature = features[name] if name in features else None  # noqa: SIM401
    if feature is None or len(feature.int64_list.value) != 1:
        raise ValueError(f"{name}: missing, or not one whole number")
    return int(feature.int64_list.value[0])


def _check_image(features: dict[str, tf.train.Feature], name: str, spec: ImageSpec) -> None:
    stated = _bytes(features, f"{name}/format").decode(errors="replace")
    size = (_number(features, f"{name}/width"), _number(features, f"{name}/height"))
    try:
        info = images.inspect(_bytes(features, f"{name}/encoded"))
    except ValueError as error:
        raise ValueError(f"{name}/encoded: {error}") from error
    if info.format != stated or stated not in STORED_FORMATS:
        raise ValueError(f"{name}/format: says {stated[:20]!r}, the picture is {info.format}")
    if (info.width, info.height) != size:
        raise ValueError(f"{name}: says {size[0]}x{size[1]}, the picture is {info.width}x{info.height}")
    if min(size) < 1 or info.bit_depth != spec.bit_depth or (info.channels == 4) != (spec.channels == 4):
        found = f"{info.width}x{info.height}, {info.channels} channels, {info.bit_depth} bits"
        raise ValueError(f"{name}: the picture is {found}; the manifest says {spec.channels} channels, {spec.bit_depth} bits")
