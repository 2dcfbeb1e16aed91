"""Progress of long work that is no training: a bar on a terminal, a plain line every ten seconds elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

LINE_EVERY_SECONDS = 10.0
log = logging.getLogger(__name__)
Item = TypeVar("Item")


def counted(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Hand on the items, and show how many of `total` there have been; `what` names the work."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=what, unit="")
        return
    began = spoke = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - spoke >= LINE_EVERY_SECONDS:
            spoke = now
            log.info("%s: %d/%d, %.0f a second", what, number, total, number / (now - began))
