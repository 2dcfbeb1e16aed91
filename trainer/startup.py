"""Loading TensorFlow without the lines that it prints at every start and that call for nothing to be done."""

import importlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_NOISE = (b"All log messages before absl::InitializeLog()", b"oneDNN custom operations are on")


@contextmanager
def _filtered_stderr() -> Iterator[None]:
    """Hold back what is written to file descriptor 2, by C++ too, and then pass on all of it but the known noise."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            lines = [line for line in held if not any(noise in line for noise in _NOISE)]
            os.write(2, b"".join(lines))


@contextmanager
def _signals_for_the_main_thread() -> Iterator[None]:
    """Start threads that take no SIGTERM and no SIGINT, so that the main thread can keep one back until it can answer it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def load_tensorflow() -> None:
    """Import TensorFlow and Keras once, quietly, on the backend and with the defaults that this code is written for."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    with _filtered_stderr(), _signals_for_the_main_thread():
        tensorflow = importlib.import_module("tensorflow")
        keras = importlib.import_module("keras")
    keras.config.set_image_data_format("channels_last")  # a keras.json in the user's home may say otherwise
    keras.config.set_floatx("float32")
    # The remapper fuses layers for inference, fails on LeakyReLU and says so in red; the bits are the same without it.
    tensorflow.config.optimizer.set_experimental_options({"remapping": False})
