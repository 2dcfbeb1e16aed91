"""Prepared data sets that are quick to read: small pictures, each unlike all others, in records as long as real ones."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from tests.helpers.images import encode, label, photo
from trainer.data import records
from trainer.data.records import ImageSpec, Manifest

SIDE, KINDS = 32, 20
RECORD_BYTES = 40_000  # about those of a pair of 256x256 as JPEG


def _pictures() -> list[np.ndarray]:
    """Some side-by-side pairs, uint8 (SIDE, 2 SIDE, 3)."""
    return [np.concatenate([label(number, SIDE, SIDE), photo(number, SIDE, SIDE)], axis=1) for number in range(KINDS)]


def _feature(value: bytes | int) -> tf.train.Feature:
    if isinstance(value, int):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))


def _record(split: str, number: int, pictures: list[np.ndarray]) -> bytes:
    """One pair with its number written into a corner of both sides, and a feature that nobody reads to make it long."""
    pixels = pictures[number % len(pictures)].copy()
    pixels[:8, :8] = pixels[:8, SIDE : SIDE + 8] = [number % 256, number // 256, 255]
    rest = random.Random(f"{split} {number}").randbytes(RECORD_BYTES * (80 + number % 41) // 100)
    features = {
        "key": f"{split}/{number:04d}".encode(), "pair/encoded": encode(pixels, "png"), "pair/format": b"png",
        "pair/height": SIDE, "pair/width": 2 * SIDE, "pair/channels": 3, "pair/bit_depth": 8, "other/rest": rest,
    }  # fmt: skip
    example = tf.train.Example(features=tf.train.Features(feature={name: _feature(value) for name, value in features.items()}))
    return bytes(example.SerializeToString(deterministic=True))


def write_set(folder: Path, splits: dict[str, Sequence[int]]) -> None:
    """Write a data set: for each split, how many records each of its shards holds."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures, shards = _pictures(), {}
    for split, counts in splits.items():
        ends = np.cumsum(counts).tolist()
        shards[split] = [
            records.write_shard(
                folder / records.shard_name(split, index, len(counts)),
                (_record(split, number, pictures) for number in range(end - count, end)),
            )
            for index, (count, end) in enumerate(zip(counts, ends, strict=True))
        ]
    labels, photos = (ImageSpec(kind=kind, channels=3, bit_depth=8) for kind in ("labels", "photo"))
    records.write_manifest(folder, Manifest(
        version=1, name="made", source="tests", licence="none", layout="pair", input=labels, target=photos, splits=shards,
    ))  # fmt: skip
