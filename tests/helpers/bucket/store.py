"""The store behind the proxy: fake-gcs-server, and what it lacks or does otherwise."""

import base64
import email
import email.message
import hashlib
import http.client
import json
import re
import threading
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote, unquote, urlencode

from tests.helpers.bucket import accounts
from tests.helpers.bucket.answers import (
    BUCKET_NOT_EMPTY,
    CONDITION_NOT_MET,
    LOOPBACK,
    NO_BUCKET,
    QUANTUM,
    TYPICAL,
    Content,
    Json,
    error,
    no_object,
)
from tests.helpers.bucket.faults import Call, Fault, State


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


def only(found: Json, fields: str) -> Json:
    """The parts of a list that `fields` names, as in `items(name,size),nextPageToken`; all if it is empty."""
    if not fields:
        return found
    inside = re.search(r"items\(([^)]*)\)", fields)
    kept = {key: value for key, value in found.items() if key in re.split(r"[(),/]", fields)}
    if inside and "items" in kept:
        kept["items"] = [chosen(item, *inside[1].split(",")) for item in kept["items"]]
    return kept


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
        ("POST", accounts.TOKEN, "issue"),
        ("GET", rf"/()|{accounts.METADATA}(.*)", "metadata"),
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
                    answer: Answer = getattr(self, action)(call, *(unquote(part) for part in match.groups() if part is not None))
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
        return self.timed(resource) | {
            "id": f"{bucket}/{name}/{generation}",
            "selfLink": origin + path,
            "mediaLink": f"{origin}/download{path}?generation={generation}&alt=media",
        }

    def timed(self, resource: Json) -> Json:
        """The resource by the service's clock."""
        moments = {key: resource[key] for key in ("updated", "timeCreated") if key in resource and self.state.ahead}
        ahead = timedelta(seconds=self.state.ahead)
        return resource | {
            key: f"{(datetime.fromisoformat(moment) + ahead).replace(tzinfo=None).isoformat()}Z"
            for key, moment in moments.items()
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
        size = min(int(call.parameters.get("maxResults", self.state.page)), self.state.page)
        page, more = entries[:size], len(entries) > size
        items = [self.polished(resource, call) for _, resource in page if resource]
        prefixes = [name for name, resource in page if not resource]
        token = base64.urlsafe_b64encode(page[-1][0].encode()).decode() if more else ""
        found = {"items": items, "prefixes": prefixes, "nextPageToken": token}
        wanted = only(found, call.parameters.get("fields", ""))
        return answer_json({"kind": "storage#objects"} | {key: value for key, value in wanted.items() if value})

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

    # Accounts.

    def issue(self, call: Call) -> Answer:
        tokens = self.state.tokens
        demand(tokens is not None, error(404, "no accounts here: order `guard` first", "notFound"))
        assert tokens is not None
        return answer_json(tokens.issue())

    def metadata(self, call: Call, path: str) -> Answer:
        found = accounts.metadata(path, self.state.tokens)
        demand(found is not None, error(404, "no such metadata", "notFound"))
        kind = "text/plain" if isinstance(found, str) else "application/json"
        text = found if isinstance(found, str) else json.dumps(found)
        return Answer(200, text.encode(), {"Content-Type": kind, "Metadata-Flavor": "Google"})

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
