"""`trainer check`: is a prepared data set whole, and what does it look like?"""

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.cores import usable_cores
from trainer.data.pairs import from_unit_range
from trainer.data.pipeline import PairData
from trainer.data.verify import verify
from trainer.errors import DataError
from trainer.runtime.pictures import save_sheet
from trainer.storage.places import Place

THUMBNAILS = 24
THUMBNAIL_HEIGHT = 128


def check(data_dir: Place, thumbnails: Place | None) -> str:
    """Verify a data set against its manifest; write a contact sheet if asked; return the counts.

    Raises:
        DataError: one line for each shard or record that is bad.
    """
    manifest, problems = verify(data_dir, usable_cores())
    if problems:
        raise DataError("\n".join([*problems, f"{data_dir}: {len(problems)} problems"]))
    lines = [f"{data_dir}: {manifest.name}, layout {manifest.layout}, {manifest.licence}"]
    for name in manifest.splits:
        lines.append(f"  {name:6} {manifest.examples(name):>9,} pairs in {len(manifest.splits[name])} shards")
    for side, spec in (("input", manifest.input), ("target", manifest.target)):
        lines.append(f"  {side:6} {spec.kind}, {spec.channels} channels, {spec.bit_depth} bits")
    if thumbnails:
        write_thumbnails(data_dir, thumbnails)
        lines.append(f"thumbnails  {thumbnails}")
    return "\n".join([*lines, "every shard, record and picture is sound"])


def write_thumbnails(data_dir: Place, path: Place) -> None:
    """A contact sheet of pairs, spread evenly over the largest split, input left of target."""
    data = PairData.without_config(data_dir)
    split = max((data.split(name) for name in data.manifest.splits), key=lambda split: split.examples)
    count = min(THUMBNAILS, split.examples)
    numbers = [split.examples * place // count for place in range(count)]
    with data.naming_damage(split, lambda: numbers):
        batch = next(iter(data.batches_of(split, numbers, count)))
    pictures = list(zip(split.keys(numbers), _pairs(batch), strict=True))
    save_sheet(path, f"{data.manifest.name}: {count} of {split.examples} pairs of {split.name}", pictures)


def _pairs(batch: dict[str, tf.Tensor]) -> list[NDArray[np.uint8]]:
    """Input left of target for each pair of a batch: uint8 (height, 2 width, 3)."""
    sides = [from_unit_range(batch[side]).numpy().astype(np.uint8) for side in ("input", "target")]
    colour = [np.repeat(side, 3, axis=-1) if side.shape[-1] == 1 else side[..., :3] for side in sides]
    return list(np.concatenate(colour, axis=2))
