"""A run's folder in a bucket: a lease in place of the lock, and metrics written under a condition."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.api_core.exceptions import PreconditionFailed

from trainer.errors import ExitCode
from trainer.runtime import files
from trainer.runtime.bucket_checkpoints import BucketCheckpoints
from trainer.runtime.checkpoints import Checkpoints
from trainer.runtime.lease import Lease, this_process
from trainer.runtime.outbox import Outbox
from trainer.runtime.pictures import save_grid
from trainer.runtime.run_folder import Columns, RunFolder
from trainer.storage.bucket import BucketPath
from trainer.storage.places import Place

log = logging.getLogger(__name__)


class BucketFolder(RunFolder):
    """A run's folder in a bucket: a lease in place of the lock, and metrics.jsonl written as a whole, if nobody else has."""

    path: BucketPath
    _lock_name = ".lease"

    def __init__(self, path: BucketPath, checkpoints: Place | None = None, summaries: Place | None = None) -> None:
        super().__init__(path, checkpoints, summaries)
        self.path = path
        self.lease: Lease | None = None
        self._outbox = Outbox()
        self._scratch: Path | None = None
        self._metrics: tuple[str, int] | None = None
        self._store: BucketCheckpoints | None = None

    @property
    def sample_data(self) -> Path:
        """A folder in TMPDIR: the sample is in the package, so no bucket needs to hold it."""
        self._scratch = self._scratch or files.scratch()
        return self._scratch / "data"

    def claim(self, seconds: float = 0.0, job: str = "") -> "BucketFolder":
        """Take the lease, and metrics.jsonl from whoever wrote it before.

        Raises:
            UserError: another process is training in it.
        """
        self.lease = Lease(self.path / self._lock_name, this_process(job)).take()
        self.token = self.lease.token
        self._metrics = taken_over(self.metrics_object)
        return self

    def store(self, keep: int) -> Checkpoints:
        """The run's checkpoints, taken over from whoever wrote them before."""
        assert isinstance(self.checkpoints, BucketPath)
        self._store = self._store or BucketCheckpoints(self.checkpoints, keep, self.lease)
        return self._store

    def check_claim(self) -> None:
        """Raises: LostClaimError: another process has taken the run over."""
        if self.lease:
            self.lease.check()

    def confirm_claim(self) -> None:
        """Raises: LostClaimError, BucketAwayError."""
        if self.lease:
            self.lease.confirm()

    @property
    def metrics_object(self) -> BucketPath:
        """metrics.jsonl."""
        return self.path / self.metrics_file.name

    def _metrics_text(self) -> str:
        return self._metrics[0] if self._metrics else self.metrics_object.read_versioned()[0].decode()

    def _write_metrics(self, text: str) -> None:
        assert self.lease is not None
        assert self._metrics is not None
        try:
            state = self.metrics_object.write_bytes(text.encode(), self._metrics[1])
        except PreconditionFailed as error:
            raise self.lease.lose(self.metrics_object) from error
        self._metrics = (text, state.generation)

    def add_metrics(self, entry: dict[str, Any]) -> None:
        """Write metrics.jsonl with one more line."""
        self._write_metrics(self._metrics_text() + json.dumps(entry) + "\n")

    def save_sample(self, step: int, columns: Callable[[], Columns]) -> None:
        """Draw the sample picture of a step, and send it; what cannot be sent now is sent with the next."""
        pictures = columns()
        try:
            with self._outbox.adding(self.samples / f"step-{step:07d}.png") as file:
                save_grid(file, f"step {step}", pictures)
        except OSError as error:
            log.warning("step %d: its pictures are left out: %s; training goes on", step, error)
        self._outbox.send()

    def close(self) -> None:
        """Send the pictures that are left."""
        self._outbox.close()

    def record_failure(self, line: str, exit_code: ExitCode, fingerprint: str) -> None:
        """Leave the marker, if the run is still this process's."""
        self.confirm_claim()
        super().record_failure(line, exit_code, fingerprint)


def taken_over(place: BucketPath) -> tuple[str, int]:
    """Write an object anew as it is, so that it has a generation that an earlier writer does not know; the text and that."""
    while True:
        content, generation = place.read_versioned()
        try:
            return content.decode(), place.write_bytes(content, generation).generation
        except PreconditionFailed:  # the earlier writer was faster; once more
            continue
