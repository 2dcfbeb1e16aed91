"""Whole runs with everything in a bucket, and what they leave there."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from tests.conftest import SMALL, start_trainer
from tests.train.test_loop import scalars
from trainer.runtime.checkpoints import Checkpoints
from trainer.runtime.ledger import Marker, marker_of
from trainer.storage.bucket import BucketPath, parse
from trainer.storage.service import client

STEPS = 120
SETTINGS = (
    *SMALL, "train.batch_size=2", f"train.steps={STEPS}", "train.checkpoint_every=15", "train.summary_every=10",
    "train.sample_every=40", "train.evaluate_every=30", "train.keep=2", "train.steps_per_loop=5",
)  # fmt: skip


def arguments(model_dir: str, data_dir: str, *overrides: str) -> list[str]:
    return [f"--model_dir={model_dir}", f"--data_dir={data_dir}", *(f"--set={setting}" for setting in (*SETTINGS, *overrides))]


def copy_down(url: str, to: Path) -> Path:
    """All objects below an address, as files."""
    there = parse(url)
    for name in there.listing():
        file = to / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (there / name).download(file)
    return to


def keys(url: str) -> list[str]:
    """Every object of a bucket, what a listing leaves out too."""
    return sorted(blob.name for blob in client().list_blobs(parse(url).bucket))


def copy_up(folder: Path, url: str) -> None:
    there = parse(url)
    for file in folder.iterdir():
        (there / file.name).upload(file)


def listed(url: str) -> dict[str, Any]:
    """checkpoints.json."""
    place: BucketPath = parse(url) / "checkpoints" / "checkpoints.json"
    document: dict[str, Any] = json.loads(place.read_text()) if place.is_file() else {"checkpoints": []}
    return document


def newest(url: str) -> Marker | None:
    entries = listed(url)["checkpoints"]
    return marker_of(entries[-1]) if entries else None


def contents(folder: Path) -> dict[str, bytes]:
    """Every tensor of the newest checkpoint of a run, of this machine or copied down, and all else but for times of day."""
    checkpoints, names = folder / "checkpoints", folder / "checkpoints" / "checkpoints.json"
    if names.is_file():
        document = json.loads(names.read_text())
        marker, best = marker_of(document["checkpoints"][-1]), document["best"]
    else:
        marker, best = Checkpoints(checkpoints, 2).markers()[-1], json.loads((checkpoints / "best.json").read_text())
    reader = tf.train.load_checkpoint(str(checkpoints / marker.prefix))
    variables = [name for name in reader.get_variable_to_shape_map() if name != "_CHECKPOINTABLE_OBJECT_GRAPH"]
    found = {name: reader.get_tensor(name).tobytes() for name in variables}
    found |= {picture.name: np.asarray(Image.open(picture)).tobytes() for picture in (folder / "samples").iterdir()}
    found["metrics"], found["best"] = (folder / "metrics.jsonl").read_bytes(), json.dumps(best).encode()
    return found | {"step": str(marker.step).encode(), "scalars": repr(scalars(folder)).encode()}


def assert_same(url: str, local: Path, scratch: Path) -> None:
    ours, theirs = contents(copy_down(url, scratch)), contents(local)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if process.poll() is not None:
            raise AssertionError(f"it ended with {process.returncode}: {process.communicate()}")
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_step(process: subprocess.Popen[str], url: str, step: int) -> None:
    wait_until(lambda: (marker := newest(url)) is not None and marker.step >= step, process)


def finish(process: subprocess.Popen[str], seconds: float = 240) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(*given: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return finish(start_trainer(*given, **environment))
