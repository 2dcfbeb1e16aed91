"""What TensorBoard would read: the one reader of event files."""

from pathlib import Path
from typing import NamedTuple

import tensorflow as tf

MEASURED = ("images_per_second", "input/")  # by the clock, so they differ from run to run


class Scalar(NamedTuple):
    """One value of one step."""

    step: int
    tag: str
    value: float


def events_of(file: Path | str) -> list[tf.compat.v1.Event]:
    """All events of a file, in its order."""
    records = tf.data.TFRecordDataset(str(file)).as_numpy_iterator()
    return [tf.compat.v1.Event.FromString(record) for record in records]


def scalars_of(file: Path | str) -> list[Scalar]:
    """All scalars of a file, in its order."""
    return [
        Scalar(event.step, value.tag, float(tf.make_ndarray(value.tensor)))
        for event in events_of(file)
        for value in event.summary.value
    ]


def scalars(folder: Path, *, measured: bool = False) -> list[Scalar]:
    """The scalars of a run, in the order of steps; those that the clock decides only if they are asked for."""
    files = sorted((folder / "summaries").glob("*/events*"))
    found = [scalar for file in files for scalar in scalars_of(file)]
    return sorted(scalar for scalar in found if measured or not scalar.tag.startswith(MEASURED))
