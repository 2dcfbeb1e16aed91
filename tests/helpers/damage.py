"""Damage that data meet on their way, from a seed: to framed records, to what is in them, and to picture files."""

import zlib
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

import tensorflow as tf

from trainer.data.records import frame, read_manifest
from trainer.storage.places import Place


class Damaged(NamedTuple):
    """A framed record.

    Attributes:
        kind: what was done to it.
        framed: its bytes in the shard.
        certain: it must be found; a bit of a picture behind a right checksum may still decode.
    """

    kind: str
    framed: bytes
    certain: bool


def flip_bits(content: bytes, random: Random, count: int = 1) -> bytes:
    """Flip bits at random places."""
    spoilt = bytearray(content)
    for _ in range(count):
        spoilt[random.randrange(len(spoilt))] ^= 1 << random.randrange(8)
    return bytes(spoilt)


def flip_between(shard: Place, start: int, end: int) -> None:
    """Flip a bit in the middle of a shard's bytes from `start` up to `end`: those of a record, its checksums around it."""
    content = bytearray(shard.read_bytes())
    content[(start + end) // 2] ^= 4
    shard.write_bytes(bytes(content))


def flip_in_record(folder: Place, split: str, number: int) -> str:
    """Flip a bit in the middle of one record of a prepared set, here or in a bucket, and change nothing else.

    Args:
        folder: of the prepared set; it must be the test's own.
        split: the record's split.
        number: of the record in its split, counted over all shards from 0.

    Returns:
        What an error calls it: `FOLDER/SHARD, record 7`, counted in its shard.
    """
    for shard in read_manifest(folder).splits[split]:
        if number < shard.examples:
            break
        number -= shard.examples
    start, end = [*shard.offsets, shard.bytes][number : number + 2]
    flip_between(folder / shard.file, start, end)
    return f"{folder / shard.file}, record {number}"


def _flipped_frame(record: bytes, random: Random) -> bytes:
    return flip_bits(frame(record), random, random.choice([1, 1, 2, 9]))


def _changed(record: bytes, change: Callable[[dict[str, tf.train.Feature]], None]) -> bytes:
    example = tf.train.Example.FromString(record)
    change(example.features.feature)
    return frame(example.SerializeToString())


def _cut_example(record: bytes, random: Random) -> bytes:
    return frame(record[: random.randrange(len(record) - 40)])


def _rubbish(record: bytes, random: Random) -> bytes:
    return frame(random.randbytes(random.randrange(1, 500)))


def _missing_feature(record: bytes, random: Random) -> bytes:
    def drop(features: dict[str, tf.train.Feature]) -> None:
        needed = ["key", "pair/encoded", "pair/format", "pair/height", "pair/width"]
        del features[random.choice(needed)]

    return _changed(record, drop)


def _wrong_type(record: bytes, random: Random) -> bytes:
    def change(features: dict[str, tf.train.Feature]) -> None:
        if random.random() < 0.5:
            features["pair/encoded"].CopyFrom(tf.train.Feature(int64_list=tf.train.Int64List(value=[7])))
        else:
            features["pair/height"].CopyFrom(tf.train.Feature(float_list=tf.train.FloatList(value=[64.0])))

    return _changed(record, change)


def _wrong_size(record: bytes, random: Random) -> bytes:
    def change(features: dict[str, tf.train.Feature]) -> None:
        value = random.choice([0, -1, 1, 2**40])
        features[random.choice(["pair/height", "pair/width"])].int64_list.value[0] = value

    return _changed(record, change)


def _bad_key(record: bytes, random: Random) -> bytes:
    def change(features: dict[str, tf.train.Feature]) -> None:
        features["key"].bytes_list.value[0] = b"\xff\xfe" + random.randbytes(4)

    return _changed(record, change)


def _picture(record: bytes, change: Callable[[bytes], bytes]) -> bytes:
    def replace(features: dict[str, tf.train.Feature]) -> None:
        features["pair/encoded"].bytes_list.value[0] = change(features["pair/encoded"].bytes_list.value[0])

    return _changed(record, replace)


def _cut_picture(record: bytes, random: Random) -> bytes:
    return _picture(record, lambda encoded: encoded[: random.randrange(len(encoded) * 3 // 4)])


def _huge_picture(record: bytes, random: Random) -> bytes:
    return _picture(record, lambda encoded: with_size(encoded, random.randrange(20_000, 65_000)))


def _flipped_picture(record: bytes, random: Random) -> bytes:
    return _picture(record, lambda encoded: flip_bits(encoded, random, random.choice([1, 3, 20])))


def with_size(png: bytes, side: int) -> bytes:
    """A PNG whose header states side x side pixels, with a right checksum."""
    spoilt = bytearray(png)
    spoilt[16:24] = side.to_bytes(4, "big") * 2
    spoilt[29:33] = zlib.crc32(bytes(spoilt[12:29])).to_bytes(4, "big")
    return bytes(spoilt)


CERTAIN = (
    _flipped_frame, _cut_example, _rubbish, _missing_feature, _wrong_type, _wrong_size, _bad_key, _cut_picture, _huge_picture
)  # fmt: skip


def damaged_records(records: list[bytes], count: int, seed: int) -> Iterator[Damaged]:
    """Damage sound records (side-by-side PNG pairs), one kind after the other."""
    random = Random(seed)
    kinds = (*CERTAIN, _flipped_picture)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        yield Damaged(kind.__name__, kind(random.choice(records), random), kind in CERTAIN)


def damaged_pictures(pictures: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Damage picture files: bits, cuts, rubbish at the end and in the middle, headers that lie."""
    random = Random(seed)
    for number in range(count):
        picture = random.choice(pictures)
        place = random.randrange(len(picture))
        yield (
            flip_bits(picture, random, random.choice([1, 5, 50])),
            picture[:place],
            picture[:place] + random.randbytes(40) + picture[place + 40 :],
            with_size(picture, random.choice([0, 20_000, 2**31 - 1])) if picture[1:4] == b"PNG" else picture[: place // 9],
            random.randbytes(random.randrange(300)),
        )[number % 5]
