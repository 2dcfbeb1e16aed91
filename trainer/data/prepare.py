"""Pairs of pictures -> shards and manifest: all or nothing, the same bytes for the same input.

The headers of all pictures are looked at first; then pairs are decoded and turned into records by several processes, and
written by this one in the order of their keys. `outputs` says where: a run that was interrupted finds its finished shards there
and goes on. Pictures and data set may each be here or in a bucket; keys, splits, shards and manifest are the same.
"""

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from trainer.counter import counted
from trainer.data import records
from trainer.data.convert import Converted, Headers, convert, read_headers
from trainer.data.images import ImageInfo
from trainer.data.outputs import Entry, Output, output_at, write_note
from trainer.data.records import ImageSpec, Manifest, Shard
from trainer.data.sources import SPLITS, Found, Listing, list_pairs
from trainer.data.workers import Workers
from trainer.errors import DataError
from trainer.storage.bucket import BucketPath
from trainer.storage.places import Place

KEEP_BYTES = 2_000_000_000  # of pictures of a bucket that are kept here between their header and their record
LABEL_SIDES = {"none": (), "input": ("input",), "target": ("target",), "both": ("input", "target")}


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        source, layout: see `sources.list_pairs`.
        output: the folder that will hold the data set, here or in a bucket.
        labels: which side holds label maps, resized by nearest neighbour: none, input, target or both.
        percent: shares of train, val and test where the source has no such folders.
        shard_bytes: about how large a shard becomes.
        name, origin, licence: told in the manifest.
    """

    source: str
    layout: str
    output: Place
    labels: str = "none"
    percent: tuple[int, ...] = (90, 5, 5)
    shard_bytes: int = 256_000_000
    name: str = ""
    origin: str = ""
    licence: str = "not stated"


@dataclass(frozen=True)
class PlannedShard:
    """A shard before it is written."""

    file: str
    split: str
    headers: list[Headers]


def prepare(options: Options, processes: int = 0, skip_bad: bool = False) -> str:
    """Make the data set; return the closing lines.

    Args:
        options: what is asked for.
        processes: how many read pictures, which changes nothing in the result; 0 for one a core.
        skip_bad: leave bad pairs out instead of refusing all.

    Raises:
        DataError: pairs are bad and --skip_bad is not given: each is named, and nothing is left behind.
        UserError: the output is in use.
    """
    listing = list_pairs(options.source, options.layout, options.percent)
    if not listing.pairs and not listing.problems:
        raise DataError(f"--source={options.source}: no pictures (PNG, JPEG, WebP, BMP, TIFF) of layout {options.layout} in it")
    with room_for_copies(listing) as keep, Workers(processes) as workers:
        read = workers.map(partial(read_headers, keep=keep), listing.pairs)
        headers = list(counted(read, len(listing.pairs), "headers"))
        made_from = digest(headers, options, skip_bad)
        output = output_at(options.output, made_from)
        if output.is_prepared():
            return f"{options.output} is prepared already, from the same pictures and flags"
        sound, problems = judge(headers, listing)
        if problems and not skip_bad:
            problems += look_for_damage(workers, sound, keep)
            raise DataError(report(problems, len(listing.pairs)))
        order = Order(options, made_from, skip_bad, keep)
        return write(workers, sound, problems, order, output)


@contextmanager
def room_for_copies(listing: Listing) -> Iterator[Path | None]:
    """A folder for copies of pictures of a bucket; None if there are none, or too many to be kept: they are downloaded twice."""
    total = sum(path.size for pair in listing.pairs for path in pair.paths if isinstance(path, Found))
    if not 0 < total <= min(KEEP_BYTES, shutil.disk_usage(tempfile.gettempdir()).free // 2):
        yield None
        return
    # Downloads that nobody waits for any more may still be writing there; that is no reason to end otherwise.
    with tempfile.TemporaryDirectory(prefix="trainer-pictures-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def digest(headers: Sequence[Headers], options: Options, skip_bad: bool) -> str:
    """Of the pictures' contents and the flags that change the result: the same for a copy of the pictures."""
    pairs = [[item.pair.key, item.pair.split, [path.suffix for path in item.pair.paths], item.checksums] for item in headers]
    flags = [options.layout, options.labels, options.shard_bytes, skip_bad, options.name, options.origin, options.licence]
    return hashlib.sha256(json.dumps([pairs, flags]).encode()).hexdigest()


