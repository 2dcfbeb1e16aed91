"""Faults to order, by rule or by lot, requests to hold, and the log of what arrived."""

import email
import email.message
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.helpers.bucket.accounts import Tokens
from tests.helpers.bucket.answers import PAGE, Action, Content, Json


@dataclass
class Fault:
    """What befalls the requests whose method is `method` and whose unquoted path and query contain `path` (an expression).

    The path of an upload always ends in or contains `name=OBJECT`, that of its later parts too.  After `skip` requests
    that fit, `times` of them (None: all) meet the fault; the first of several rules that fit is the one that counts.

    `hold` keeps a request before anything of it is done, or after so many `bytes` of its body have come; `hold_reply` keeps the
    answer to what was done. `BucketService.held` counts those that are kept, `release` lets them go: who waits for the answer
    gets it, and of a request whose sender is dead nothing more is done.
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
    def subject(self) -> str:
        """What is asked for, without what differs from run to run: the bucket, sessions, and parts of names made by lot."""
        route = unquote(re.sub(r"/b/[^/]+", "", self.route))
        named = [self.parameters.get(key, "") for key in ("name", "prefix", "alt", "uploadType", "pageToken")]
        parts = [self.method, route, self.name, *named, self.headers["Range"] or "", self.headers["Content-Range"] or ""]
        return re.sub(r"tfevents\S*|[0-9a-f]{10,}", "*", " ".join(parts))

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
    """Faults by lot: a function of the seed, of what is asked for, and of how often it was asked for before.

    Which request fails does not depend on what other threads ask for meanwhile, nor on names that are made by lot.
    """

    share: float
    seed: int
    kinds: Sequence[str] = KINDS
    seconds: float = 5.0

    def __post_init__(self) -> None:
        unknown = {kind for kind in self.kinds if not kind.isdigit()} - set(get_args(Action))
        if unknown:
            raise ValueError(f"unknown kinds of faults: {sorted(unknown)}")
        self.tries: Counter[str] = Counter()

    def draw(self, call: Call) -> Fault | None:
        """The fault of the next try of a request, None if it has luck."""
        self.tries[call.subject] += 1
        text = f"{self.seed} {call.subject} {self.tries[call.subject]}"
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        luck, choice = (int.from_bytes(half) / 2**64 for half in (digest[:8], digest[8:]))
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
        self.released, self.gate = threading.Event(), threading.Event()
        self.holding = 0
        self.log: list[Request] = []
        self.clear()

    def clear(self) -> None:
        """No faults, no throttle, an empty log; whoever is being stalled is let go."""
        self.released.set()
        self.release()
        with self.lock:
            self.released = threading.Event()
            self.rules: list[Fault] = []
            self.chance: Chance | None = None
            self.latency, self.rate, self.gone = 0.0, 0.0, False
            self.ahead, self.page = 0.0, PAGE
            self.tokens: Tokens | None = None
            self.log.clear()

    def faults(self, rules: list[Json]) -> None:
        self.rules = [Fault(**rule) for rule in rules]

    def random_faults(self, **chance: Any) -> None:
        self.chance = Chance(**chance)

    def away(self, gone: bool) -> None:
        self.gone = gone

    def throttle(self, latency: float, rate: float) -> None:
        self.latency, self.rate = latency, rate

    def clock(self, ahead: float) -> None:
        self.ahead = ahead

    def limit_pages(self, entries: int) -> None:
        self.page = entries

    def guard(self, lifetime: float) -> None:
        self.tokens = Tokens(lifetime)

    def held(self) -> int:
        return self.holding

    def release(self) -> None:
        self.gate.set()
        self.gate = threading.Event()

    def keep(self) -> None:
        """Hold the request of this thread until it is released."""
        with self.lock:
            self.holding += 1
            gate = self.gate
        gate.wait()
        with self.lock:
            self.holding -= 1

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
