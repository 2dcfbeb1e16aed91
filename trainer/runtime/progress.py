"""What a person sees while it trains: a live bar on a terminal, plain lines elsewhere."""

import logging
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from trainer.runtime.logs import Where
from trainer.runtime.meter import Fed

LINE_EVERY_SECONDS = 10.0
log = logging.getLogger(__name__)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _describe(losses: Mapping[str, float]) -> str:
    names = {"discriminator": "D", "generator_gan": "G", "l1": "L1"}
    return "  ".join(f"{names[name]} {value:.3g}" for name, value in losses.items())


class Progress:
    """Steps done, images/s, the wait for input and what is read, losses (L1 of 255) and time left."""

    def __init__(self, step: int, steps: int, batch_size: int) -> None:
        self._first, self._step, self._steps, self._batch = step, step, steps, batch_size
        self._began = self._spoke = time.monotonic()
        self._terminal = sys.stderr.isatty()
        layout = "{percentage:3.0f}% |{bar:24}| step {n_fmt}/{total_fmt}  {postfix}  left {remaining}"
        self._bar = tqdm(total=steps, initial=step, bar_format=layout, disable=not self._terminal, leave=True)

    def update(self, step: int, images_per_second: float, losses: Mapping[str, float], fed: Fed | None = None) -> None:
        """Show that `step` steps are done."""
        speed = f"{images_per_second:.1f} images/s  " if images_per_second else ""  # the first block compiles
        text = speed + (f"{fed}  " if fed and fed.seconds else "") + _describe(losses)
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._step)
        self._step = Where.step = step
        now = time.monotonic()
        due = now - self._spoke >= LINE_EVERY_SECONDS or step == self._steps
        if not self._terminal and due:
            self._spoke = now
            left = (now - self._began) / max(1, step - self._first) * (self._steps - step)
            log.info("step %d/%d  %s%s", step, self._steps, text, f"  left {_clock(left)}" if speed else "")

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
