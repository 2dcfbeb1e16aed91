"""Scalars for TensorBoard, and the cut that takes back what was logged after the restored step."""

import logging
from collections.abc import Mapping
from pathlib import Path

import tensorflow as tf

from trainer.runtime import files

log = logging.getLogger(__name__)


class Summaries:
    """One event file for each of `train` and `val`, made at its first scalar."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, tf.summary.SummaryWriter] = {}

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Write scalars under summaries/`kind`."""
        if kind not in self._writers:
            self._writers[kind] = tf.summary.create_file_writer(str(self._folder / kind))
        with self._writers[kind].as_default():
            for name, value in values.items():
                tf.summary.scalar(name, value, step)

    def cut_after(self, step: int) -> None:
        """Drop every event after `step` from all event files, and the torn end that a kill may leave."""
        for path in sorted(self._folder.glob("*/events.out.tfevents.*")):
            kept, whole = _events_until(path, step)
            if not whole:
                with files.replacing(path) as temporary, tf.io.TFRecordWriter(str(temporary)) as writer:
                    for event in kept:
                        writer.write(event)

    def flush(self) -> None:
        """Hand everything written so far to the file system."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Flush and close the files."""
        for writer in self._writers.values():
            writer.close()


class NullSummaries(Summaries):
    """What workers other than the chief hold: it writes nowhere."""

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """The chief writes them."""

    def cut_after(self, step: int) -> None:
        """The chief does it."""


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
