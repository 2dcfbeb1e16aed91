"""What the bucket may answer, operation by operation: what is retried, what is given up at once, and with which error."""

import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from google.api_core.exceptions import PreconditionFailed

from tests.helpers.bucket.answers import NO_BUCKET, QUANTUM, RATE_LIMITED, UNAVAILABLE, error, no_object
from tests.helpers.bucket.faults import Fault, Request, refuse
from tests.helpers.bucket.service import BucketService
from tests.helpers.waiting import wait_until
from trainer.errors import BucketAwayError, BucketRefusedError, ExitCode
from trainer.storage.bucket import BucketPath, parse
from trainer.storage.service import TIMEOUT, Hurry, Patience
from trainer.storage.transfer import ahead

OLD, NEW, LARGE = b"old" * 1000, b"new" * 999, bytes(range(250)) * 2400
FILES = {"small": NEW, "large": LARGE}


class Operation(NamedTuple):
    """One way to use an object named like it, whose first content is OLD.

    Attributes:
        method: of the request that is to meet the fault.
        act: what is done, given the object and a folder of this machine; what it comes to.
        result: what that is when all is well.
    """

    method: str
    act: Callable[[BucketPath, Path], object]
    result: object


def downloaded(place: BucketPath, here: Path) -> bytes:
    place.download(here / "downloaded")
    return (here / "downloaded").read_bytes()


def written(place: BucketPath, _: Path) -> bytes:
    place.write_bytes(NEW)
    return place.read_bytes()


def uploaded(place: BucketPath, here: Path) -> bytes:
    place.upload(here / ("large" if place.name == "parts" else "small"))
    return place.read_bytes()


def removed(place: BucketPath, _: Path) -> bool:
    place.unlink()
    return place.is_file()


OPERATIONS = {
    "read": Operation("GET", lambda place, _: place.read_bytes(), OLD),
    "range": Operation("GET", lambda place, _: place.read_range(10, 50), OLD[10:50]),
    "versioned": Operation("GET", lambda place, _: place.read_versioned()[0], OLD),
    "download": Operation("GET", downloaded, OLD),
    "look": Operation("GET", lambda place, _: getattr(place.state(), "size", None), len(OLD)),
    "list": Operation("GET", lambda place, _: list(place.listing()), ["below"]),
    "write": Operation("POST", written, NEW),
    "upload": Operation("POST", uploaded, NEW),
    "parts": Operation("PUT", uploaded, LARGE),
    "delete": Operation("DELETE", removed, False),
}
READS, WRITES = {"read", "download"}, {"write", "upload", "parts"}


@pytest.fixture
def folder(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BucketPath:
    """One object for each operation. Pauses are short, and what is large begins at two parts of the smallest size."""
    monkeypatch.setattr("trainer.storage.service.FIRST_WAIT", 0.001)
    monkeypatch.setattr("trainer.storage.service.LONGEST_WAIT", 0.01)
    monkeypatch.setattr(Patience, "seconds", 30.0)
    monkeypatch.setattr("trainer.storage.bucket.UPLOAD_CHUNK", QUANTUM)
    monkeypatch.setattr("google.cloud.storage.blob._MAX_MULTIPART_SIZE", QUANTUM)
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    there = parse(f"{bucket}/folder")
    for name in OPERATIONS:
        (there / name).write_bytes(OLD)
    (there / "list" / "below").write_bytes(OLD)
    return there


def where(name: str) -> str:
    """An expression for the requests of an operation, on whatever route."""
    return rf"folder/{name}(\W|$)"


def outcomes(folder: BucketPath, here: Path, names: list[str]) -> dict[str, object]:
    """What operations come to when all are done at the same time; the error of one that raises."""

    def of(name: str) -> object:
        try:
            return OPERATIONS[name].act(folder / name, here)
        except Exception as raised:  # noqa: BLE001 - whatever it is, it is what the operation came to
            return raised

    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(of, names), strict=True))


def is_of(name: str, request: Request) -> bool:
    """Whether a request is of the kind that meets the fault of an operation."""
    return request.method == OPERATIONS[name].method and re.search(where(name), request.path) is not None


def order(service: BucketService, names: list[str], **fault: Any) -> None:
    service.clear()
    service.faults(*(Fault(method=OPERATIONS[name].method, path=where(name), **fault) for name in names))


def met(service: BucketService) -> list[Request]:
    return [request for request in service.requests() if request.fault]


