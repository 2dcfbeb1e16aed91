"""One pair's files -> one record; run in processes of its own, and the same bytes whichever process does it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import tensorflow as tf

from trainer.data import images
from trainer.data.images import ImageInfo
from trainer.data.sources import PairFile


@dataclass(frozen=True, slots=True)
class Headers:
    """What the headers of a pair's files say; or the problem, with its file; and the CRC-32C of what was read."""

    pair: PairFile
    infos: list[ImageInfo]
    problem: str | None = None
    checksums: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Converted:
    """A pair as a record; or the problem, with its file."""

    key: str
    record: bytes
    problem: str | None = None


def limit_threads() -> None:
    """Each worker process decodes one picture at a time: the processes are the parallelism."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error


def read_headers(pairs: Sequence[PairFile]) -> list[Headers]:
    """Look at the headers of some pairs."""
    return [_headers(pair) for pair in pairs]


def _headers(pair: PairFile) -> Headers:
    infos: list[ImageInfo] = []
    checksums: list[str] = []
    for path in pair.paths:
        try:
            encoded = _read(path)
            checksums.append(f"{google_crc32c.value(encoded):08x}")
            infos.append(images.inspect(encoded))
        except ValueError as error:
            return Headers(pair, [], f"{path}: {error}", tuple(checksums))
    return Headers(pair, infos, _mismatch(pair, infos), tuple(checksums))


def _mismatch(pair: PairFile, infos: list[ImageInfo]) -> str | None:
    if pair.target is None:
        width = infos[0].width
        return f"{pair.input}: its width of {width} pixels has no middle to split it at" if width % 2 else None
    (a, b) = infos
    if (a.width, a.height) != (b.width, b.height):
        return f"{pair.input}: is {a.width}x{a.height}, its partner {pair.target} is {b.width}x{b.height}"
    return None


def convert(pairs: Sequence[Headers]) -> list[Converted]:
    """Turn some pairs, whose headers are sound, into records."""
    return [_convert(headers) for headers in pairs]


def _convert(headers: Headers) -> Converted:
    pair = headers.pair
    names = ["pair"] if pair.target is None else ["input", "target"]
    features = {"key": _bytes(pair.key.encode())}
    for name, path, info in zip(names, pair.paths, headers.infos, strict=True):
        try:
            encoded, stored = _stored(_read(path), info)
        except ValueError as error:
            return Converted(pair.key, b"", f"{path}: {error}")
        features |= _side(name, encoded, stored, info)
    example = tf.train.Example(features=tf.train.Features(feature=features))
    return Converted(pair.key, bytes(example.SerializeToString(deterministic=True)))


def _stored(encoded: bytes, info: ImageInfo) -> tuple[bytes, str]:
    """The bytes to keep: the file's own where TensorFlow decodes them to the same picture, else a PNG of it.

    The picture is decoded in either case: one that is cut short must not reach a training run.
    """
    pixels = images.decode(encoded, info)
    if pixels.shape[:2] != (info.height, info.width):
        raise ValueError("its pixels are not of the size that its header states")
    return (encoded, info.format) if info.decodable else (images.encode_png(pixels), "png")


def _side(name: str, encoded: bytes, image_format: str, info: ImageInfo) -> dict[str, tf.train.Feature]:
    return {
        f"{name}/encoded": _bytes(encoded),
        f"{name}/format": _bytes(image_format.encode()),
        f"{name}/height": _number(info.height),
        f"{name}/width": _number(info.width),
        f"{name}/channels": _number(info.channels),
        f"{name}/bit_depth": _number(info.bit_depth),
    }


def _bytes(value: bytes) -> tf.train.Feature:
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))


def _number(value: int) -> tf.train.Feature:
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
