"""Bytes <-> records: TFRecord framing, the tf.train.Example schema, shard names and the dataset.json manifest.

A record is framed as TensorFlow frames it: length (uint64), masked CRC-32C of the length, the bytes, masked CRC-32C of
the bytes, all little endian. The manifest keeps each record's offset, so that any record is read without the ones before.
"""

import errno
import hashlib
import itertools
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import google_crc32c
import pydantic
from pydantic import BaseModel, Field

from trainer.config import validation_lines
from trainer.errors import DataError, TrainerError
from trainer.storage.places import Place, naming, sizes_in

MANIFEST_NAME = "dataset.json"
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
SMALLEST_RECORD = _HEADER.size + _FOOTER.size
_CRC_MASK_DELTA = 0xA282EAD8


class _Document(BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)


class ImageSpec(_Document):
    """What all images on one side of the pairs have in common."""

    kind: Literal["photo", "labels"]
    channels: Literal[1, 3, 4]
    bit_depth: Literal[8, 16]


class Shard(_Document):
    """One TFRecord file: its size and CRC-32C, and the byte offset of every record in it."""

    file: str
    bytes: int = Field(ge=0)
    crc32c: str
    offsets: list[int]

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Shard":
        ends = [*self.offsets, self.bytes]
        if any(end - start < SMALLEST_RECORD for start, end in itertools.pairwise(ends)) or ends[0] != 0:
            raise ValueError(f"offsets that begin at 0 and rise by {SMALLEST_RECORD} or more up to the {self.bytes} bytes")
        if Path(self.file).name != self.file or self.file in ("", ".", ".."):
            raise ValueError("a file name without folders")
        return self

    @property
    def examples(self) -> int:
        """Number of records."""
        return len(self.offsets)


class Manifest(_Document):
    """dataset.json: all that can be known of a data set without opening a shard."""

    version: Literal[1]
    name: str
    source: str
    licence: str
    layout: Literal["pair", "separate"]
    input: ImageSpec
    target: ImageSpec
    splits: dict[str, list[Shard]]
    skipped: list[str] = []
    made_from: str = ""

    def examples(self, split: str) -> int:
        """Number of pairs in a split; 0 for a split that does not exist."""
        return sum(shard.examples for shard in self.splits.get(split, []))

    def about(self) -> dict[str, Any]:
        """The manifest without its shards: what is told of the data where they are not at hand."""
        document = self.model_dump(exclude={"splits", "skipped", "made_from"})
        return document | {"pairs": {split: self.examples(split) for split in self.splits}}

    def digest(self) -> str:
        """A short digest of all pairs: the same for a copy of the data set elsewhere."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


def shard_name(split: str, index: int, count: int) -> str:
    """`train-00003-of-00016.tfrecord` for ("train", 3, 16)."""
    return f"{split}-{index:05d}-of-{count:05d}.tfrecord"


def masked_crc32c(data: bytes) -> int:
    """The checksum that TFRecord framing stores: CRC-32C, rotated and offset so that it may itself be checksummed."""
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + _CRC_MASK_DELTA) & 0xFFFFFFFF


def frame(record: bytes) -> bytes:
    """Wrap a record's bytes in TFRecord framing."""
    length = struct.pack("<Q", len(record))
    return length + struct.pack("<I", masked_crc32c(length)) + record + struct.pack("<I", masked_crc32c(record))


def unframe(framed: bytes, length: int) -> bytes:
    """The record in a frame that should have `length` bytes.

    Raises:
        ValueError: saying what is wrong with the frame; the caller knows and adds shard and record.
    """
    if len(framed) < length:
        raise ValueError(f"the shard ends {length - len(framed)} bytes too early")
    stated, stated_crc = _HEADER.unpack_from(framed)
    if masked_crc32c(framed[:8]) != stated_crc or stated != len(framed) - _HEADER.size - _FOOTER.size:
        raise ValueError("the record's length is damaged")
    record = framed[_HEADER.size : -_FOOTER.size]
    if masked_crc32c(record) != _FOOTER.unpack_from(framed, len(framed) - _FOOTER.size)[0]:
        raise ValueError("the record's checksum does not match its bytes")
    return record


