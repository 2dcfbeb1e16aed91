"""The run's folder that fits: here or in a bucket; one that writes or, for workers other than the chief, one that does not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.cluster import VertexFolders
from trainer.config import Config
from trainer.errors import ExitCode, UserError
from trainer.runtime.bucket_checkpoints import NonChiefBucketCheckpoints
from trainer.runtime.bucket_folder import BucketFolder
from trainer.runtime.checkpoints import Checkpoints, NonChiefCheckpoints
from trainer.runtime.run_folder import LOCK_SECONDS, Columns, RunFolder
from trainer.storage.bucket import BucketPath
from trainer.storage.places import Place, place


class _WritesNothing(RunFolder):
    """What workers other than the chief do where the chief writes: what they read is there, what they write goes nowhere."""

    def write_config(self, config: Config, notes: dict[str, str]) -> None:
        """The chief writes it."""

    def write_data(self, about: dict[str, Any]) -> None:
        """The chief writes it."""

    def metrics(self) -> list[dict[str, Any]]:
        """What the chief is writing at this moment is not read."""
        return []

    def add_metrics(self, entry: dict[str, Any]) -> None:
        """The chief writes it."""

    def cut_after(self, step: int) -> None:
        """The chief does it."""

    def save_sample(self, step: int, columns: Callable[[], Columns]) -> None:
        """The chief draws it."""

    def record_failure(self, line: str, exit_code: ExitCode, fingerprint: str) -> None:
        """What all of them see, the chief records; a record that is damaged may have been seen by this worker alone."""
        if exit_code == ExitCode.USER:
            super().record_failure(line, exit_code, fingerprint)


class NonChiefFolder(_WritesNothing):
    """The run's folder as workers other than the chief hold it."""

    def claim(self, seconds: float = LOCK_SECONDS, job: str = "") -> "NonChiefFolder":
        """The chief's claim counts for all."""
        return self

    def store(self, keep: int) -> Checkpoints:
        """The run's checkpoints, of which this process writes none."""
        assert isinstance(self.checkpoints, Path)
        return NonChiefCheckpoints(self.checkpoints, keep)


class NonChiefBucketFolder(_WritesNothing, BucketFolder):
    """The same, in a bucket."""

    def claim(self, seconds: float = 0.0, job: str = "") -> "NonChiefBucketFolder":
        """The chief's claim counts for all."""
        return self

    def store(self, keep: int) -> Checkpoints:
        """The run's checkpoints, of which this process writes none."""
        assert isinstance(self.checkpoints, BucketPath)
        return NonChiefBucketCheckpoints(self.checkpoints, keep)


def open_folder(path: Place, folders: VertexFolders, *, writes: bool = True) -> RunFolder:
    """The run's folder, for a process that writes in it or only reads.

    Raises:
        UserError: a scheduler's folder is on the other side, here and not in the bucket, or the reverse.
    """
    checkpoints = place(folders.checkpoints, "AIP_CHECKPOINT_DIR") if folders.checkpoints else None
    summaries = place(folders.summaries, "AIP_TENSORBOARD_LOG_DIR") if folders.summaries else None
    for name, other in (("AIP_CHECKPOINT_DIR", checkpoints), ("AIP_TENSORBOARD_LOG_DIR", summaries)):
        if other and isinstance(other, Path) != isinstance(path, Path):
            raise UserError(f"{name}={other}: and --model_dir={path}: allowed: both in a bucket, or both here")
    if isinstance(path, BucketPath):
        return (BucketFolder if writes else NonChiefBucketFolder)(path, checkpoints, summaries)
    return (RunFolder if writes else NonChiefFolder)(path, checkpoints, summaries)
