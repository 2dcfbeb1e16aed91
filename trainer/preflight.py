"""Whether the places that a run needs can be read and written, before TensorFlow is loaded or a device is touched.

Only buckets are looked at: of a folder of this machine the run itself finds out as fast.
"""

from trainer.data import records
from trainer.runtime import files
from trainer.storage.bucket import BucketPath
from trainer.storage.places import Place
from trainer.storage.service import patience

PATIENCE_SECONDS = 60.0


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
