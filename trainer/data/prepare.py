"""Pairs of pictures -> shards and manifest: all or nothing, the same bytes for the same input.

The headers of all pictures are looked at first; then pairs are decoded and turned into records by several processes, and
written by this one in the order of their keys. Everything is made in OUTPUT.partial, which takes its name when it is whole;
a run that was interrupted finds its finished shards there and goes on.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.counter import counted
from trainer.data import records
from trainer.data.convert import Converted, Headers, convert, read_headers
from trainer.data.images import ImageInfo
from trainer.data.records import ImageSpec, Manifest, Shard
from trainer.data.sources import SPLITS, Listing, list_pairs
from trainer.data.workers import Workers
from trainer.errors import DataError, UserError

PARTIAL_MARK = ".trainer-prepare"
LABEL_SIDES = {"none": (), "input": ("input",), "target": ("target",), "both": ("input", "target")}


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        source, layout: see `sources.list_pairs`.
        output: the folder that will hold the data set.
        labels: which side holds label maps, resized by nearest neighbour: none, input, target or both.
        percent: shares of train, val and test where the source has no such folders.
        shard_bytes: about how large a shard becomes.
        name, origin, licence: told in the manifest.
    """

    source: str
    layout: str
    output: Path
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
    with Workers(processes) as workers:
        headers = list(counted(workers.map(read_headers, listing.pairs), len(listing.pairs), "headers"))
        made_from = digest(headers, options, skip_bad)
        if is_prepared(options.output, made_from):
            return f"{options.output} is prepared already, from the same pictures and flags"
        sound, problems = judge(headers, listing)
        if problems and not skip_bad:
            problems += look_for_damage(workers, sound)
            raise DataError(report(problems, len(listing.pairs)))
        return write(workers, sound, problems, options, made_from, skip_bad)


def digest(headers: Sequence[Headers], options: Options, skip_bad: bool) -> str:
    """Of the pictures' contents and the flags that change the result: the same for a copy of the pictures."""
    pairs = [[item.pair.key, item.pair.split, [path.suffix for path in item.pair.paths], item.checksums] for item in headers]
    flags = [options.layout, options.labels, options.shard_bytes, skip_bad, options.name, options.origin, options.licence]
    return hashlib.sha256(json.dumps([pairs, flags]).encode()).hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def is_there(output: Path) -> bool:
    """Whether the output folder holds a whole data set."""
    return (output / records.MANIFEST_NAME).is_file()


def is_prepared(output: Path, made_from: str) -> bool:
    """Whether the output is this very data set already.

    Raises:
        UserError: something else is there.
    """
    if not output.exists():
        return False
    if not output.is_dir() or (any(output.iterdir()) and not is_there(output)):
        raise UserError(f"--output={output}: is there and is no data set; choose another or remove it")
    if not any(output.iterdir()):
        return False
    if records.read_manifest(output).made_from != made_from:
        raise UserError(f"--output={output}: holds another data set; choose another or remove it")
    return True


def report(problems: list[str], pairs: int) -> str:
    """The problems and what to do."""
    advice = f"{len(problems)} problems in {pairs} pairs; nothing was written. Mend them, or leave them out with --skip_bad"
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


