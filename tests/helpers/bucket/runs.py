"""Whole runs with everything in a bucket, and what they leave there."""

import json
from pathlib import Path
from typing import Any

from tests.helpers.runs import contents
from tests.helpers.settings import SMALL, flags
from trainer.storage.bucket import BucketPath, parse
from trainer.storage.service import client
from trainer.storage.transfer import ahead

STEPS = 120
SETTINGS = (
    *SMALL, "train.batch_size=2", f"train.steps={STEPS}", "train.checkpoint_every=15", "train.summary_every=10",
    "train.sample_every=40", "train.evaluate_every=30", "train.keep=2", "train.steps_per_loop=5",
)  # fmt: skip


def arguments(model_dir: str, data_dir: str, *overrides: str) -> list[str]:
    """The flags of a run whose places may be in a bucket."""
    return flags(model_dir, *SETTINGS, *overrides, data_dir=data_dir)


def copy_down(url: str, to: Path) -> Path:
    """All objects below an address, as files."""
    there = parse(url)
    for name in there.listing():
        file = to / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (there / name).download(file)
    return to


def copy_up(folder: Path, url: str) -> BucketPath:
    """All files below a folder, as objects; the address as a place."""
    there = parse(url)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    list(ahead(lambda file: (there / file.relative_to(folder).as_posix()).upload(file), files))
    return there


def keys(url: str) -> list[str]:
    """Every object of a bucket, what a listing leaves out too."""
    return sorted(blob.name for blob in client().list_blobs(parse(url).bucket))


def listed(url: str) -> dict[str, Any]:
    """checkpoints.json."""
    place: BucketPath = parse(url) / "checkpoints" / "checkpoints.json"
    document: dict[str, Any] = json.loads(place.read_text()) if place.is_file() else {"checkpoints": []}
    return document


def assert_same(url: str, local: Path, scratch: Path) -> None:
    """A run in a bucket left the same bits as one on this machine."""
    ours, theirs = contents(copy_down(url, scratch)), contents(local)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
