"""Which checkpoints of a run are whole: a marker file for each here, one object that lists them all in a bucket.

A marker is written after all that it speaks of. In a bucket the list is one small object, so that adding a checkpoint, dropping
an old one and naming the best are one write, made only if nobody else has written since.
"""

import json
import logging
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from google.api_core.exceptions import PreconditionFailed

from trainer.errors import UserError
from trainer.runtime import files
from trainer.runtime.lease import Lease
from trainer.storage.bucket import BucketPath

log = logging.getLogger(__name__)
LIST_NAME = "checkpoints.json"


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


def marker_of(document: dict[str, Any]) -> Marker:
    """A marker from its JSON document.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    stated = {name: (int(size), str(crc)) for name, (size, crc) in document["files"].items()}
    return Marker(int(document["step"]), bool(document["pending"]), str(document["prefix"]), stated)


class Ledger(Protocol):
    """What is kept of a run's checkpoints."""

    def markers(self) -> list[Marker]:
        """All of them, oldest first."""

    def best_step(self) -> int | None:
        """The step with the lowest validation L1; None without one."""

    def change(self, add: Marker | None, drop: Collection[int]) -> None:
        """Add one, then drop those of some steps."""

    def mark_best(self, step: int | None, l1: float | None) -> None:
        """Note the best step; None takes the note away."""


class FolderLedger:
    """step-00001000.json for each checkpoint, and best.json."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}.json"

    def markers(self) -> list[Marker]:
        """All markers that can be read, oldest first."""
        found = [self._read(path) for path in sorted(self._folder.glob("step-*.json"))]
        return [marker for marker in found if marker is not None]

    def _read(self, path: Path) -> Marker | None:
        try:
            return marker_of(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:  # a run that goes on meanwhile has removed it
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s: not a checkpoint marker (%s); it is passed over", path, error)
            return None

    def change(self, add: Marker | None, drop: Collection[int]) -> None:
        """Write the new marker, then remove the others."""
        if add:
            files.write_text(self._path(add.step), json.dumps(asdict(add), indent=1) + "\n")
        for step in drop:
            self._path(step).unlink()

    def best_step(self) -> int | None:
        """The step that best.json names."""
        path = self._folder / "best.json"
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return document.get("step")

    def mark_best(self, step: int | None, l1: float | None) -> None:
        """Write best.json, or remove it."""
        path = self._folder / "best.json"
        if step is None:
            path.unlink(missing_ok=True)
        else:
            files.write_text(path, json.dumps({"step": step, "val_l1": l1}) + "\n")


class ObjectLedger:
    """checkpoints.json: {"owner": token, "checkpoints": [...], "best": {"step": ..., "val_l1": ...}}."""

    def __init__(self, folder: BucketPath, lease: Lease | None) -> None:
        """Read what is there; with a lease, write it anew, so that an earlier writer's writes are refused from now on."""
        self._place, self._lease = folder / LIST_NAME, lease
        self._read()
        if lease:
            self._take_over(lease)

    def _read(self) -> None:
        content, self._generation = self._place.read_versioned()
        self._document = self._parsed(content) if content else {"checkpoints": [], "best": {}}

    def _take_over(self, lease: Lease) -> None:
        while True:
            text = json.dumps({"owner": lease.token, **self._document}, indent=1) + "\n"
            try:
                self._generation = self._place.write_bytes(text.encode(), self._generation).generation
                return
            except PreconditionFailed:  # the earlier writer was faster; once more
                self._read()

    def _parsed(self, content: bytes) -> dict[str, Any]:
        try:
            document = json.loads(content)
            markers = [asdict(marker_of(entry)) for entry in document["checkpoints"]]
            return {"checkpoints": markers, "best": dict(document["best"])}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            advice = "restore an older generation of it, or use another --model_dir"
            raise UserError(f"{self._place}: is no list of checkpoints ({error}); {advice}") from error

    def _write(self, document: dict[str, Any], *, again: bool = True) -> None:
        """Raises: LostClaimError: somebody else has written it since."""
        if self._lease is None:
            raise RuntimeError(f"{self._place}: written without a lease")
        self._lease.check()
        text = json.dumps({"owner": self._lease.token, **document}, indent=1) + "\n"
        try:
            self._generation = self._place.write_bytes(text.encode(), self._generation).generation
        except PreconditionFailed as error:
            content, self._generation = self._place.read_versioned()
            if not (again and self._is_ours(content)):
                raise self._lease.lose(self._place) from error
            self._write(document, again=False)  # it was an earlier write of ours, whose answer never came
        self._document = document

    def _is_ours(self, content: bytes) -> bool:
        try:
            return self._lease is not None and json.loads(content).get("owner") == self._lease.token
        except (ValueError, AttributeError):
            return False

    def markers(self) -> list[Marker]:
        """All of them, oldest first."""
        return sorted((marker_of(entry) for entry in self._document["checkpoints"]), key=lambda marker: marker.step)

    def change(self, add: Marker | None, drop: Collection[int]) -> None:
        """Add one and drop others, in one write."""
        gone = {*drop, *([add.step] if add else [])}
        kept = [entry for entry in self._document["checkpoints"] if entry["step"] not in gone]
        self._write({**self._document, "checkpoints": kept + ([asdict(add)] if add else [])})

    def best_step(self) -> int | None:
        """The step with the lowest validation L1."""
        step: int | None = self._document["best"].get("step")
        return step

    def mark_best(self, step: int | None, l1: float | None) -> None:
        """Note it in the list, if it is another than before."""
        best = {} if step is None else {"step": step, "val_l1": l1}
        if best != self._document["best"]:
            self._write({**self._document, "best": best})
