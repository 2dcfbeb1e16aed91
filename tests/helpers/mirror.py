"""A real HTTP server on loopback with one published data set; it can fail, drop connections and know no ranges."""

import io
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.helpers.images import write_pairs


class Server(ThreadingHTTPServer):
    """Serves one archive; gives only `portion` bytes of an answer before it drops the connection."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.portion, self.requests, self.ranges = content, len(content), 0, True
        self.fail_first = 0

    @property
    def url(self) -> str:
        """What `fetch` takes for the mirror."""
        return f"http://127.0.0.1:{self.server_address[1]}/mirror/"


class Handler(BaseHTTPRequestHandler):
    """One request for the archive, or for a part of it."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Give what the server is told to give."""
        server = self.server
        server.requests += 1
        if not self.path.endswith("/facades.tar.gz"):
            self.send_error(404)
            return
        if server.requests <= server.fail_first:
            self.send_error(503)
            return
        wanted = self.headers.get("Range") if server.ranges else None
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        body = server.content[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.portion])
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def facades(folder: Path) -> bytes:
    """The archive of a small `facades`: 12, 4 and 3 pairs. It is made in a folder."""
    for split, count in (("train", 12), ("val", 4), ("test", 3)):
        write_pairs(folder / "facades" / split, count, "jpeg")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder / "facades", "facades")
    return buffer.getvalue()


@contextmanager
def serving(content: bytes) -> Iterator[Server]:
    """The server, until the block ends."""
    with Server(content) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield served
        served.shutdown()