@pytest.mark.parametrize("status", [408, 410, 416, 429, 500, 502, 503, 504])
def test_a_status_that_may_pass_is_tried_again(
    status: int, folder: BucketPath, bucket_service: BucketService, tmp_path: Path
) -> None:
    """But that of a range, 416 says that it lies behind the object's end."""
    names = [name for name in OPERATIONS if (name, status) != ("range", 416)]
    order(bucket_service, names, action="status", status=status, times=2)
    assert outcomes(folder, tmp_path, names) == {name: OPERATIONS[name].result for name in names}
    assert [request.status for request in met(bucket_service)] == [status] * 2 * len(names)


@pytest.mark.parametrize(
    ("action", "names"),
    [
        ("reset", list(OPERATIONS)),
        ("close", list(OPERATIONS)),
        ("truncate", ["read", "range", "download"]),
        ("corrupt", ["read", "download"]),
        ("lost_reply", ["write", "upload", "parts"]),
        ("cut_upload", ["write", "upload", "parts"]),
        ("corrupt", ["write", "upload", "parts"]),
    ],
)
def test_a_connection_that_breaks_is_tried_again(
    action: str, names: list[str], folder: BucketPath, bucket_service: BucketService, tmp_path: Path
) -> None:
    order(bucket_service, names, action=action, times=2)
    assert outcomes(folder, tmp_path, names) == {name: OPERATIONS[name].result for name in names}
    assert len(met(bucket_service)) == 2 * len(names)


