"""What ran: noted in a run's config.yaml, because the same bits are promised only for the same software and threads."""

import importlib.metadata
import logging
import platform
from collections.abc import Mapping

from trainer import __version__

log = logging.getLogger(__name__)
_TOLD = ("image", "revision")  # by whoever starts a container; the bits do not depend on what it is called
_TENSORFLOWS = ("tensorflow-cpu", "tensorflow", "tensorflow-tpu")


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def run_notes(threads: int, data_digest: str) -> dict[str, str]:
    """Versions, processor, threads and data of this run, by name."""
    return {
        "trainer": __version__,
        "tensorflow": _version(*_TENSORFLOWS),
        "keras": _version("keras"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(threads),
        "data": data_digest,
    }


def warn_of_changes(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Say what differs from the run so far: it goes on, but agrees with an undisturbed run only to rounding."""
    together = "pairs normalised together"
    if before.get(together, now.get(together)) != now.get(together):
        line = "model.norm=batch normalises over %s pairs at a time instead of %s: from here on it is another computation"
        log.warning(line, now.get(together), before.get(together))
    changed = {name: f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]}
    told = [changed.pop(name) for name in _TOLD if name in changed]
    if told:
        log.info("since the run began: %s", ", ".join(told))
    if changed:
        log.warning("since the run began: %s; results will agree to rounding, not bit for bit", ", ".join(changed.values()))


def with_earlier(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """`now`, and the image or revision of before where none is told now, unless the other one shows that it is another."""
    if any(before.get(name, now[name]) != now[name] for name in _TOLD if name in now):
        return dict(now)
    return dict(now) | {name: before[name] for name in _TOLD if name in before and name not in now}
