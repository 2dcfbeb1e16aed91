"""tf.train.Checkpoint <-> files or objects. A checkpoint counts only once whole: its marker comes last and names every byte.

checkpoints/step-00001000-1.index and .data-*    what tf.train.Checkpoint wrote; the last part tells tries apart
checkpoints/step-00001000.json, best.json        here: the markers, and which step had the lowest validation L1
checkpoints/checkpoints.json                     in a bucket: both, in one object
"""

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tensorflow as tf

from trainer.errors import TrainerError, UserError
from trainer.runtime.ledger import FolderLedger, Ledger, Marker
from trainer.storage.bucket import checksum_of
from trainer.storage.places import Place, sync

log = logging.getLogger(__name__)
NOT_OURS = (tf.errors.NotFoundError, tf.errors.InvalidArgumentError, tf.errors.DataLossError)


class Checkpoints:
    """The checkpoints of one run, in a folder of this machine."""

    folder: Place

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder: Place = folder
        self._here, self._keep = folder, keep
        self._ledger: Ledger = FolderLedger(folder)

    def markers(self) -> list[Marker]:
        """All that are noted, oldest first; whether their files are whole is not looked at."""
        return self._ledger.markers()

    def damage(self, marker: Marker) -> str | None:
        """What is wrong with a checkpoint's files, or None if each has the size and checksum that the marker states."""
        for name, (size, crc) in marker.files.items():
            path = self._here / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if checksum_of(path) != crc:
                return f"{name} does not match its checksum"
        return None

    def newest_whole(self) -> Marker | None:
        """The newest checkpoint whose files are all there, byte for byte; says which newer ones were passed over.

        Raises:
            UserError: there are checkpoints and none of them is whole.
        """
        markers = self.markers()
        for marker in reversed(markers):
            problem = self.damage(marker)
            if problem is None:
                return marker
            log.warning("checkpoint of step %d is damaged (%s); looking for an older one", marker.step, problem)
        if markers:
            raise UserError(f"{self.folder}: no checkpoint in it is whole; use another --model_dir, or empty this one")
        return None

    def marker(self, prefix: str) -> Marker | None:
        """The marker of a checkpoint by its prefix, if it is there."""
        return next((marker for marker in self.markers() if marker.prefix == prefix), None)

    def save(self, state: tf.train.Checkpoint, step: int, *, pending: bool = False) -> None:
        """Write the state, then the marker; then what is no longer kept goes.

        Raises:
            TrainerError: it could not be written; older checkpoints are untouched.
        """
        try:
            self._write(state, step, pending)
        except (OSError, tf.errors.OpError) as error:
            raise TrainerError(f"{self.folder}: the checkpoint of step {step} could not be saved: {_why(error)}") from error
        self.clean()

    def _no_longer_kept(self, markers: list[Marker]) -> list[int]:
        """The steps whose checkpoints go: all but the newest and the best."""
        kept = {marker.step for marker in markers[-self._keep :]} | {self.best_step()}
        return [marker.step for marker in markers if marker.step not in kept]

    def _write(self, state: tf.train.Checkpoint, step: int, pending: bool) -> None:
        self._here.mkdir(parents=True, exist_ok=True)
        prefix = self._unused_prefix(step)
        state.write(str(self._here / prefix))
        written = sorted(self._here.glob(f"{prefix}.*"))
        for path in written:
            sync(path)
        stated = {path.name: (path.stat().st_size, checksum_of(path)) for path in written}
        self._ledger.change(Marker(step, pending, prefix, stated), ())

    def _unused_prefix(self, step: int) -> str:
        stem = f"step-{step:08d}"
        used = [int(match[1]) for path in self._here.glob(f"{stem}-*") if (match := re.match(rf"{stem}-(\d+)", path.name))]
        return f"{stem}-{max(used, default=0) + 1}"

    @contextmanager
    def reading(self, marker: Marker) -> Iterator[str]:
        """The prefix that tf.train.Checkpoint reads a checkpoint by."""
        yield str(self._here / marker.prefix)

    def restore(self, state: tf.train.Checkpoint, marker: Marker) -> None:
        """Load a checkpoint into the state; every variable must be in it, and nothing else.

        Raises:
            UserError: the checkpoint is of other networks.
        """
        try:
            with self.reading(marker) as prefix:
                state.read(prefix).assert_consumed()
        except (AssertionError, ValueError, *NOT_OURS) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{self.folder / marker.prefix}: is not a checkpoint of these networks: {reason}") from error

    def choose(self, which: str) -> Marker:
        """The newest whole checkpoint, or the one with the best evaluation: `newest` or `best`.

        Raises:
            UserError: there is none, or it is damaged.
        """
        best = self.best_step()
        if which == "best" and best is not None:
            marker = next((marker for marker in self.markers() if marker.step == best), None)
            problem = self.damage(marker) if marker else "it is not there"
            if marker is None or problem:
                raise UserError(f"{self.folder}: the best checkpoint, of step {best}, cannot be used: {problem}")
            return marker
        newest = self.newest_whole()
        if newest is None:
            raise UserError(f"{self.folder}: no checkpoint in it yet; train first")
        return newest

    def forget_after(self, step: int) -> None:
        """Drop the markers of later steps, which were found damaged; `clean` then removes their files."""
        later = [marker.step for marker in self.markers() if marker.step > step]
        if later:
            self._ledger.change(None, later)

    def clean(self) -> None:
        """Keep the newest and the best; remove older ones, and the files of saves that never finished."""
        dropped = self._no_longer_kept(self.markers())
        if dropped:
            self._ledger.change(None, dropped)
        named = {name for marker in self.markers() for name in marker.files}
        for path in self._here.glob("step-*-*"):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in named:
                path.unlink()

    def best_step(self) -> int | None:
        """The step with the lowest validation L1; None without one."""
        return self._ledger.best_step()

    def mark_best(self, step: int | None, l1: float | None) -> None:
        """Note which step is the best so far; None takes the note away."""
        self._ledger.mark_best(step, l1)


def _why(error: OSError | tf.errors.OpError) -> str:
    """The reason in a few words; TensorFlow's own are many, and a full disk is the usual one."""
    text = error.strerror or str(error) if isinstance(error, OSError) else error.message.splitlines()[0]
    if "No space left" in text:
        return "no space left there (or in TMPDIR, for a bucket); free some, or lower train.keep, and give the same command again"
    return re.sub(r"\{\{.*?\}\}|\[Op:.*?\]", "", text).strip()


class WritesNothing:
    """What workers other than the chief do where the chief writes: the state is the same on all."""

    def save(self, state: tf.train.Checkpoint, step: int, *, pending: bool = False) -> None:
        """The chief saves."""

    def forget_after(self, step: int) -> None:
        """The chief does it."""

    def clean(self) -> None:
        """The chief does it."""

    def mark_best(self, step: int | None, l1: float | None) -> None:
        """The chief does it."""


class NonChiefCheckpoints(WritesNothing, Checkpoints):
    """The checkpoints as workers other than the chief hold them: they restore, and leave the rest to the chief."""
