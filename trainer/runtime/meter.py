"""How fast it goes, and how many steps make a block of about two seconds."""

import time

SECONDS_PER_BLOCK = 2.0


class Meter:
    """Times blocks of steps; the first one, which compiles, is left out."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._seconds_per_step: float | None = None
        self._blocks = 0
        self._began = 0.0

    def start(self) -> None:
        """A block begins."""
        self._began = time.perf_counter()

    def stop(self, steps: int) -> None:
        """A block of so many steps is done; newer blocks count more."""
        seconds = time.perf_counter() - self._began
        self._blocks += 1
        if steps == 0 or self._blocks == 1:
            return
        now = seconds / steps
        before = self._seconds_per_step
        self._seconds_per_step = now if before is None else 0.7 * before + 0.3 * now

    @property
    def images_per_second(self) -> float:
        """Over the last few blocks; 0 before the second block."""
        return self._batch_size / self._seconds_per_step if self._seconds_per_step else 0.0

    def steps_per_block(self) -> int:
        """Steps that take about two seconds; 1 until a block was timed."""
        return max(1, round(SECONDS_PER_BLOCK / self._seconds_per_step)) if self._seconds_per_step else 1