def read_part(file: Place, start: int, end: int) -> bytes:
    """The bytes of a shard from `start` up to `end`, fewer where it ends before.

    Raises:
        OSError: the file cannot be read.
        TrainerError: the bucket is away, or refuses.
    """
    if not isinstance(file, Path):
        return file.read_range(start, end)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return os.pread(descriptor, end - start, start)
    finally:
        os.close(descriptor)


def unreadable(record: str, error: ValueError | OSError) -> TrainerError:
    """The line for a record that cannot be had: the data's fault, or of something that may pass by itself."""
    if isinstance(error, ValueError):
        return DataError(f"{record}: {error}; copy the shard again, or prepare the data again")
    kind = DataError if error.errno in (errno.ENOENT, errno.EACCES) else TrainerError
    return kind(f"{record}: cannot be read: {error.strerror}")


def read_one(folder: Place, manifest: Manifest) -> None:
    """Read the first record there is, to see that the shards can be read at all; TensorFlow is not needed for it.

    Raises:
        DataError: it is missing or damaged; names shard and record.
        TrainerError: it could not be read this time.
    """
    shard = next((shard for shards in manifest.splits.values() for shard in shards if shard.offsets), None)
    if shard is None:
        return
    end = [*shard.offsets, shard.bytes][1]
    try:
        unframe(read_part(folder / shard.file, 0, end), end)
    except (ValueError, OSError) as error:
        raise unreadable(f"{folder / shard.file}, record 0", error) from error


def write_shard(path: Path, records: Iterable[bytes]) -> Shard:
    """Write records to one shard, synced to disk, and return its entry for the manifest."""
    offsets, position = [], 0
    checksum = google_crc32c.Checksum()
    with naming(path), path.open("wb") as file:
        for record in records:
            framed = frame(record)
            offsets.append(position)
            position += file.write(framed)
            checksum.update(framed)
        _sync(file)
    return Shard(file=path.name, bytes=position, crc32c=checksum.digest().hex(), offsets=offsets)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write dataset.json, last and at once, so that a folder with a manifest is whole."""
    temporary = folder / f"{MANIFEST_NAME}.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        file.write(json.dumps(manifest.model_dump(), indent=1).encode() + b"\n")
        _sync(file)
    temporary.replace(folder / MANIFEST_NAME)


def read_manifest(folder: Place) -> Manifest:
    """Read and validate dataset.json.

    Raises:
        DataError: the folder or the manifest is missing or wrong; one line for each problem.
        TrainerError: the bucket is away, or refuses.
    """
    path = folder / MANIFEST_NAME
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such data folder; --data_dir names a prepared data set") from error
        raise DataError(
            f"{folder}: no {MANIFEST_NAME} in it, so it is not a prepared data set; `trainer prepare` makes one of pictures"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except pydantic.ValidationError as error:
        raise DataError("\n".join(validation_lines(error, str(path)))) from error


def size_problems(folder: Place, shards: Iterable[Shard]) -> list[str]:
    """A line for each shard that is missing or not of the size that the manifest states; a bucket is asked once."""
    sizes, problems = sizes_in(folder), []
    for shard in shards:
        path, size = folder / shard.file, sizes.get(shard.file)
        if size is None:
            problems.append(f"{path}: this shard is missing; copy it again or prepare the data again")
        elif size != shard.bytes:
            problems.append(f"{path}: has {size} bytes, the manifest says {shard.bytes}; copy it again")
    return problems


def check_shard_sizes(folder: Place, shards: Iterable[Shard]) -> None:
    """Compare the shards' sizes with the manifest, so that a missing or cut file is known before training starts.

    Raises:
        DataError: one line for each shard that is missing or of another size.
    """
    if problems := size_problems(folder, shards):
        raise DataError("\n".join(problems))
