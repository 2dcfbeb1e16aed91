"""One pair's files -> one record; run in processes of its own, and the same bytes whichever process does it.

Each process fetches its own pictures from a bucket, several at once. A picture is needed twice, for its header and for its
record: the first time a copy is kept in a folder of this machine, if there is one, so that it is downloaded once.
"""

import hashlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import tensorflow as tf

from trainer.data import images
from trainer.data.images import ImageInfo
from trainer.data.sources import PairFile
from trainer.storage.places import Place
from trainer.storage.transfer import ahead

log = logging.getLogger(__name__)


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


def _contents(pairs: Sequence[PairFile], keep: Path | None) -> Iterator[bytes | OSError]:
    """The bytes of the pairs' files, in order; those of a bucket are fetched while the ones before are looked at."""
    paths = [path for pair in pairs for path in pair.paths]
    reading = map if all(isinstance(path, Path) for path in paths) else ahead
    return iter(reading(lambda path: _read(path, keep), paths))


def _read(path: Place, keep: Path | None) -> bytes | OSError:
    try:
        return path.read_bytes() if isinstance(path, Path) or keep is None else _kept(path, keep)
    except OSError as error:
        return error


def _kept(path: Place, keep: Path) -> bytes:
    """The bytes of an object, from the folder for copies or into it."""
    copy = keep / hashlib.sha256(str(path).encode()).hexdigest()
    if copy.is_file():
        return copy.read_bytes()
    content = path.read_bytes()
    temporary = copy.with_name(f"{copy.name}.{os.getpid()}-{threading.get_ident()}")  # a list may name a picture twice
    try:
        temporary.write_bytes(content)
        temporary.replace(copy)
    except OSError as error:  # a full disk is no fault of the picture, which is downloaded once more instead
        log.info("%s: no copy is kept: %s", path, error)
        temporary.unlink(missing_ok=True)
    return content


def _need(content: bytes | OSError) -> bytes:
    if isinstance(content, OSError):
        raise ValueError(f"cannot be read: {content.strerror}") from content
    return content


def _checksum(content: bytes) -> str:
    return f"{google_crc32c.value(content):08x}"


def read_headers(pairs: Sequence[PairFile], keep: Path | None = None) -> list[Headers]:
    """Look at the headers of some pairs; `keep` is a folder for copies of what was downloaded."""
    contents = _contents(pairs, keep)
    return [_headers(pair, [next(contents) for _ in pair.paths]) for pair in pairs]


def _headers(pair: PairFile, contents: Sequence[bytes | OSError]) -> Headers:
    infos: list[ImageInfo] = []
    checksums: list[str] = []
    for path, content in zip(pair.paths, contents, strict=True):
        try:
            encoded = _need(content)
            checksums.append(_checksum(encoded))
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


def convert(pairs: Sequence[Headers], keep: Path | None = None) -> list[Converted]:
    """Turn some pairs, whose headers are sound, into records; `keep` as for `read_headers`."""
    contents = _contents([headers.pair for headers in pairs], keep)
    return [_convert(headers, [next(contents) for _ in headers.pair.paths]) for headers in pairs]


def _convert(headers: Headers, contents: Sequence[bytes | OSError]) -> Converted:
    pair = headers.pair
    names = ["pair"] if pair.target is None else ["input", "target"]
    features = {"key": _bytes(pair.key.encode())}
    known = zip(names, pair.paths, contents, headers.infos, headers.checksums, strict=True)
    for name, path, content, info, checksum in known:
        try:
            encoded, stored = _stored(_unchanged(content, checksum), info)
        except ValueError as error:
            return Converted(pair.key, b"", f"{path}: {error}")
        features |= _side(name, encoded, stored, info)
    example = tf.train.Example(features=tf.train.Features(feature=features))
    return Converted(pair.key, bytes(example.SerializeToString(deterministic=True)))


def _unchanged(content: bytes | OSError, checksum: str) -> bytes:
    encoded = _need(content)
    if _checksum(encoded) != checksum:
        raise ValueError("was changed after its header was read; start the command again")
    return encoded


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
