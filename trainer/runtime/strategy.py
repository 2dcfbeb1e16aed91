"""The devices: the first TensorFlow act of the process."""

import os

import tensorflow as tf

from trainer.config import RuntimeConfig


def configure_threads(runtime: RuntimeConfig) -> int:
    """Pin TensorFlow's threads, because the bits of a sum depend on how it was divided; return the number."""
    # The remapper fuses layers for inference, fails on gradients of LeakyReLU and says so in red; the bits are the same.
    tf.config.optimizer.set_experimental_options({"remapping": False})
    threads = runtime.threads or len(os.sched_getaffinity(0))
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    return threads


def one_device() -> tf.distribute.Strategy:
    """The first GPU if there is one, else the CPU."""
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    return tf.distribute.OneDeviceStrategy("/gpu:0" if gpus else "/cpu:0")
