"""The way to Google Cloud Storage: one client for the process, one patience for all that may pass, one line for what may not.

TensorFlow has a client of its own for gs://. It cannot write under a condition, does not tell the checksum that the service has
computed, waits in silence, reads its settings when it is loaded, and once wrote to a local folder named `gs:`. So everything here
goes through google-cloud-storage, and TensorFlow is only ever given files of this machine.
"""

import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import google.auth.exceptions
import requests
import urllib3.exceptions
from google.api_core import exceptions
from google.api_core.retry import Retry, exponential_sleep_generator, retry_target
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from requests.adapters import HTTPAdapter

from trainer.errors import BucketAwayError, BucketRefusedError

log = logging.getLogger(__name__)
Result = TypeVar("Result")

CONNECT_SECONDS, STALL_SECONDS = 5.0, 20.0
TIMEOUT = (CONNECT_SECONDS, STALL_SECONDS)
FIRST_WAIT, LONGEST_WAIT, HURRIED_WAIT = 0.2, 8.0, 0.5
HURRIED_SECONDS = 3.0
SAY_AFTER_SECONDS = 5.0
CONNECTIONS = 64
_TEMPORARY_CODES = {408, 429, 500, 502, 503, 504}
# 410: the session of an upload is lost. 416: a download came whole but damaged, and what is behind its end was asked for.
_BEGIN_ANEW_CODES = {410, 416}
_TEMPORARY = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
    urllib3.exceptions.HTTPError,  # a body that is cut while it is read as it is, which `requests` does not translate
    google.auth.exceptions.GoogleAuthError,
)


class Patience:
    """How many seconds a request is tried again before the bucket counts as away; the config sets it."""

    seconds = 300.0


class Hurry:
    """The wish of a process that was asked to stop: reads that training waits for give up soon, if the bucket is away."""

    asked = threading.Event()
    _ends = math.inf

    @classmethod
    def ask(cls) -> None:
        """From now on such reads are tried for some seconds, however patient all else is."""
        cls._ends = time.monotonic() + HURRIED_SECONDS
        cls.asked.set()

    @classmethod
    def forget(cls) -> None:
        """Be as patient as before."""
        cls._ends = math.inf
        cls.asked.clear()

    @classmethod
    def over(cls) -> bool:
        """Whether these seconds are over."""
        return time.monotonic() > cls._ends