def look_for_damage(workers: Workers, sound: Sequence[Headers]) -> list[str]:
    """Decode the pairs whose headers are sound, so that one report names everything."""
    results = counted(workers.map(convert, sound), len(sound), "decoding")
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
            groups[before * count // max(1, total)].append(item)
            before += size
        filled = [group for group in groups if group]
        names = (records.shard_name(split, index, len(filled)) for index in range(len(filled)))
        planned += [PlannedShard(name, split, group) for name, group in zip(names, filled, strict=True)]
    return planned


def write(workers: Workers, sound: list[Headers], problems: list[str], options: Options, made_from: str, skip_bad: bool) -> str:
    """Write all shards and the manifest, and give them their name.

    Raises:
        DataError: a picture is damaged behind its header and --skip_bad is not given.
    """
    partial = options.output.with_name(options.output.name + ".partial")
    own_partial(partial)
    planned = plan_shards(sound, options.shard_bytes)
    done = [finished_shard(partial, shard, made_from) for shard in planned]
    todo = [item for shard, entry in zip(planned, done, strict=True) if not entry for item in shard.headers]
    results = counted(workers.map(convert, todo), len(todo), "writing")
    splits: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    for shard, entry in zip(planned, done, strict=True):
        written, bad = entry or write_one(partial, shard, results, made_from)
        problems += bad
        splits[shard.split].append(written)
    if problems and not skip_bad:
        shutil.rmtree(partial)
        raise DataError(report(problems, len(sound)))
    manifest = describe(sound, splits, problems, options, made_from)
    publish(partial, manifest, options.output)
    return closing(manifest, options.output)


def own_partial(partial: Path) -> None:
    """Make the folder for what is not finished, or find the one that an interrupted run left.

    Raises:
        UserError: a folder of this name is somebody else's.
    """
    if partial.exists() and not (partial / PARTIAL_MARK).is_file():
        raise UserError(
            f"{partial}: is in the way, and not from an interrupted `trainer prepare`; move it or choose another --output"
        )
    partial.mkdir(parents=True, exist_ok=True)
    (partial / PARTIAL_MARK).touch()


def write_one(partial: Path, shard: PlannedShard, results: Iterator[Converted], made_from: str) -> tuple[Shard, list[str]]:
    """Write one shard from the next results, and note beside it that it is finished."""
    problems: list[str] = []

    def sound_records() -> Iterator[bytes]:
        for _ in shard.headers:
            result = next(results)
            if result.problem:
                problems.append(result.problem)
            else:
                yield result.record

    written = records.write_shard(partial / shard.file, sound_records())
    note = {"made_from": made_from, "shard": written.model_dump(), "problems": problems}
    (partial / f"{shard.file}.json").write_text(json.dumps(note))
    return written, problems


def finished_shard(partial: Path, shard: PlannedShard, made_from: str) -> tuple[Shard, list[str]] | None:
    """What an interrupted run wrote of this shard, if it finished it from the same pictures."""
    note_file = partial / f"{shard.file}.json"
    try:
        note = json.loads(note_file.read_text())
        entry = Shard.model_validate(note["shard"])
        whole = note["made_from"] == made_from and (partial / shard.file).stat().st_size == entry.bytes
        return (entry, note["problems"]) if whole else None
    except (OSError, ValueError, KeyError):
        return None


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
        name=options.name or options.output.name,
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


def publish(partial: Path, manifest: Manifest, output: Path) -> None:
    """Write the manifest, clear the notes away, and rename: from here on the data set exists."""
    if not any(shard.examples for shards in manifest.splits.values() for shard in shards):
        shutil.rmtree(partial)
        raise DataError("\n".join([*manifest.skipped, "no sound pair is left; nothing was written"]))
    named = {shard.file for shards in manifest.splits.values() for shard in shards}
    for path in partial.iterdir():
        if path.name not in named:
            path.unlink()
    records.write_manifest(partial, manifest)
    if output.is_dir():
        output.rmdir()
    partial.replace(output)


def closing(manifest: Manifest, output: Path) -> str:
    """What was made."""
    counts = ", ".join(f"{split} {manifest.examples(split)}" for split in manifest.splits)
    shards = [shard for split in manifest.splits.values() for shard in split]
    lines = [f"left out: {line}" for line in manifest.skipped]
    lines.append(f"{output}: {counts} pairs in {len(shards)} shards, {sum(shard.bytes for shard in shards) / 1e6:.1f} MB")
    if manifest.skipped:
        lines.append(f"{len(manifest.skipped)} left out; dataset.json lists them under `skipped`")
    return "\n".join([*lines, f"next: trainer --data_dir={output} --model_dir=RUN"])
