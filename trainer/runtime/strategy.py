"""The devices: the first TensorFlow act of the process."""

import os

import tensorflow as tf

from trainer.config import RuntimeConfig


def configure_threads(runtime: RuntimeConfig) -> int:
    """Pin TensorFlow's threads, because the bits of a sum depend on how it was divided; return the number."""
    threads = runtime.threads or len(os.sched_getaffinity(0))
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    return threads


def describe(threads: int) -> str:
    """The device in words."""
    gpus = tf.config.list_physical_devices("GPU")
    return "one GPU" if gpus else f"the CPU, {threads} threads"


def one_device() -> tf.distribute.Strategy:
    """The first GPU if there is one, else the CPU."""
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    return tf.distribute.OneDeviceStrategy("/gpu:0" if gpus else "/cpu:0")