def _size(path: Place) -> int:
    if isinstance(path, BucketPath):
        return path.size if isinstance(path, Found) else 0
    return path.stat().st_size if path.is_file() else 0


def report(problems: list[str], pairs: int) -> str:
    """The problems and what to do."""
    found, looked_at = (f"{n} {word}{'s' * (n != 1)}" for n, word in ((len(problems), "problem"), (pairs, "pair")))
    advice = f"{found} in {looked_at}; nothing was written. Mend them, or leave them out with --skip_bad"
    return "\n".join([*problems, advice])


def judge(headers: Sequence[Headers], listing: Listing) -> tuple[list[Headers], list[str]]:
    """The pairs whose headers are sound and of one kind, and a line for each other."""
    problems = listing.problems + [item.problem for item in headers if item.problem]
    sound = [item for item in headers if not item.problem]
    odd: dict[str, str] = {}
    for side in range(max((len(item.infos) for item in sound), default=0)):
        infos = [item.infos[side] for item in sound]
        odd |= {sound[place].pair.key: f"{sound[place].pair.paths[side]}: {why}" for place, why in unlike_most(infos)}
    return [item for item in sound if item.pair.key not in odd], problems + list(odd.values())


def unlike_most(infos: Sequence[ImageInfo]) -> Iterator[tuple[int, str]]:
    """The places of pictures whose depth, or whose having an alpha channel, is not that of most."""
    depth = Counter(info.bit_depth for info in infos).most_common(1)[0][0]
    alpha = Counter(info.channels == 4 for info in infos).most_common(1)[0][0]
    for place, info in enumerate(infos):
        if info.bit_depth != depth:
            yield place, f"has {info.bit_depth} bits, most have {depth}"
        elif (info.channels == 4) != alpha:
            yield place, "has no alpha channel, most have one" if alpha else "has an alpha channel, most have none"


def look_for_damage(workers: Workers, sound: Sequence[Headers], keep: Path | None) -> list[str]:
    """Decode the pairs whose headers are sound, so that one report names everything."""
    results = counted(workers.map(partial(convert, keep=keep), sound), len(sound), "decoding")
    return [result.problem for result in results if result.problem]


