"""Whole runs, on this machine or in a bucket: how far they are, what they left, and whether two are the same."""

import json
import subprocess
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image

from tests.helpers.events import scalars
from tests.helpers.processes import run_trainer
from tests.helpers.settings import SMALL, TINY, flags
from tests.helpers.waiting import wait_until
from trainer.runtime.bucket_checkpoints import checkpoints_in
from trainer.runtime.checkpoints import Checkpoints
from trainer.runtime.ledger import Marker, marker_of
from trainer.storage.places import Place, place

STEPS = 400
SETTINGS = (
    *SMALL, "train.batch_size=2", f"train.steps={STEPS}", "train.checkpoint_every=35", "train.summary_every=20",
    "train.sample_every=100", "train.evaluate_every=50", "train.keep=2", "optimizer.schedule=linear_decay",
)  # fmt: skip
SHORT_STEPS = 60
SHORT = (
    *TINY, "train.batch_size=2", f"train.steps={SHORT_STEPS}", "train.checkpoint_every=7", "train.summary_every=4",
    "train.sample_every=20", "train.evaluate_every=10", "train.keep=2", "optimizer.schedule=linear_decay",
    "optimizer.learning_rate=0.002",
)  # fmt: skip

# A run of 24 steps, evaluated at step 20, where its best score is by decree: what is drawn by the best and by the newest differs.
LITTLE = (
    *SMALL, "train.steps=24", "train.checkpoint_every=16", "train.evaluate_every=20", "train.sample_every=0",
    "optimizer.learning_rate=0.01",
)  # fmt: skip


def train_a_little(folder: Path) -> None:
    """That run, begun or resumed, to its end."""
    done = run_trainer(*flags(folder, *LITTLE))
    assert done.returncode == 0, done.stderr
    Checkpoints(folder / "checkpoints", 3).mark_best(20, 0.0)


def arguments(folder: Path | str, *overrides: str) -> list[str]:
    """The flags of a run that does everything now and then."""
    return flags(folder, *SETTINGS, *overrides)


def short(folder: Path | str, *overrides: str) -> list[str]:
    """The flags of a run that does everything several times in its 60 steps, which take no time beside its beginning."""
    return flags(folder, *SHORT, *overrides)


def _as_place(folder: Path | str) -> Place:
    return folder if isinstance(folder, Path) else place(folder, "a run")


def newest(folder: Path | str) -> Marker | None:
    """The newest checkpoint that counts, of a folder or a gs:// address."""
    checkpoints = _as_place(folder) / "checkpoints"
    if isinstance(checkpoints, Path) and not checkpoints.is_dir():
        return None
    markers = checkpoints_in(checkpoints, 2).markers()
    return markers[-1] if markers else None


def newest_step(folder: Path | str) -> int:
    """Its step, 0 where there is none."""
    marker = newest(folder)
    return marker.step if marker else 0


def wait_for_step(process: subprocess.Popen[str], folder: Path | str, step: int) -> None:
    """Wait until a running process has saved this step or a later one."""
    wait_until(lambda: newest_step(folder) >= step, process, what=f"a checkpoint of step {step}")


def _checkpoint(folder: Path) -> tuple[Marker, object]:
    """The newest checkpoint and the best one's entry, of a run made here or copied from a bucket."""
    checkpoints = folder / "checkpoints"
    index = checkpoints / "checkpoints.json"
    if index.is_file():
        document = json.loads(index.read_text())
        return marker_of(document["checkpoints"][-1]), document["best"]
    marker = newest(folder)
    assert marker is not None
    return marker, json.loads((checkpoints / "best.json").read_text())


def tensors(prefix: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, by its name there."""
    reader = tf.train.load_checkpoint(str(prefix))
    names = [name for name in reader.get_variable_to_shape_map() if name != "_CHECKPOINTABLE_OBJECT_GRAPH"]
    return {name: reader.get_tensor(name) for name in names}


def contents(folder: Path) -> dict[str, bytes]:
    """Every tensor of the newest checkpoint, and everything else that a run leaves, but for times of day."""
    marker, best = _checkpoint(folder)
    found = {name: tensor.tobytes() for name, tensor in tensors(folder / "checkpoints" / marker.prefix).items()}
    found |= {picture.name: np.asarray(Image.open(picture)).tobytes() for picture in (folder / "samples").glob("*")}
    found["metrics"], found["best"] = (folder / "metrics.jsonl").read_bytes(), json.dumps(best).encode()
    return found | {"step": str(marker.step).encode(), "scalars": repr(scalars(folder)).encode()}


def assert_same_run(folder: Path, other: Path) -> None:
    """Two runs left the same bits."""
    ours, theirs = contents(folder), contents(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a process said last on stderr."""
    return done.stderr.strip().splitlines()[-1]
