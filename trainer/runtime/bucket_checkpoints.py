"""Checkpoints in a bucket: made in TMPDIR, uploaded, checked by what the service reports, and listed last."""

import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tensorflow as tf

from trainer.errors import UserError
from trainer.runtime.checkpoints import Checkpoints, WritesNothing
from trainer.runtime.lease import Lease, LostClaimError
from trainer.runtime.ledger import LIST_NAME, Ledger, Marker, ObjectLedger
from trainer.storage.bucket import BucketPath, State
from trainer.storage.places import Place

_OURS = re.compile(r"step-\d{8}-[0-9a-f]+\..*")


class BucketCheckpoints(Checkpoints):
    """The checkpoints of one run, in a bucket: made in TMPDIR, uploaded, and listed last.

    A save of a small checkpoint is five requests: two uploads, the list, and two removals of what is no longer kept. A large file
    is uploaded in parts of 32 MiB, and each part is a request more.
    """

    def __init__(self, folder: BucketPath, keep: int, lease: Lease | None = None) -> None:
        """Read the list; with a lease, take it over from whoever wrote it before, and remove what no list names."""
        self.folder: Place = folder
        self._there, self._keep = folder, keep
        self._try = lease.token[:6] if lease else ""
        there = folder.listing() if lease else {}
        if LIST_NAME not in there and any(_OURS.fullmatch(name) for name in there):
            raise UserError(f"{folder}: holds checkpoints and no {LIST_NAME}; bring that back, or use another --model_dir")
        self._ledger: Ledger = ObjectLedger(folder, lease)
        if lease:
            self._sweep()

    def _sweep(self) -> None:
        """Remove what saves that never finished have left."""
        named = {name for marker in self.markers() for name in marker.files}
        for name in self._there.listing():
            if name not in named and _OURS.fullmatch(name):
                (self._there / name).unlink(missing_ok=True)

    def damage(self, marker: Marker) -> str | None:
        """What is wrong with a checkpoint's objects, by the sizes and checksums that the service reports: one request."""
        there: dict[str, State] = self._there.listing()
        for name, (size, crc) in marker.files.items():
            if name not in there:
                return f"{name} is missing"
            if there[name].size != size:
                return f"{name} has {there[name].size} bytes instead of {size}"
            if there[name].crc32c != crc:
                return f"{name} does not match its checksum"
        return None

    def _write(self, state: tf.train.Checkpoint, step: int, pending: bool) -> None:
        prefix = f"step-{step:08d}-{self._try}{secrets.token_hex(2)}"
        with tempfile.TemporaryDirectory() as here:
            state.write(str(Path(here) / prefix))
            written = {path.name: self._upload(path) for path in sorted(Path(here).iterdir())}
        marker = Marker(step, pending, prefix, {name: (sent.size, sent.crc32c) for name, sent in written.items()})
        markers = sorted([*(old for old in self.markers() if old.step != step), marker], key=lambda one: one.step)
        before = self.markers()
        try:
            self._ledger.change(marker, self._no_longer_kept(markers))
        except LostClaimError:  # any other failure leaves open whether the list names it by now: the next start looks
            self._remove([marker])
            raise
        named = {one.prefix for one in self.markers()}
        self._remove([one for one in before if one.prefix not in named])

    def _upload(self, path: Path) -> State:
        return (self._there / path.name).upload(path, generation=0)

    def _remove(self, markers: list[Marker]) -> None:
        """Remove the objects of checkpoints that no list names any more."""
        for name in (name for marker in markers for name in marker.files):
            (self._there / name).unlink(missing_ok=True)

    @contextmanager
    def reading(self, marker: Marker) -> Iterator[str]:
        """Copies of the objects in TMPDIR, while they are read.

        Raises:
            UserError: a run that goes on meanwhile has removed them.
        """
        with tempfile.TemporaryDirectory() as here:
            for name in marker.files:
                try:
                    (self._there / name).download(Path(here) / name)
                except FileNotFoundError as error:
                    raise UserError(f"{self._there / name}: was removed while it was read; run this again") from error
            yield str(Path(here) / marker.prefix)

    def forget_after(self, step: int) -> None:
        """Drop later checkpoints, which were found damaged, and their objects."""
        later = [marker for marker in self.markers() if marker.step > step]
        super().forget_after(step)
        self._remove(later)

    def clean(self) -> None:
        """Drop what is no longer kept, and remove its objects."""
        before = self.markers()
        dropped = self._no_longer_kept(before)
        if dropped:
            self._ledger.change(None, dropped)
            self._remove([marker for marker in before if marker.step in dropped])


class NonChiefBucketCheckpoints(WritesNothing, BucketCheckpoints):
    """The same, in a bucket."""


def checkpoints_in(folder: Place, keep: int) -> Checkpoints:
    """The checkpoints of a folder, to be read."""
    return Checkpoints(folder, keep) if isinstance(folder, Path) else BucketCheckpoints(folder, keep)