def plan_shards(sound: Sequence[Headers], shard_bytes: int) -> list[PlannedShard]:
    """Cut each split, in the order of the keys, into shards of about equal size."""
    planned = []
    for split in SPLITS:
        members = [item for item in sound if item.pair.split == split]
        sizes = [sum(_size(path) for path in item.pair.paths) for item in members]
        total, count = sum(sizes), max(1, -(-sum(sizes) // shard_bytes))
        groups: list[list[Headers]] = [[] for _ in range(count)]
        before = 0
        for item, size in zip(members, sizes, strict=True):
            groups[min(before * count // max(1, total), count - 1)].append(item)
            before += size
        filled = [group for group in groups if group]
        names = (records.shard_name(split, index, len(filled)) for index in range(len(filled)))
        planned += [PlannedShard(name, split, group) for name, group in zip(names, filled, strict=True)]
    return planned


@dataclass(frozen=True)
class Order:
    """What `write` is to do: the options, the digest of what the set is made from, and where copies of pictures are."""

    options: Options
    made_from: str
    skip_bad: bool
    keep: Path | None


def write(workers: Workers, sound: list[Headers], problems: list[str], order: Order, output: Output) -> str:
    """Write all shards and the manifest; return the closing lines.

    Raises:
        DataError: a picture is damaged behind its header and --skip_bad is not given.
    """
    planned = plan_shards(sound, order.options.shard_bytes)
    splits: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    with output.room() as room:
        made = make_shards(workers, planned, output.finished([shard.file for shard in planned]), order, room)
        for shard, (written, bad) in zip(planned, output.keep(made, len(planned)), strict=True):
            problems += bad
            splits[shard.split].append(written)
        if problems and not order.skip_bad:
            output.discard()
            raise DataError(report(problems, len(sound)))
        manifest = describe(sound, splits, problems, order.options, order.made_from)
        if not any(shard.examples for shards in manifest.splits.values() for shard in shards):
            output.discard()
            raise DataError("\n".join([*manifest.skipped, "no sound pair is left; nothing was written"]))
        output.publish(manifest)
    return closing(manifest, order.options.output)


def make_shards(
    workers: Workers, planned: Sequence[PlannedShard], done: Sequence[Entry | None], order: Order, room: Path
) -> Iterator[Entry]:
    """Write the shards that are not done, one for each that is asked for."""
    todo = [item for shard, entry in zip(planned, done, strict=True) if not entry for item in shard.headers]
    results = counted(workers.map(partial(convert, keep=order.keep), todo), len(todo), "writing")
    for shard, entry in zip(planned, done, strict=True):
        yield entry or write_one(room, shard, results, order.made_from)


def write_one(folder: Path, shard: PlannedShard, results: Iterator[Converted], made_from: str) -> Entry:
    """Write one shard from the next results, and note beside it that it is finished."""
    problems: list[str] = []

    def sound_records() -> Iterator[bytes]:
        for _ in shard.headers:
            result = next(results)
            if result.problem:
                problems.append(result.problem)
            else:
                yield result.record

    entry = records.write_shard(folder / shard.file, sound_records()), problems
    write_note(folder, entry, made_from)
    return entry


def describe(
    sound: Sequence[Headers], splits: dict[str, list[Shard]], problems: list[str], options: Options, made_from: str
) -> Manifest:
    """The manifest of what was written."""
    layout: Literal["pair", "separate"] = "pair" if sound and sound[0].pair.target is None else "separate"
    sides = [[item.infos[min(side, len(item.infos) - 1)] for item in sound] for side in (0, 1)]
    kinds = LABEL_SIDES[options.labels]
    specs = [
        side_spec(infos, "labels" if side in kinds else "photo") for infos, side in zip(sides, ("input", "target"), strict=True)
    ]
    return Manifest(
        version=1,
        name=options.name or options.output.name or str(options.output),
        source=options.origin or options.source,
        licence=options.licence,
        layout=layout,
        input=specs[0],
        target=specs[1],
        splits={split: shards for split, shards in splits.items() if shards},
        skipped=problems,
        made_from=made_from,
    )


def side_spec(infos: Sequence[ImageInfo], kind: Literal["photo", "labels"]) -> ImageSpec:
    """What the pictures of one side have in common: grey among colour counts as colour."""
    channels = max(info.channels for info in infos)
    return ImageSpec.model_validate({"kind": kind, "channels": channels, "bit_depth": infos[0].bit_depth})


def closing(manifest: Manifest, output: Place) -> str:
    """What was made."""
    counts = ", ".join(f"{split} {manifest.examples(split)}" for split in manifest.splits)
    shards = [shard for split in manifest.splits.values() for shard in split]
    lines = [f"left out: {line}" for line in manifest.skipped]
    lines.append(f"{output}: {counts} pairs in {len(shards)} shards, {sum(shard.bytes for shard in shards) / 1e6:.1f} MB")
    if manifest.skipped:
        lines.append(f"{len(manifest.skipped)} left out; dataset.json lists them under `skipped`")
    return "\n".join([*lines, f"next: trainer --data_dir={output} --model_dir=RUN"])
