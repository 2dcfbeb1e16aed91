"""How many cores this process may use: those it may run on, and of these what the limit of a container leaves."""

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def _numbers(*files: Path) -> list[int]:
    """The whole numbers in small files; none where one cannot be read, or says `max`."""
    try:
        return [int(word) for file in files for word in file.read_text(encoding="ascii").split()]
    except (OSError, ValueError):
        return []


def quota(cgroups: Path = _CGROUPS) -> int | None:
    """The limit of cpu, rounded up to whole cores; None where there is none.

    More threads than that do not compute more: the kernel stops all of them for the rest of each period.
    """
    folder = cgroups / "cpu"
    second_version = _numbers(cgroups / "cpu.max")
    numbers = second_version or _numbers(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
    if len(numbers) != 2 or min(numbers) <= 0:
        return None
    return -(-numbers[0] // numbers[1])


def usable_cores() -> int:
    """As many threads or processes as can compute at a time."""
    return min(len(os.sched_getaffinity(0)), quota() or os.cpu_count() or 1)
