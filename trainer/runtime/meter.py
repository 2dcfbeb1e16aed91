"""How fast it goes, how long the devices wait for input, and how many steps make a block of about two seconds."""

import logging
import time
from typing import NamedTuple

SECONDS_PER_BLOCK = 2.0
FADE = 0.7  # what a block counts, once the next one is done
BOUND, RECOVERED = 0.10, 0.05  # shares of the time: above the one it is said, below the other it may be said again
JUDGED_SECONDS = 2.0  # in less, one slow batch would look like a slow input
_ADVICE = (
    "set data.cache=memory or disk, raise data.readers (of a bucket), give it more CPU cores (runtime.threads), "
    "or prepare smaller files: JPEG, at the size that is trained"
)
log = logging.getLogger(__name__)


class Fed(NamedTuple):
    """What the devices were fed with over some blocks: their seconds, seconds of them waited for input, bytes read."""

    seconds: float = 0.0
    waited: float = 0.0
    read: float = 0.0

    @property
    def wait_share(self) -> float:
        """The share of the time that the devices waited for input, 0 to 1."""
        return min(1.0, self.waited / self.seconds) if self.seconds else 0.0

    @property
    def mb_per_second(self) -> float:
        """MB (10^6 bytes) read in a second."""
        return self.read / 1e6 / self.seconds if self.seconds else 0.0

    def plus(self, other: "Fed", weight: float = 1.0) -> "Fed":
        """This and so much of another."""
        return Fed(*(here + weight * there for here, there in zip(self, other, strict=True)))

    def __str__(self) -> str:
        return f"input {100 * self.wait_share:.0f} %  {self.mb_per_second:.1f} MB/s"


class Meter:
    """Times blocks of steps; the first one, which compiles, is left out."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._seconds_per_step: float | None = None
        self._blocks = 0
        self._began = self._recent = self._interval = Fed()

    def start(self, waited: float = 0.0, read: int = 0) -> None:
        """A block begins; so many seconds were waited and so many bytes read before it."""
        self._began = Fed(time.perf_counter(), waited, read)

    def stop(self, steps: int, waited: float = 0.0, read: int = 0) -> None:
        """A block of so many steps is done; newer blocks count more."""
        block = Fed(time.perf_counter(), waited, read).plus(self._began, -1.0)
        self._blocks += 1
        if steps == 0 or self._blocks == 1:
            return
        now = block.seconds / steps
        before = self._seconds_per_step
        self._seconds_per_step = now if before is None else FADE * before + (1.0 - FADE) * now
        self._recent = block.plus(self._recent, FADE)
        self._interval = block.plus(self._interval)

    @property
    def images_per_second(self) -> float:
        """Over the last few blocks; 0 before the second block."""
        return self._batch_size / self._seconds_per_step if self._seconds_per_step else 0.0

    @property
    def fed(self) -> Fed:
        """With what the devices were fed over the last few blocks."""
        return self._recent

    def end_interval(self) -> Fed:
        """With what the devices were fed since the last call."""
        interval, self._interval = self._interval, Fed()
        return interval

    def steps_per_block(self) -> int:
        """Steps that take about two seconds; 1 until a block was timed."""
        return max(1, round(SECONDS_PER_BLOCK / self._seconds_per_step)) if self._seconds_per_step else 1


class InputWatch:
    """Says in one line that the input is too slow for the devices, and again only after it was fast enough."""

    def __init__(self) -> None:
        self._judged = Fed()
        self._said = False

    def look(self, interval: Fed, who: str = "the devices") -> None:
        """Judge an interval between two summaries, together with the ones before it that were too short to be judged."""
        self._judged = self._judged.plus(interval)
        if self._judged.seconds < JUDGED_SECONDS:
            return
        judged, self._judged = self._judged, Fed()
        share = judged.wait_share
        if share > BOUND and not self._said:
            self._said = True
            time_and_speed = f"{100 * share:.0f} % of the last {judged.seconds:.0f} s, {judged.mb_per_second:.1f} MB/s were read"
            log.warning("input-bound: %s waited for input for %s; %s", who, time_and_speed, _ADVICE)
        elif share < RECOVERED and self._said:
            self._said = False
            log.info("the input is fast enough again: %s waited for it for %.0f %% of the time", who, 100 * share)
