"""The sample that ships with the package: 63 real pairs, turned into shards at first use."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tensorflow as tf
from PIL import Image

from trainer.data import records
from trainer.data.records import ImageSpec, Manifest
from trainer.storage.places import Place, place

SAMPLE_FOLDER = Path(__file__).parent.parent / "sample"
SPLITS = {"train": 2, "val": 1, "test": 1}


def pair_example(key: str, path: Path) -> bytes:
    """Serialise one side-by-side JPEG as a tf.train.Example, its bytes unchanged."""
    with Image.open(path) as image:
        width, height = image.size
    text = {"key": key.encode(), "pair/encoded": path.read_bytes(), "pair/format": b"jpeg"}
    numbers = {"pair/height": height, "pair/width": width, "pair/channels": 3, "pair/bit_depth": 8}
    features = {name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value])) for name, value in text.items()}
    features |= {name: tf.train.Feature(int64_list=tf.train.Int64List(value=[value])) for name, value in numbers.items()}
    example = tf.train.Example(features=tf.train.Features(feature=features))
    return bytes(example.SerializeToString(deterministic=True))


def _shards(split: str, count: int, folder: Path) -> Iterator[records.Shard]:
    images = sorted((SAMPLE_FOLDER / split).glob("*.jpg"))
    for index in range(count):
        part = images[len(images) * index // count : len(images) * (index + 1) // count]
        examples = (pair_example(image.stem, image) for image in part)
        yield records.write_shard(folder / records.shard_name(split, index, count), examples)


def write_sample(folder: Path) -> None:
    """Write the sample's shards and manifest into an existing, empty folder."""
    about = json.loads((SAMPLE_FOLDER / "MANIFEST.json").read_text())
    manifest = Manifest(
        version=1,
        name="quickstart_nuclei",
        source=f"{about['repo']} at {about['commit']}",
        licence=about["licence"],
        layout="pair",
        input=ImageSpec(kind="labels", channels=3, bit_depth=8),
        target=ImageSpec(kind="photo", channels=3, bit_depth=8),
        splits={split: list(_shards(split, count, folder)) for split, count in SPLITS.items()},
    )
    records.write_manifest(folder, manifest)


def ensure_sample(folder: Path) -> Path:
    """Return a folder with the sample's shards, made now if it is not there; it appears whole or not at all."""
    if (folder / records.MANIFEST_NAME).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        write_sample(made)
        if folder.is_dir():
            shutil.rmtree(folder)
        made.replace(folder)
    return folder


@contextmanager
def prepared_folder(directory: str) -> Iterator[Place]:
    """The prepared data set in `directory`, here or in a bucket, or, if that is empty, the sample in a temporary folder."""
    if directory:
        yield place(directory, "data.dir")
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield ensure_sample(Path(temporary) / "data")
