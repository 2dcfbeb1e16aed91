"""A prepared data set against its manifest: every byte, every record, every picture."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from trainer.counter import counted
from trainer.data import records
from trainer.data.records import Manifest, Shard
from trainer.data.split import Split
from trainer.errors import DataError
from trainer.storage.places import Place, checksum

RECORDS_AT_ONCE = 512


def verify(folder: Place, threads: int) -> tuple[Manifest, list[str]]:
    """Check sizes, checksums, records and pictures; return the manifest and a line for each thing that is wrong.

    Raises:
        DataError: there is no manifest to check against, or it is wrong itself.
        TrainerError: the bucket is away, or refuses.
    """
    manifest = records.read_manifest(folder)
    problems: list[str] = []
    for name, shards in manifest.splits.items():
        if absent := records.size_problems(folder, shards):
            problems += absent
            continue
        changed = [problem for shard in shards if (problem := checksum_problem(folder, shard))]
        split = Split(folder, manifest, name)
        answers = counted(record_problems(split, threads), split.examples, f"checking {name}")
        problems += [str(answer) for answer in answers if answer] or changed
    return manifest, problems


def checksum_problem(folder: Place, shard: Shard) -> str | None:
    """A line if a shard's bytes are not those that the manifest was written for; of an object the service knows the checksum."""
    path = folder / shard.file
    return None if checksum(path) == shard.crc32c else f"{path}: does not match the manifest's checksum; copy it again"


def record_problems(split: Split, threads: int) -> Iterator[DataError | None]:
    """Read and decode each record of a split, several at a time; one answer for each, in order."""
    problem_of = partial(split.problem_of, reader=split.in_turn(range(split.examples)))
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, split.examples, RECORDS_AT_ONCE):
            yield from pool.map(problem_of, range(start, min(start + RECORDS_AT_ONCE, split.examples)))
