"""A process that has imported everything and forks: its children start in milliseconds, where importing takes seconds.

    python -m tests.helpers.warm SOCKET

Each request is a line of JSON with three file descriptors: the child's standard streams. The answer is the child's process id.
The child is forked twice, and whoever asked has declared itself the reaper of orphans meanwhile, so it becomes the parent: it can
wait for the child and sees its exit status, as after any other start.

TensorFlow has been imported here but has computed nothing: its threads, devices and random numbers belong to each child alone.
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1
REQUEST_BYTES = 1 << 20
PRELOADED = (
    "trainer.arguments", "trainer.help", "trainer.commands", "trainer.preflight", "trainer.check", "trainer.evaluate",
    "trainer.predict", "trainer.export", "trainer.train.loop", "trainer.train.plan", "trainer.data.prepare",
    "trainer.data.published", "trainer.storage.bucket", "trainer.storage.service", "skimage.metrics",
)  # fmt: skip


def load() -> None:
    """Import what children need. TensorFlow comes first, as in the trainer itself."""
    from trainer.startup import load_tensorflow

    load_tensorflow()
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # a collection in a child would write to every page that it shares


def run_as_main(flag: str, what: str) -> None:
    """What `python -m MODULE` or `python -c TEXT` does; a module that is imported already is run from its beginning."""
    if flag == "-m":
        sys.modules.pop(what, None)
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<program>", "exec"), {"__name__": "__main__"})


def become(request: dict[str, Any], streams: list[int]) -> NoReturn:
    """Be the process that was asked for, and end as it would."""
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
    os.closerange(3, 256)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    sys.argv = request["argv"]
    code = 1
    try:
        run_as_main(request["flag"], request["what"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - what the interpreter would do with it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(connection: socket.socket) -> None:
    """Fork the process that one request asks for."""
    content, streams, _, _ = socket.recv_fds(connection, REQUEST_BYTES, 3)
    request = json.loads(content)
    reading, writing = os.pipe()
    if (between := os.fork()) == 0:
        own = os.getpid()
        if (child := os.fork()) != 0:
            os.write(writing, str(child).encode())
            os._exit(0)
        while os.getppid() == own:  # whoever asked becomes the parent when the process in between has gone
            time.sleep(0.0005)
        become(request, streams)
    os.waitpid(between, 0)
    connection.sendall(os.read(reading, 32))
    for descriptor in (reading, writing, *streams):
        os.close(descriptor)


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    load()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection:
                answer(connection)


if __name__ == "__main__":
    main()