def _code(error: BaseException) -> int | None:
    """The HTTP status, inside the library's transfers too, where it has not been translated yet."""
    if isinstance(error, InvalidResponse):
        return int(error.response.status_code)
    return error.code if isinstance(error, exceptions.GoogleAPICallError) else None


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Wait for no longer than this, for a while."""
    usual = Patience.seconds
    Patience.seconds = min(usual, seconds)
    try:
        yield
    finally:
        Patience.seconds = usual


def may_pass(error: BaseException) -> bool:
    """Whether another try may succeed: the service is busy or away, the line was cut, credentials are not there yet."""
    code = _code(error)
    return _is_damaged(error) or (code in _TEMPORARY_CODES | _BEGIN_ANEW_CODES if code else isinstance(error, _TEMPORARY))


def _is_damaged(error: BaseException) -> bool:
    """Whether bytes were damaged on their way, as found out here, or by the service, which then answers 400."""
    return isinstance(error, DataCorruption) or (_code(error) == 400 and "doesn't match calculated" in said(error))


def may_go_on(error: BaseException) -> bool:
    """Whether a transfer may go on where it was cut; where it may not, it may still begin anew."""
    return may_pass(error) and _code(error) not in _BEGIN_ANEW_CODES and not _is_damaged(error)


_current = threading.local()
_lock = threading.Lock()
_clients: list[storage.Client] = []


def client() -> storage.Client:
    """The process's client, with the credentials that Google's libraries find.

    Raises:
        google.auth.exceptions.DefaultCredentialsError: there are none, at this moment.
    """
    with _lock:
        if not _clients:
            made = storage.Client(project=None)  # what a project is needed for is not done here
            for scheme in ("https://", "http://"):
                made._http.mount(scheme, HTTPAdapter(pool_connections=4, pool_maxsize=CONNECTIONS))
            _clients.append(made)
        return _clients[0]


def patiently(action: Callable[[], Result], what: str, seconds: float | None = None, *, hurries: bool = False) -> Result:
    """Do it, and again while what fails may pass.

    Args:
        action: one or more requests; doing them twice must be harmless.
        what: the gs:// address, for the lines.
        seconds: for how long; by default what the config says. Who gives another number says himself what it came to.
        hurries: give up soon when the process is asked to stop.

    Raises:
        BucketAwayError: it did not pass in time.
        BucketRefusedError: the service said no for good.
        FileNotFoundError: there is no such object.
        exceptions.PreconditionFailed: the object is not of the generation that was stated.
    """
    limit = Patience.seconds if seconds is None else seconds
    complaint = _Complaint(what, limit, silent=seconds is not None)
    _current.complaint = complaint
    pauses = _pauses(complaint, limit) if hurries else exponential_sleep_generator(FIRST_WAIT, LONGEST_WAIT)
    try:
        result: Result = retry_target(action, may_pass, pauses, limit, on_error=complaint.note)
        complaint.take_back()
        return result
    except exceptions.RetryError as error:
        tried = "until it was asked to stop" if hurries and Hurry.over() else f"for {limit:.0f} s"
        advice = f"tried {tried}; run this again when the bucket answers"
        raise BucketAwayError(f"{what}: {reason(error.cause or error)} ({advice})") from error
    except (exceptions.PreconditionFailed, FileNotFoundError):
        raise
    except exceptions.NotFound as error:
        raise _missing(error, what) from error
    except exceptions.GoogleAPICallError as error:
        raise BucketRefusedError(refusal(error, what)) from error
    finally:
        complaint.end()


def _pauses(complaint: "_Complaint", limit: float) -> Iterator[float]:
    """The usual pauses, waited here, where a stop cuts them short; what is yielded is still to be waited.

    Raises:
        exceptions.RetryError: the time is over, or a stop was asked for some seconds ago.
    """
    ends = time.monotonic() + limit
    for pause in exponential_sleep_generator(FIRST_WAIT, LONGEST_WAIT):
        if Hurry.over() or time.monotonic() + pause > ends:
            raise exceptions.RetryError("the time is over", complaint.latest)  # type: ignore[no-untyped-call]
        yield HURRIED_WAIT if Hurry.asked.wait(pause) else 0.0


def going_on_for(seconds: float) -> Retry:
    """The policy inside a transfer, whose failures are noted by the complaint of the request that it is part of.

    Waits are those of everywhere: 0.2 s, 0.4 s and so on up to 8 s, each shortened at random.
    """
    complaint: _Complaint | None = getattr(_current, "complaint", None)
    return Retry(may_go_on, FIRST_WAIT, LONGEST_WAIT, 2.0, seconds, on_error=complaint.note if complaint else None)


class _Complaint:
    """What is said while a request is tried again and again: once when it lasts, and once when it is over.

    Of many requests that fail at the same time, one speaks for its bucket.
    """

    _speakers: ClassVar[dict[str, "_Complaint"]] = {}

    def __init__(self, what: str, limit: float, *, silent: bool) -> None:
        self._what, self._limit, self._silent = what, limit, silent
        self._bucket = "/".join(what.split("/")[:3])
        self._since: float | None = None
        self.latest: Exception | None = None

    def note(self, error: Exception) -> None:
        self.latest = error
        self._since = self._since or time.monotonic()
        lasts = time.monotonic() - self._since > min(SAY_AFTER_SECONDS, self._limit / 2)
        due = lasts or isinstance(error, google.auth.exceptions.GoogleAuthError)
        if due and not self._silent and self._speakers.get(self._bucket) is None:
            self._speakers[self._bucket] = self
            log.warning("%s: %s; trying again for up to %.0f s", self._what, reason(error), self._limit)

    def take_back(self) -> None:
        if self._speakers.get(self._bucket) is self and self._since is not None:
            log.info("%s: answers again, after %.0f s", self._what, time.monotonic() - self._since)

    def end(self) -> None:
        """Let another request speak when this one is over, in whatever way."""
        if self._speakers.get(self._bucket) is self:
            del self._speakers[self._bucket]


def _missing(error: exceptions.NotFound, what: str) -> Exception:
    """A missing object is a missing file; a missing bucket is a mistake."""
    if "bucket does not exist" in said(error):
        return BucketRefusedError(f"{'/'.join(what.split('/')[:3])}: there is no bucket of this name; make it, or mend the name")
    return FileNotFoundError(2, "there is no such object", what)


def said(error: BaseException) -> str:
    """The service's own sentence, without method and address."""
    response: Any = getattr(error, "response", None)
    text: str = getattr(error, "message", None) or str(error) or type(error).__name__
    if isinstance(response, requests.Response):
        try:
            text = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            text = response.text or text
    return " ".join(text.split())


def reason(error: BaseException) -> str:
    """Why a request failed, in a few words."""
    if "default credentials were not found" in said(error):
        return "no credentials found; run `gcloud auth application-default login`, or give the job a service account"
    if isinstance(error, google.auth.exceptions.GoogleAuthError):
        return f"the credentials do not work: {said(error)[:200]}"
    if _is_damaged(error):
        return "the bytes that arrived do not match their checksum"
    if code := _code(error):
        return f"the service answers {code} ({said(error)[:200]})"
    if isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError)):
        return f"no answer for {STALL_SECONDS:.0f} s"
    cut = isinstance(error, (requests.ConnectionError, urllib3.exceptions.HTTPError))
    return "the connection fails" if cut else str(error)


def refusal(error: exceptions.GoogleAPICallError, what: str) -> str:
    """The line for a request that is refused: the bucket, the permission, the account, and what to do."""
    text = said(error)[:400]
    if "retention" in text.lower():
        advice = "a run replaces and removes what it wrote before, so it needs a bucket without a retention policy"
        return f"{what}: {text} ({advice})"
    if error.code not in (401, 403):
        return f"{what}: the service answers {error.code}: {text}"
    whom = "" if "@" in text else f"refused to {_account()}: "
    permission = re.search(r"storage\.\w+\.\w+", text)
    return f"{what}: {whom}{text.rstrip('.')}{_grant(permission[0]) if permission else ''}"


def _grant(permission: str) -> str:
    role = "objectViewer" if permission in ("storage.objects.get", "storage.objects.list") else "objectAdmin"
    return f"; grant it {permission}, which roles/storage.{role} has"


def _account() -> str:
    found: object = getattr(client()._credentials, "service_account_email", None)
    return str(found) if found else "this account"
