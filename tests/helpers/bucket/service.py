"""Google Cloud Storage on loopback, with faults to order: fake-gcs-server behind a proxy that mends and damages.

    client --http--> proxy (its own process: in the process of the test both would wait for one lock) --> fake-gcs-server

Both children end with the process that started them, even if that is killed.  Only the JSON API, only plain http, only
one version of an object.  `BucketService` runs them; `python -m tests.helpers.bucket.service -- COMMAND` runs a command
with them.

What fake-gcs-server 1.x does otherwise than the real service, and the proxy mends:

- ifGenerationMatch and its relatives hold for uploads of every kind, reads, updates, deletes, copies, rewrites and compose,
  their sources too; the one who lost gets 412 (304 for a read) and nothing changes.  fake-gcs-server lets most pass.
- Resumable uploads live in the proxy: a status query answers 308 with what is there (fake-gcs-server finishes the object),
  a cut part leaves whole multiples of 256 KiB, a finished session repeats its answer, a cancelled one answers 499.
- A crc32c or md5Hash that came with an upload is compared, 400 if it differs.
- Lists: pages of at most 1000, objects and prefixes counted together and in one order (fake-gcs-server gives all prefixes
  on the first page, and loses the rest of the pages), and of each object only what `fields` asks for.  matchGlob, versions
  and softDeleted, which it ignores, answer 501.
- Batch requests without the Content-ID that it insists on, and with preconditions.
- mediaLink carries the generation, so that a client reads the object it looked at or gets 404, never a later one.
- delete answers 204 and heeds `generation`; an update answers with the whole resource.
- compose gives the object a new generation (fake-gcs-server keeps the old one), 404 for a missing source (it says 500),
  400 for more than 32.
- A bucket that is not empty is not deleted, 409; 404 says which object, or that the bucket is missing.
- `Transfer-Encoding: identity` is let pass; an upload reaches it only when it is there as a whole.

What stays different:

- metageneration is always 1; etag is the MD5 of the content, so equal content has equal etags; composed objects have an MD5.
- No permissions, retention, lifecycle, soft deletion, versions, or limits of rate: use faults (`forbidden`, `retained`,
  `RATE_LIMITED`).  Bucket names and object names are not checked.
- No XML API (so no transfer_manager.upload_chunks_concurrently), no gRPC, no uploads with chunked transfer encoding (411).
- A resumable session never expires; it is lost with its bucket (`drop`).

google-cloud-storage 3.17 asks for the bucket in a thread of its own, once for every client, whatever else it does; such a
request comes at any time, so `environment` turns it off: the log, and faults by lot, would depend on when it comes.
"""

import argparse
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from tests.helpers.bucket.answers import CONTROL, LOOPBACK
from tests.helpers.bucket.faults import KINDS, Chance, Fault, Request

ROOT = Path(__file__).parents[3]


class BucketService:
    """The service: `with BucketService() as service`, from a thread that lives at least as long as the service."""

    def __init__(self) -> None:
        self.port = 0

    def __enter__(self) -> Self:
        command = [sys.executable, "-P", "-m", "tests.helpers.bucket.proxy", str(os.getpid())]
        where = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, text=True, env=where)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.strip().isdigit():
            raise RuntimeError(f"the bucket service did not start: {line!r}")
        self.port = int(line)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use this service in place of the real one."""
        exempt = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), LOOPBACK, "localhost"]))
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "GOOGLE_CLOUD_PROJECT": "test-project",
            "NO_GCE_CHECK": "true",
            "DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA": "true",
            "no_proxy": exempt,
            "NO_PROXY": exempt,
        }

    def command(self, name: str, **order: Any) -> Any:
        """Asks the proxy, around whatever proxies the environment names."""
        with contextlib.closing(http.client.HTTPConnection(LOOPBACK, self.port, timeout=60)) as connection:
            connection.request("POST", CONTROL + name, json.dumps(order))
            return json.loads(connection.getresponse().read())["result"]

    def bucket(self, name: str) -> str:
        """Makes a bucket; its URL."""
        self.command("make", bucket=name)
        return f"gs://{name}"

    def drop(self, url: str) -> None:
        """Deletes a bucket and what is in it, and frees the memory."""
        self.command("forget", bucket=url.removeprefix("gs://").partition("/")[0])

    def faults(self, *rules: Fault) -> None:
        """Sets the rules; the first that fits a request counts.  They replace earlier ones."""
        self.command("faults", rules=[asdict(rule) for rule in rules])

    def random_faults(self, share: float, seed: int, kinds: Sequence[str] = KINDS, stall_seconds: float = 5.0) -> None:
        """This share of all requests meets a fault, drawn from `kinds`: statuses as digits, or actions of a `Fault`.

        Which ones is decided by seed, object and number of the try, not by when they come.
        """
        self.command("random_faults", **asdict(Chance(share, seed, list(kinds), stall_seconds)))

    def away(self, gone: bool = True) -> None:
        """Ends every connection, running transfers too, until it is told `False`."""
        self.command("away", gone=gone)

    def held(self) -> int:
        """How many requests are held at this moment, by a `hold` or a `hold_reply`."""
        number: int = self.command("held")
        return number

    def release(self) -> None:
        """Lets the requests go that are held."""
        self.command("release")

    def clock(self, ahead: float) -> None:
        """Seconds by which the service's clock is ahead of this machine's."""
        self.command("clock", ahead=ahead)

    def limit_pages(self, entries: int) -> None:
        """Lists of at most so many entries a page, where the real service has 1000."""
        self.command("limit_pages", entries=entries)

    def guard(self, lifetime: float = 3600.0) -> None:
        """Answers 401 from now on to who has no token; earlier tokens are worth nothing, new ones live so many seconds.

        `accounts.environment` leads a process to where they are issued.
        """
        self.command("guard", lifetime=lifetime)

    def throttle(self, latency: float = 0.0, bytes_per_second: float = 0.0) -> None:
        """Seconds that every request waits, and bytes a second that a connection moves; 0: unhindered."""
        self.command("throttle", latency=latency, rate=bytes_per_second)

    def requests(self) -> list[Request]:
        """What arrived, in this order, parts of batches too."""
        return [Request(**entry) for entry in self.command("requests")]

    def count(self) -> int:
        """How many HTTP requests arrived; a batch is one."""
        number: int = self.command("count")
        return number

    def clear(self) -> None:
        """Forgets rules, lots, throttle, absence, clock, tokens and log, and lets go what is held; objects stay."""
        self.command("clear")


def run(arguments: Sequence[str] | None = None) -> int:
    """`python -m tests.helpers.bucket.service [options] -- COMMAND...`: the command, with the service in its environment."""
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.bucket.service", description=run.__doc__)
    parser.add_argument("--latency", type=float, default=0.0, metavar="S", help="seconds that every request waits")
    parser.add_argument("--megabytes_per_second", type=float, default=0.0, metavar="N", help="limit for one connection")
    parser.add_argument("--bucket", action="append", default=[], metavar="NAME", help="a bucket to make; may be repeated")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args(arguments)
    with BucketService() as service:
        for name in options.bucket:
            service.bucket(name)
        service.throttle(options.latency, options.megabytes_per_second * 1e6)
        return run_command(options.command, os.environ | service.environment)


def run_command(command: list[str], environment: dict[str, str]) -> int:
    """The status of a command as a shell would give it; a request to end is passed on to it."""
    with subprocess.Popen(command, env=environment) as process:

        def pass_on(number: int, frame: FrameType | None) -> None:
            process.send_signal(number)

        signal.signal(signal.SIGTERM, pass_on)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        status = process.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(run())
