"""A process that saves checkpoints to a bucket without end, to be killed.

python -m tests.helpers.bucket.saver gs://BUCKET/run BYTES
"""

import sys

from trainer.startup import load_tensorflow

load_tensorflow()

import tensorflow as tf  # noqa: E402

from trainer.runtime.bucket_folder import BucketFolder  # noqa: E402
from trainer.storage.bucket import parse  # noqa: E402


def state_of(step: int, floats: int) -> tf.train.Checkpoint:
    return tf.train.Checkpoint(weights=tf.Variable(tf.fill([floats], float(step))), step=tf.Variable(step))


def main() -> None:
    folder = BucketFolder(parse(sys.argv[1])).claim(job="saver")
    checkpoints = folder.store(2)
    step = checkpoints.markers()[-1].step if checkpoints.markers() else 0
    while True:
        step += 1
        checkpoints.save(state_of(step, int(sys.argv[2]) // 4), step)


if __name__ == "__main__":
    main()
