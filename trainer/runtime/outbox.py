"""Files on their way to a bucket that training does not wait for: what cannot be sent now is counted, said, and sent later."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import BucketAwayError, TrainerError
from trainer.runtime import files
from trainer.storage.bucket import BucketPath
from trainer.storage.places import Place
from trainer.storage.service import Patience

log = logging.getLogger(__name__)
PATIENCE_SECONDS = 10.0
LAST_SEND_SECONDS = 60.0


class Outbox:
    """Files of this machine that wait to be uploaded; each is told by where it goes."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._waiting: dict[BucketPath, Path] = {}
        self._numbers = 0
        self.failures = 0

    @contextmanager
    def adding(self, to: Place) -> Iterator[Path]:
        """Give a path; what is written there is to be sent."""
        assert isinstance(to, BucketPath)
        self._numbers += 1
        self._folder = self._folder or files.scratch()
        file = self._folder / str(self._numbers) / to.name
        file.parent.mkdir()
        yield file
        self.add(to, file)

    def add(self, to: BucketPath, file: Path) -> None:
        """Send this file, which its owner keeps; it takes the place of an earlier one for the same address."""
        self._waiting[to] = file

    def send(self, seconds: float = PATIENCE_SECONDS) -> bool:
        """Try to send all that waits; a bucket that is away ends it for this time, so that training is not held up.

        Returns whether nothing is left.
        """
        seconds = min(seconds, Patience.seconds)
        failure: Exception | None = None
        for to, file in list(self._waiting.items()):
            try:
                to.upload(file, seconds=seconds)
            except (TrainerError, OSError) as error:
                self.failures += 1
                failure = failure or error
                if isinstance(error, BucketAwayError):
                    break
            else:
                self._sent(to, file)
        if failure:
            log.warning("%s; training goes on; waiting to be sent: %d files, tried again later", failure, len(self._waiting))
        return not self._waiting

    def _sent(self, to: BucketPath, file: Path) -> None:
        del self._waiting[to]
        if self._folder and file.is_relative_to(self._folder):
            file.unlink()

    def close(self, seconds: float = LAST_SEND_SECONDS) -> None:
        """Try once more; keep what cannot be sent, and say where."""
        if not self.send(seconds):
            names = ", ".join(str(to) for to in self._waiting)
            log.error("not sent, and lost with this machine's temporary files: %s", names)
