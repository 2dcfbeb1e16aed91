"""Scalars for TensorBoard, and the cut that takes back what was logged after the restored step.

An object cannot be appended to: each flush sends the whole event file again. So a bucket is sent to seldom, and a file that has
grown is followed by a new one.
"""

import errno
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import tensorflow as tf

from trainer.errors import BucketAwayError, TrainerError
from trainer.runtime import files
from trainer.runtime.outbox import Outbox
from trainer.storage.bucket import BucketPath
from trainer.storage.places import Place

log = logging.getLogger(__name__)
SEND_SECONDS = 60.0
ROTATE_BYTES = 4 << 20


@contextmanager
def _as_error_of_the_system(folder: Path) -> Iterator[None]:
    """Let TensorFlow's error, of a full disk for one, be what it is: an error of the system about this folder."""
    try:
        yield
    except tf.errors.OpError as error:
        code = errno.ENOSPC if os.strerror(errno.ENOSPC) in error.message else errno.EIO
        raise OSError(code, os.strerror(code), str(folder)) from error


class Summaries:
    """One event file for each of `train` and `val`, made at its first scalar."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, tf.summary.SummaryWriter] = {}

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Write scalars under summaries/`kind`."""
        with _as_error_of_the_system(self._folder):
            if kind not in self._writers:
                self._writers[kind] = tf.summary.create_file_writer(str(self._folder / kind))
            with self._writers[kind].as_default():
                for name, value in values.items():
                    tf.summary.scalar(name, value, step)

    def cut_after(self, step: int) -> None:
        """Drop every event after `step` from all event files, and the torn end that a kill may leave."""
        for path in sorted(self._folder.glob("*/events.out.tfevents.*")):
            _cut(path, step)

    def flush(self) -> None:
        """Hand everything written so far to the file system."""
        with _as_error_of_the_system(self._folder):
            for writer in self._writers.values():
                writer.flush()

    def close(self) -> None:
        """Flush and close the files."""
        with _as_error_of_the_system(self._folder):
            for writer in self._writers.values():
                writer.close()


class BucketSummaries(Summaries):
    """Event files in TMPDIR, copied to a bucket every minute and at each checkpoint; a copy that fails never stops training."""

    def __init__(self, folder: BucketPath, confirm: Callable[[], None]) -> None:
        """`confirm` raises if another process has taken the run over: its event files must not be put back."""
        self._confirm = confirm
        super().__init__(files.scratch())
        self._there, self._outbox = folder, Outbox()
        self._sent, self._sizes = time.monotonic(), dict[Path, int]()

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Write scalars; send them if it is a minute since the last time."""
        super().scalars(kind, values, step)
        if time.monotonic() - self._sent > SEND_SECONDS:
            self.flush()

    def cut_after(self, step: int) -> None:
        """Drop every event after `step` from the bucket's event files: those that hold one are written anew."""
        with tempfile.TemporaryDirectory() as folder:
            for name in sorted(self._there.listing()):
                if ".tfevents." not in name:
                    continue
                there, copy = self._there / name, Path(folder) / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                there.download(copy)
                if _cut(copy, step):
                    there.upload(copy)

    def flush(self) -> None:
        """Send what has changed; begin new files where they have grown."""
        self._sent = time.monotonic()
        try:
            super().flush()
            self._post()
            self._confirm()
        except (BucketAwayError, OSError, tf.errors.OpError) as error:
            log.warning("%s; training goes on, its summaries are sent later", error)
        else:
            self._outbox.send()

    def _post(self) -> None:
        for file in sorted(self._folder.glob("*/events.out.tfevents.*")):
            size = file.stat().st_size
            if size != self._sizes.get(file):
                self._sizes[file] = size
                self._outbox.add(self._there / file.relative_to(self._folder), file)
            if size > ROTATE_BYTES and (writer := self._writers.pop(file.parent.name, None)):
                writer.close()

    def close(self) -> None:
        """Close the files and send what is left."""
        try:
            super().close()
            self._post()
            self._confirm()
        except (TrainerError, OSError, tf.errors.OpError) as error:
            log.warning("%s; the last summaries are not sent", error)
        else:
            self._outbox.close()


def open_summaries(folder: Place, confirm: Callable[[], None], *, writes: bool) -> Summaries:
    """The summaries of a run, for a process that writes them or for one that does not."""
    if not writes:
        return NullSummaries(Path())
    return Summaries(folder) if isinstance(folder, Path) else BucketSummaries(folder, confirm)


class NullSummaries(Summaries):
    """What workers other than the chief hold: it writes nowhere."""

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """The chief writes them."""

    def cut_after(self, step: int) -> None:
        """The chief does it."""


def _cut(path: Path, step: int) -> bool:
    """Write an event file anew without later events; whether that was needed."""
    kept, whole = _events_until(path, step)
    if not whole:
        with files.replacing(path) as temporary, tf.io.TFRecordWriter(str(temporary)) as writer:
            for event in kept:
                writer.write(event)
    return not whole


def _events_until(path: Path, step: int) -> tuple[list[bytes], bool]:
    """The events of steps up to `step`, and whether that is all that the file holds."""
    kept, whole = [], True
    try:
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            if tf.compat.v1.Event.FromString(record).step <= step:
                kept.append(record)
            else:
                whole = False
    except tf.errors.DataLossError:
        log.info("%s: its last event was cut short when the run was killed; dropped", path)
        whole = False
    return kept, whole
