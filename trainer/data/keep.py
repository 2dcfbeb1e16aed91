"""Records that are kept after their first read, in memory or in a file of this machine, and which of the two has room."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

from trainer.config import DataConfig
from trainer.data import records
from trainer.data.records import Manifest
from trainer.data.shards import Run, Shards
from trainer.errors import TrainerError
from trainer.storage.places import Place

MEMORY_SHARE, DISK_SHARE = 1 / 4, 1 / 2
Cache = Literal["none", "memory", "disk"]
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60
log = logging.getLogger(__name__)


class Store(Protocol):
    """Where records are kept, by their numbers."""

    def get(self, number: int) -> bytes | None:
        """A record, if it is kept."""

    def put(self, number: int, record: bytes) -> None:
        """Keep a record.

        Raises:
            TrainerError: there is no room for it.
        """

    def has(self, run: Run) -> bool:
        """Whether all records of a run are kept."""


class InMemory:
    """Records in memory."""

    def __init__(self) -> None:
        self._kept: dict[int, bytes] = {}

    def get(self, number: int) -> bytes | None:
        """A record, if it is kept."""
        return self._kept.get(number)

    def put(self, number: int, record: bytes) -> None:
        """Keep a record."""
        self._kept[number] = record

    def has(self, run: Run) -> bool:
        """Whether all records of a run are kept."""
        return all(number in self._kept for number in range(*run))


class OnDisk:
    """Records in one file without a name: its space is free again when this process ends, in whatever way.

    They lie in it as in the shards, frames and checksums with them, so that a fault of the disk is found.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards, self._kept = shards, bytearray(shards.examples)
        self._file = tempfile.TemporaryFile(prefix="trainer-")  # noqa: SIM115 - it is open as long as this object lives

    def get(self, number: int) -> bytes | None:
        """A record, if it is kept; one that the disk has changed is not."""
        if not self._kept[number]:
            return None
        size = self._shards.size(Run(number, number + 1))
        try:
            framed = os.pread(self._file.fileno(), size, int(self._shards.positions[number]))
            record = records.unframe(framed, size)
        except (OSError, ValueError) as error:
            log.warning("%s: cannot be read from %s (%s)", self._shards.describe(number), tempfile.gettempdir(), error)
            self._kept[number] = 0
            return None
        self._shards.count(size)
        return record

    def put(self, number: int, record: bytes) -> None:
        """Keep a record.

        Raises:
            TrainerError: there is no room for it.
        """
        framed = records.frame(record)
        try:
            written = os.pwrite(self._file.fileno(), framed, int(self._shards.positions[number]))
        except OSError as error:
            where = tempfile.gettempdir()
            raise TrainerError(f"{where}: {error.strerror}; make room, set TMPDIR to another disk, or data.cache=none") from error
        self._kept[number] = written == len(framed)

    def has(self, run: Run) -> bool:
        """Whether all records of a run are kept."""
        return all(self._kept[run.first : run.end])


def choose(config: DataConfig, folder: Place, manifest: Manifest) -> Cache:
    """Where the records of a data set are kept.

    Args:
        config: what was asked for; `auto` keeps a bucket's data where there is room for all of it, and a folder's not at all.
        folder: a folder is on a disk already, so that its records are not copied to another.
        manifest: says how much there is.
    """
    if isinstance(folder, Path):
        return "memory" if config.cache == "memory" else "none"
    if config.cache != "auto":
        return config.cache
    size = sum(shard.bytes for shards in manifest.splits.values() for shard in shards)
    choice, why = _roomiest(size)
    log.info("data.cache: %s: %s has %s, %s", choice, folder, shown(size), why)
    return choice


def _roomiest(size: int) -> tuple[Cache, str]:
    memory, disk = memory_limit(), free_disk()
    if size <= memory * MEMORY_SHARE:
        return "memory", f"no more than a quarter of the {shown(memory)} of memory"
    if size <= disk * DISK_SHARE:
        return "disk", f"no more than half of the {shown(disk)} that are free in {tempfile.gettempdir()}"
    return "none", f"more than a quarter of the {shown(memory)} of memory and half of the {shown(disk)} of disk"


def shown(size: int) -> str:
    """`2.3 MB`."""
    unit = next(power for power in (9, 6, 3, 0) if size >= 10**power or not power)
    return f"{size / 10**unit:.{1 if unit else 0}f} {({9: 'GB', 6: 'MB', 3: 'kB', 0: 'bytes'})[unit]}"


def memory_limit() -> int:
    """Bytes of memory that this process may take: the machine's, or what its control group is allowed."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_limits_of_groups()])


def _limits_of_groups(root: Path = _CONTROL_GROUPS, own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """The limits of all control groups that this process is in, of both versions; inside a container its own is the root."""
    lines = own.read_text().splitlines() if own.is_file() else []
    groups = {kinds: group.strip("/") for _, kinds, group in (line.split(":", 2) for line in lines)}
    for folder, group, name in (
        (root, groups.get("", ""), "memory.max"),
        (root / "memory", groups.get("memory", ""), "memory.limit_in_bytes"),
    ):
        for place in (folder / group, *(folder / group).parents):
            if place.is_relative_to(folder) and (place / name).is_file():
                text = (place / name).read_text().strip()
                yield int(text) if text.isdigit() else _NO_LIMIT


def free_disk() -> int:
    """Bytes free in the folder for temporary files; none where that folder is in memory."""
    folder = Path(tempfile.gettempdir()).resolve()
    return 0 if file_system(folder) in ("tmpfs", "ramfs") else shutil.disk_usage(folder).free


def file_system(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The kind of file system that a folder is on; empty where the system does not tell."""
    lines = [line.split()[1:3] for line in mounts.read_text().splitlines()] if mounts.is_file() else []
    above = [(len(Path(where).parts), kind) for where, kind in lines if folder.is_relative_to(where)]
    return sorted(above, key=lambda found: found[0])[-1][1] if above else ""
