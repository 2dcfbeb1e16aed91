"""tf.train.Checkpoint <-> files. A checkpoint counts only once whole: its marker is written last and names every byte.

checkpoints/step-00001000-1.index and .data-*    what tf.train.Checkpoint wrote; the last number tells tries apart
checkpoints/step-00001000.json                   the marker: sizes and CRC-32C of those files
checkpoints/best.json                            which step had the lowest validation L1
"""

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import tensorflow as tf

from trainer.errors import TrainerError, UserError
from trainer.runtime import files

log = logging.getLogger(__name__)
_BLOCK = 1 << 22
NOT_OURS = (tf.errors.NotFoundError, tf.errors.InvalidArgumentError, tf.errors.DataLossError)


@dataclass(frozen=True)
class Marker:
    """What is known of one checkpoint without opening it.

    Attributes:
        step: the steps that were done.
        pending: true if what is due at this step (summaries, evaluation) had not been done yet.
        prefix: the path that tf.train.Checkpoint reads, relative to the folder.
        files: size in bytes and CRC-32C of each file, by name.
    """

    step: int
    pending: bool
    prefix: str
    files: dict[str, tuple[int, str]]


def _checksum(path: Path) -> str:
    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum.update(block)
    return bytes(checksum.digest()).hex()


class Checkpoints:
    """The checkpoints of one run, in one folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def _marker_path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.json"

    def markers(self) -> list[Marker]:
        """All markers that can be read, oldest first; whether their files are whole is not looked at."""
        found = [self._read_marker(path) for path in sorted(self.folder.glob("step-*.json"))]
        return [marker for marker in found if marker is not None]

    def _read_marker(self, path: Path) -> Marker | None:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            stated = {name: (int(size), str(crc)) for name, (size, crc) in document["files"].items()}
            return Marker(int(document["step"]), bool(document["pending"]), str(document["prefix"]), stated)
        except FileNotFoundError:  # a run that goes on meanwhile has removed it
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s: not a checkpoint marker (%s); it is passed over", path, error)
            return None

    def damage(self, marker: Marker) -> str | None:
        """What is wrong with a checkpoint's files, or None if each has the size and checksum that the marker states."""
        for name, (size, crc) in marker.files.items():
            path = self.folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _checksum(path) != crc:
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
            reason = error.strerror if isinstance(error, OSError) else error.message.splitlines()[0]
            raise TrainerError(f"{self.folder}: the checkpoint of step {step} could not be saved: {reason}") from error
        self.clean()

    def _write(self, state: tf.train.Checkpoint, step: int, pending: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        prefix = self._unused_prefix(step)
        state.write(str(self.folder / prefix))
        written = sorted(self.folder.glob(f"{prefix}.*"))
        for path in written:
            files.sync(path)
        stated = {path.name: (path.stat().st_size, _checksum(path)) for path in written}
        marker = Marker(step, pending, prefix, stated)
        files.write_text(self._marker_path(step), json.dumps(marker.__dict__, indent=1) + "\n")

    def _unused_prefix(self, step: int) -> str:
        stem = f"step-{step:08d}"
        used = [int(match[1]) for path in self.folder.glob(f"{stem}-*") if (match := re.match(rf"{stem}-(\d+)", path.name))]
        return f"{stem}-{max(used, default=0) + 1}"

    def restore(self, state: tf.train.Checkpoint, marker: Marker) -> None:
        """Load a checkpoint into the state; every variable must be in it, and nothing else.

        Raises:
            UserError: the checkpoint is of other networks.
        """
        try:
            state.read(str(self.folder / marker.prefix)).assert_consumed()
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
        """Remove the markers of later steps, which were found damaged; `clean` then removes their files."""
        for marker in self.markers():
            if marker.step > step:
                self._marker_path(marker.step).unlink()

    def clean(self) -> None:
        """Keep the newest and the best; remove older ones, and the files of saves that never finished."""
        markers = self.markers()
        kept = {marker.step for marker in markers[-self._keep :]} | {self.best_step()}
        for marker in markers:
            if marker.step not in kept:
                self._marker_path(marker.step).unlink()
        named = {name for marker in markers if marker.step in kept for name in marker.files}
        for path in self.folder.glob("step-*-*"):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in named:
                path.unlink()

    def best_step(self) -> int | None:
        """The step that best.json names; None without one."""
        path = self.folder / "best.json"
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return document.get("step")

    def mark_best(self, step: int | None, l1: float | None) -> None:
        """Note which step is the best so far; None takes the note away."""
        path = self.folder / "best.json"
        if step is None:
            path.unlink(missing_ok=True)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write_text(path, json.dumps({"step": step, "val_l1": l1}) + "\n")


class NonChiefCheckpoints(Checkpoints):
    """The checkpoints as workers other than the chief hold them: they restore, and leave the rest to the chief."""

    def save(self, state: tf.train.Checkpoint, step: int, *, pending: bool = False) -> None:
        """The chief saves: the state is the same on all."""

    def forget_after(self, step: int) -> None:
        """The chief does it."""

    def clean(self) -> None:
        """The chief does it."""

    def mark_best(self, step: int | None, l1: float | None) -> None:
        """The chief does it."""
