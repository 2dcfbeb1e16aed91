"""Whether the places that a run needs can be read and written, before TensorFlow is loaded or a device is touched.

Whether they can be written is asked of buckets only: of a folder of this machine the run itself finds out as fast.
"""

from pathlib import Path

from trainer.data import records
from trainer.errors import UserError
from trainer.runtime import files
from trainer.storage.bucket import BucketPath
from trainer.storage.places import Place
from trainer.storage.service import patience

PATIENCE_SECONDS = 60.0
# What a SavedModel is made of, at the top of its folder.
_SAVED_MODEL = {"saved_model.pb", "fingerprint.pb", "variables", "assets", "assets.extra"}


def preflight(data: Place | None, places: list[Place]) -> None:
    """List the data and read one record; list, write and clean the places that the run writes to.

    What may pass by itself (credentials that are not there yet, a service that is busy) is tried for 60 s.

    Raises:
        BucketRefusedError: a bucket is not there, or a permission is missing.
        BucketAwayError: it did not answer in that time.
        DataError: there is no data set, or its first record is damaged.
    """
    with patience(PATIENCE_SECONDS):
        if isinstance(data, BucketPath):
            manifest = records.read_manifest(data)
            records.check_shard_sizes(data, (shard for shards in manifest.splits.values() for shard in shards))
            records.read_one(data, manifest)
        for folder in places:
            if isinstance(folder, BucketPath):
                files.try_out(folder)


def check_model_folder(folder: Place, kept: list[Place]) -> None:
    """See that the exported model, which replaces all that is in AIP_MODEL_DIR, replaces nothing but an earlier one.

    Args:
        folder: AIP_MODEL_DIR.
        kept: where the run itself is, and its checkpoints and summaries.

    Raises:
        UserError: the run lies there, or somebody's files do.
    """
    for place in kept:
        if _is_in(place, folder):
            raise UserError(f"AIP_MODEL_DIR={folder}: the exported model replaces all in it, and {place} is in it; name another")
    with patience(PATIENCE_SECONDS):
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if strange := sorted(names - _SAVED_MODEL):
        raise UserError(
            f"AIP_MODEL_DIR={folder}: holds {strange[0]}, which the exported model would replace; name an empty folder"
        )


def _is_in(place: Place, folder: Place) -> bool:
    """Whether a place is a folder or lies below it."""
    if isinstance(place, BucketPath) and isinstance(folder, BucketPath):
        return place.bucket == folder.bucket and f"{place.key}/".startswith(f"{folder.key}/" if folder.key else "")
    if isinstance(place, Path) and isinstance(folder, Path):
        return place.resolve().is_relative_to(folder.resolve())
    return False
