"""A run's folder: config.yaml, metrics.jsonl, samples, the failure marker and the lock that keeps a second job out.

`folders.open_folder` gives the one that fits: of this machine or in a bucket, writing or, for workers other than the chief, not.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import yaml
from numpy.typing import NDArray

from trainer.config import Config, config_from_tree, differences, parse_yaml, to_tree
from trainer.errors import ExitCode, TrainerError, UserError
from trainer.runtime import files
from trainer.runtime.checkpoints import Checkpoints
from trainer.runtime.pictures import save_grid
from trainer.storage.bucket import BucketPath
from trainer.storage.places import Place, naming

LOCK_SECONDS = 10.0
DEAD_NODE_SECONDS = 100.0  # after which a network file system frees the lock of a node that died
SEE_SECONDS = 5.0  # network file systems show a new file late

Columns = Sequence[tuple[str, NDArray[np.uint8]]]


class RecordedFailure(TrainerError):  # noqa: N818 - it is told again, not raised anew
    """The failure that ended the run before, told again because nothing has changed since."""

    def __init__(self, line: str, exit_code: ExitCode) -> None:
        super().__init__(line)
        self.exit_code = exit_code


class RunFolder:
    """The paths and small files of one run."""

    path: Place
    _lock_name = ".lock"

    def __init__(self, path: Place, checkpoints: Place | None = None, summaries: Place | None = None) -> None:
        """Checkpoints and summaries lie in it, unless a scheduler wants them elsewhere."""
        self.path = path
        self.checkpoints = checkpoints or path / "checkpoints"
        self.summaries = summaries or path / "summaries"
        self.samples = path / "samples"
        self.metrics_file = path / "metrics.jsonl"
        self._config_file = path / "config.yaml"
        self._failure_file = path / "failure.json"
        self._data_file = path / "data.json"

    @property
    def here(self) -> Path:
        """The folder, of which it is known that it is one of this machine."""
        assert isinstance(self.path, Path)
        return self.path

    @property
    def sample_data(self) -> Path:
        """Where the packaged sample's shards are made."""
        return self.here / "data"

    def check_claim(self) -> None:
        """See whether the claim still holds; a file lock does as long as the process lives."""

    def confirm_claim(self) -> None:
        """Make sure that the claim holds at this moment."""

    def store(self, keep: int) -> Checkpoints:
        """The run's checkpoints, for a process that has claimed it."""
        assert isinstance(self.checkpoints, Path)
        return Checkpoints(self.checkpoints, keep)

    def claim(self, seconds: float = LOCK_SECONDS, job: str = "") -> "RunFolder":
        """Make the folder and keep every other process from training in it while this one lives; wait so long for one that does.

        Args:
            seconds: how long.
            job: the scheduler's name for this job, of which a file lock has no need.

        Raises:
            UserError: it cannot be written, or another process is training in it.
        """
        try:
            self.here.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock(self.here / ".lock", seconds)
            self._sweep()
        except OSError as error:
            whom = f"user {os.getuid()}:{os.getgid()}"
            advice = f"let {whom} write there, or choose another --model_dir"
            raise UserError(f"{self.path}: cannot write there ({error.strerror}); {advice}") from error
        return self

    def _sweep(self) -> None:
        """Remove what a killed process left half-written, also where a link or a scheduler put a part of the run elsewhere."""
        for place in (self.here, self.samples, self.checkpoints, self.summaries):
            assert isinstance(place, Path)
            files.sweep(place)
        for folder in self.here.glob(".making-*"):
            shutil.rmtree(folder)

    def _take_lock(self, path: Path, seconds: float) -> TextIO:
        """Wait a little for the lock: the process that holds it may be saving its last checkpoint."""
        lock, deadline = path.open("a+", encoding="utf-8"), time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    lock.seek(0)
                    owner = lock.readline().strip() or "unknown"
                    raise UserError(
                        f"{self.path}: process {owner} is training in it; stop it or choose another --model_dir"
                    ) from error
                time.sleep(0.1)
        self.token = secrets.token_hex(8)
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}\n{self.token}\n")
        lock.flush()
        return lock

    def is_claimed_with(self, token: str) -> bool:
        """Whether this folder is the one that another process claimed with that token: the same files, seen from here."""
        path, deadline = self.path / self._lock_name, time.monotonic() + SEE_SECONDS
        while not (path.is_file() and token in path.read_text(encoding="utf-8")):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def saved_config(self) -> Config | None:
        """The config that the run in this folder began or last went on with."""
        if not self._config_file.is_file():
            return None
        where = str(self._config_file)
        return config_from_tree(parse_yaml(self._config_file.read_text(encoding="utf-8"), where), where)

    def check_config(self, config: Config) -> None:
        """Refuse to go on with a run under settings that would make it another run.

        Raises:
            UserError: one line for each setting that differs and may not.
        """
        saved = self.saved_config()
        lines = differences(saved, config) if saved else []
        if lines:
            advice = "use another --model_dir, or the run's own settings (steps, intervals, paths and runtime may change)"
            raise UserError("\n".join(f"{self._config_file}: {line}" for line in lines) + f"\n{self.path}: {advice}")

    def write_config(self, config: Config, notes: dict[str, str]) -> None:
        """Write config.yaml; what ran (versions, threads) stands above it as comments."""
        header = "".join(f"# {name}: {value}\n" for name, value in notes.items())
        files.write_text(self._config_file, header + yaml.safe_dump(to_tree(config), sort_keys=False))

    def write_data(self, about: dict[str, Any]) -> None:
        """Note what the run is trained on, for those who use the generator where the data are not."""
        files.write_text(self._data_file, json.dumps(about, indent=1) + "\n")

    def read_data(self) -> dict[str, Any]:
        """What `write_data` noted.

        Raises:
            UserError: this is no run's folder.
        """
        try:
            about: dict[str, Any] = json.loads(self._data_file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"--model_dir={self.path}: no run was trained in it") from error
        return about

    def notes(self) -> dict[str, str]:
        """The comments of config.yaml, as `write_config` wrote them."""
        if not self._config_file.is_file():
            return {}
        lines = self._config_file.read_text(encoding="utf-8").splitlines()
        return dict(line[2:].split(": ", 1) for line in lines if line.startswith("# ") and ": " in line)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that are whole; a kill can cut only the last one."""
        lines = self._metrics_text().splitlines(keepends=True)
        try:
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except json.JSONDecodeError as error:
            raise UserError(f"{self.metrics_file}: has a line that is not JSON; mend or remove it") from error

    def _metrics_text(self) -> str:
        return self.metrics_file.read_text(encoding="utf-8") if self.metrics_file.is_file() else ""

    def _write_metrics(self, text: str) -> None:
        files.write_text(self.metrics_file, text)

    def add_metrics(self, entry: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, synced to disk."""
        with naming(self.metrics_file), (self.here / self.metrics_file.name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def cut_after(self, step: int) -> None:
        """Remove metrics and samples of later steps, so that the run writes them once."""
        kept = [entry for entry in self.metrics() if entry["step"] <= step]
        if self._metrics_text():
            self._write_metrics("".join(json.dumps(entry) + "\n" for entry in kept))
        for path in self.samples.glob("step-*.png"):
            number = path.stem.removeprefix("step-")
            if number.isdigit() and int(number) > step:
                path.unlink(missing_ok=True)

    def save_sample(self, step: int, columns: Callable[[], Columns]) -> None:
        """Write the sample picture of a step."""
        save_grid(self.samples / f"step-{step:07d}.png", f"step {step}", columns())

    def close(self) -> None:
        """Nothing waits to be written here."""

    def record_failure(self, line: str, exit_code: ExitCode, fingerprint: str) -> None:
        """Leave a marker, so that a blind restart ends at once with the same line and code."""
        document = {"line": line, "exit_code": int(exit_code), "fingerprint": fingerprint}
        files.write_text(self._failure_file, json.dumps(document, indent=1) + "\n")

    def check_failure(self, fingerprints: Collection[str]) -> None:
        """Tell the recorded failure again if what one of the workers trains is as it was then; else forget it.

        Raises:
            RecordedFailure: nothing has changed.
        """
        if not self._failure_file.is_file():
            return
        document = json.loads(self._failure_file.read_text(encoding="utf-8"))
        if document["fingerprint"] in fingerprints:
            advice = f"(nothing has changed since; to try all the same, remove {self._failure_file})"
            raise RecordedFailure(f"{document['line']} {advice}", ExitCode(document["exit_code"]))
        self._failure_file.unlink(missing_ok=True)


def fingerprint(config: Config, data: Place | None) -> str:
    """A digest of the config and of the names, sizes and times of the data's files: what a user may have mended.

    None stands for the packaged sample, in which there is nothing to mend.
    """
    state: list[tuple[str, int, int]]
    if data is None:
        state = []
    elif isinstance(data, BucketPath):
        state = sorted((name, found.size, found.generation) for name, found in data.listing().items())
    else:
        state = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in data.iterdir() if p.is_file())
    return hashlib.sha256(json.dumps([to_tree(config), state]).encode()).hexdigest()