def test_a_service_that_says_nothing_is_asked_again(
    folder: BucketPath, bucket_service: BucketService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request has the trainer's own limit; the client's is a minute."""
    monkeypatch.setattr("trainer.storage.bucket.TIMEOUT", (5.0, 0.5))
    names = list(OPERATIONS)
    order(bucket_service, names, action="stall", seconds=3600)
    began = time.monotonic()
    assert outcomes(folder, tmp_path, names) == {name: OPERATIONS[name].result for name in names}
    assert len(met(bucket_service)) == len(names)
    assert time.monotonic() - began < 50


@pytest.mark.slow
def test_a_stall_is_given_up_after_20_seconds_and_the_request_sent_again(
    folder: BucketPath, bucket_service: BucketService, tmp_path: Path
) -> None:
    names = ["read", "range", "write"]
    order(bucket_service, names, action="stall", seconds=3600)
    assert outcomes(folder, tmp_path, names) == {name: OPERATIONS[name].result for name in names}
    assert TIMEOUT == (5.0, 20.0)
    for name in names:
        stalled, again = (request for request in bucket_service.requests() if is_of(name, request))
        assert (stalled.fault, stalled.status, again.fault, again.status) == ("stall", 0, "", 206 if name == "range" else 200)
        assert again.time - stalled.time > 19.5, "a request's own time is that of its arrival"


@pytest.mark.parametrize("status", [400, 403, 405, 409, 499, 501, 505])
def test_a_status_that_does_not_pass_is_given_up_at_once(
    status: int, folder: BucketPath, bucket_service: BucketService, tmp_path: Path
) -> None:
    """401 is in test_credentials: there it depends on them."""
    names = list(OPERATIONS)
    order(bucket_service, names, action="status", times=None, body=error(status, "Thus spoke the service."))
    for name, raised in outcomes(folder, tmp_path, names).items():
        assert isinstance(raised, BucketRefusedError), (name, raised)
        assert raised.exit_code == ExitCode.USER == 2
        assert str(raised).startswith(f"{folder / name}: ")
        assert "Thus spoke the service" in str(raised)
        assert ("refused to this account: " in str(raised)) == (status == 403), "whose permission, where that is why"
    assert len(met(bucket_service)) == len(names), "once each"


def test_an_object_that_is_gone_is_a_missing_file(folder: BucketPath, bucket_service: BucketService, tmp_path: Path) -> None:
    names = ["read", "range", "versioned", "download", "look", "list", "delete"]
    order(bucket_service, names, action="status", times=None, body=no_object(folder.bucket, "x"))
    found = outcomes(folder, tmp_path, names)
    assert (found.pop("versioned"), found.pop("look"), found.pop("list")) == (b"", None, [])
    assert {name: (type(raised), raised.filename) for name, raised in found.items()} == {  # type: ignore[attr-defined]
        name: (FileNotFoundError, str(folder / name)) for name in found
    }
    assert len(met(bucket_service)) == len(names)


def test_a_bucket_that_is_gone_is_a_mistake_of_the_user(
    folder: BucketPath, bucket_service: BucketService, tmp_path: Path
) -> None:
    names = ["read", "range", "download", "list", "write", "upload", "delete"]
    order(bucket_service, names, action="status", times=None, body=NO_BUCKET)
    line = f"gs://{folder.bucket}: there is no bucket of this name; make it, or mend the name"
    for name, raised in outcomes(folder, tmp_path, names).items():
        assert (type(raised), str(raised)) == (BucketRefusedError, line), name
    assert len(met(bucket_service)) == len(names)


def test_a_condition_that_does_not_hold_is_no_matter_of_retries(
    folder: BucketPath, bucket_service: BucketService, tmp_path: Path
) -> None:
    names = ["write", "upload", "parts", "delete"]
    order(bucket_service, names, action="status", times=None, status=412)
    assert {name: type(raised) for name, raised in outcomes(folder, tmp_path, names).items()} == dict.fromkeys(
        names, PreconditionFailed
    )
    assert len(met(bucket_service)) == len(names)


def test_every_operation_gives_up_in_time_with_75(
    folder: BucketPath, bucket_service: BucketService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Patience, "seconds", 2.0)
    names = list(OPERATIONS)
    order(bucket_service, names, action="status", times=None)
    for name, raised in outcomes(folder, tmp_path, names).items():
        assert isinstance(raised, BucketAwayError), (name, raised)
        assert raised.exit_code == ExitCode.AGAIN == 75
        assert str(raised).startswith(f"{folder / name}: the service answers 503 (")
        assert str(raised).endswith(" (tried for 2 s; run this again when the bucket answers)")
    tries = [sum(where(name)[:-6] in request.path for request in met(bucket_service)) for name in names]
    assert min(tries) > 3


def test_pauses_grow_up_to_a_limit_and_come_by_lot(
    folder: BucketPath, bucket_service: BucketService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the service asks of its clients; the pauses are seen where they are waited."""
    waited: list[float] = []
    monkeypatch.setattr("trainer.storage.service.FIRST_WAIT", 0.2)
    monkeypatch.setattr("trainer.storage.service.LONGEST_WAIT", 8.0)
    monkeypatch.setattr("google.api_core.retry.retry_unary.time.sleep", waited.append)
    bucket_service.faults(refuse(UNAVAILABLE, "GET", where("read"), times=12))
    assert (folder / "read").read_bytes() == OLD
    longest = [min(0.2 * 2**number, 8.0) for number in range(12)]
    assert len(waited) == 12
    assert all(0 <= pause <= limit for pause, limit in zip(waited, longest, strict=True))
    assert max(waited) > 1.0, "of the last seven, each between 0 and 8 s"
    assert len(set(waited)) == 12


def test_a_flood_of_429_is_waited_out_by_all_and_one_line_says_so(
    folder: BucketPath, bucket_service: BucketService, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen threads write; the service takes nothing until they have tried 100 times."""
    monkeypatch.setattr("trainer.storage.service.SAY_AFTER_SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    bucket_service.faults(refuse(RATE_LIMITED, "POST", "folder/flood"))

    def write(number: int) -> bytes:
        (folder / f"flood-{number:02}").write_bytes(b"%d" % number)
        return (folder / f"flood-{number:02}").read_bytes()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(list, ahead(write, range(40)))
        wait_until(lambda: len(met(bucket_service)) > 100)
        bucket_service.faults()
        assert done.result(60) == [b"%d" % number for number in range(40)]
    assert {request.status for request in met(bucket_service)} == {429}
    lines = [record.getMessage() for record in caplog.records]
    assert 1 <= sum("the service answers 429 (The object exceeded the rate limit" in line for line in lines) <= 3
    assert 1 <= sum("answers again, after" in line for line in lines) <= 3


def test_reads_that_training_waits_for_give_up_soon_after_a_stop(
    folder: BucketPath, bucket_service: BucketService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And others do not: a save has its whole patience."""
    monkeypatch.setattr("trainer.storage.service.HURRIED_SECONDS", 0.3)
    monkeypatch.setattr(Patience, "seconds", 300.0)
    bucket_service.faults(refuse(UNAVAILABLE, "GET", where("range")))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit((folder / "range").read_range, 0, 10)
        wait_until(lambda: met(bucket_service))
        try:
            Hurry.ask()
            with pytest.raises(BucketAwayError, match=r"tried until it was asked to stop; run this again"):
                reading.result(30)
            bucket_service.faults(refuse(UNAVAILABLE, "POST", where("write"), times=3))
            assert (folder / "write").write_bytes(NEW).size == len(NEW)
        finally:
            Hurry.forget()
            bucket_service.faults()
