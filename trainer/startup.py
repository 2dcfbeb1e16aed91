"""The first acts of a process: an answer to signals, and TensorFlow without the lines that it prints at every start.

It imports little, because a process that has no answer to a signal yet ends with a traceback, or as process 1 hears nothing.
"""

import importlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import NoReturn

from trainer.errors import ExitCode

STOPS = (signal.SIGTERM, signal.SIGINT)
_LOADED = signal.SIGURG  # tells the thread that waits for signals that there is nothing more to wait for
_NOISE = (b"All log messages before absl::InitializeLog()", b"oneDNN custom operations are on")
_METADATA_SERVER = ("metadata.google.internal", 80)
_METADATA_SECONDS = 3.0  # it is next door, and answers in milliseconds where there is one


def _leave(number: int, descriptor: int | None, *, as_json: bool = False) -> NoReturn:
    """End the process with one line; it may be in the middle of an import, so nothing is imported and nothing raised here."""
    line = f"trainer: {signal.Signals(number).name}: stopped; the same command begins again, or goes on from what is saved"
    if as_json:
        now = time.time()
        moment = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
        line = f'{{"severity": "WARNING", "time": "{moment}", "step": null, "worker": 0, "message": "{line}"}}'
    if descriptor is not None:
        with suppress(OSError):
            os.write(descriptor, f"{line}\n".encode())
    os._exit(ExitCode.STOPPED)


def asks_for_json(argv: Sequence[str]) -> bool:
    """Whether the lines are to be for machines, seen without the parser, which takes a while to load."""
    return "--log_format=json" in argv or ("--log_format", "json") in pairwise(argv)


def answer_early_stops(argv: Sequence[str]) -> None:
    """Until the command has handlers of its own: leave with one line. A signal that is ignored stays so."""
    as_json = asks_for_json(argv)

    def leave(number: int, frame: FrameType | None) -> None:
        _leave(number, 1 if as_json else 2, as_json=as_json)

    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, leave)


def is_noise(line: bytes) -> bool:
    """Whether it is what C++ puts before the first line that it has to say, whenever that comes."""
    return any(noise in line for noise in _NOISE)


@contextmanager
def _filtered_stderr() -> Iterator[int]:
    """Hold back what is written to file descriptor 2, by C++ too, and then pass on all of it but the known noise.

    Yields:
        a file descriptor for lines that cannot wait.
    """
    import tempfile

    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield kept
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            lines = [line for line in held if not is_noise(line)]
            os.write(2, b"".join(lines))


@contextmanager
def _signals_for_one_thread(stderr: int) -> Iterator[None]:
    """Start threads that take no SIGTERM and no SIGINT, so that later the main thread can keep one back until it can answer it.

    Meanwhile a thread waits for them and ends the process: the main thread hears nothing before all is imported, and an exception
    in the middle of it might be taken for a failed import.
    """
    import threading

    heard = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
    spoken = {number for number in heard if signal.getsignal(number) != signal.SIG_DFL}

    def wait() -> None:
        if (number := signal.sigwait({*heard, _LOADED})) != _LOADED:
            _leave(number, stderr if number in spoken else None)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOPS, _LOADED})
    thread = threading.Thread(target=wait, name="stop-while-loading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.pthread_kill(thread.ident or 0, _LOADED)
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _metadata_server_answers() -> bool:
    import socket

    try:
        socket.create_connection(_METADATA_SERVER, _METADATA_SECONDS).close()
    except OSError:
        return False
    return True


def _devices_of_a_tpu(root: Path = Path("/dev")) -> list[Path]:
    """The device files that libtpu opens: /dev/accel0 and on, or with newer TPUs /dev/vfio/0 and on."""
    return [*root.glob("accel[0-9]*"), *root.glob("vfio/[0-9]*")]


def look_for_no_tpu_in_vain() -> None:
    """Keep libtpu from asking the metadata server of Google Cloud where that can lead to nothing.

    Without an answer it asks for minutes, and holds the interpreter meanwhile, so that not even a signal ends it. Whoever sets
    variables for it, as GKE does, knows better; TPU_NAME alone names a TPU, and does not say that it is here.
    """
    import logging

    told = [name for name in os.environ if name.startswith("TPU_") and name != "TPU_NAME"]
    if told or importlib.util.find_spec("libtpu") is None:
        return
    if not _devices_of_a_tpu():
        why = "libtpu is installed, but no TPU is visible (/dev/accel*, /dev/vfio/*): without one the CPU computes"
    elif not _metadata_server_answers():
        why = "the metadata server of Google Cloud does not answer: TPU_SKIP_MDS_QUERY=1 keeps libtpu from asking it for minutes"
    else:
        return
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    logging.getLogger(__name__).warning(why)


def gpus_are_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES asks for none, which is a wish for the CPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def load_tensorflow() -> None:
    """Import TensorFlow and Keras once, quietly, on the backend and with the defaults that this code is written for."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    look_for_no_tpu_in_vain()
    with _filtered_stderr() as stderr, _signals_for_one_thread(stderr):
        tensorflow = importlib.import_module("tensorflow")
        keras = importlib.import_module("keras")
    keras.config.set_image_data_format("channels_last")  # a keras.json in the user's home may say otherwise
    keras.config.set_floatx("float32")
    # The remapper fuses layers for inference, fails on LeakyReLU and says so in red; the bits are the same without it.
    tensorflow.config.optimizer.set_experimental_options({"remapping": False})
