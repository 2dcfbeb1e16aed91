"""Credentials that come late, expire or are refused: the client of Google Cloud, led to accounts on loopback."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.bucket import accounts
from tests.helpers.bucket.answers import UNAUTHORIZED, error
from tests.helpers.bucket.faults import Fault, refuse
from tests.helpers.bucket.service import BucketService
from tests.helpers.processes import run_trainer
from tests.helpers.waiting import wait_until
from trainer.errors import BucketAwayError, BucketRefusedError, ExitCode
from trainer.storage import service
from trainer.storage.bucket import BucketPath, parse
from trainer.storage.service import Patience


@pytest.fixture
def key(tmp_path: Path, bucket_service: BucketService, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where GOOGLE_APPLICATION_CREDENTIALS looks for a key; the service asks for tokens."""
    file = tmp_path / "key.json"
    for name, value in accounts.environment(bucket_service.url, file).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(service, "_clients", [])
    monkeypatch.setattr(Patience, "seconds", 30.0)
    monkeypatch.setattr(service, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(service, "LONGEST_WAIT", 0.05)
    return file


@pytest.fixture
def place(bucket: str, bucket_service: BucketService, key: Path) -> BucketPath:
    bucket_service.guard()
    return parse(f"{bucket}/x")


def seen(bucket_service: BucketService) -> list[tuple[str, int]]:
    """What was asked for, as a word, and the answers."""
    requests = bucket_service.requests()
    return [("token" if request.path == accounts.TOKEN else "object", request.status) for request in requests]


def said(caplog: pytest.LogCaptureFixture) -> Callable[[], bool]:
    return lambda: any("the credentials do not work" in record.getMessage() for record in list(caplog.records))


def test_a_key_that_comes_late_is_waited_for(
    place: BucketPath, key: Path, bucket_service: BucketService, caplog: pytest.LogCaptureFixture
) -> None:
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(place.write_bytes, b"1")
        wait_until(said(caplog))
        accounts.write_key(key, bucket_service.url)
        assert writing.result(60).size == 1
    assert seen(bucket_service) == [("token", 200), ("object", 200)]
    assert f"{place}: the credentials do not work: File {key} was not found.; trying again for up to 30 s" in caplog.text


def test_an_issuer_of_tokens_that_does_not_answer_yet_is_waited_for(
    place: BucketPath, key: Path, bucket_service: BucketService, caplog: pytest.LogCaptureFixture
) -> None:
    """As a metadata server in the first seconds of a pod. It is said at once, since the cause may be another."""
    caplog.set_level(logging.INFO)
    accounts.write_key(key, bucket_service.url)
    bucket_service.faults(Fault("reset", "POST", "^/token", times=3))
    assert place.write_bytes(b"1").size == 1
    assert seen(bucket_service) == [("token", 0)] * 3 + [("token", 200), ("object", 200)]
    assert "the credentials do not work" in caplog.text
    assert f"{place}: answers again, after" in caplog.text


def test_a_token_that_was_withdrawn_is_replaced_and_the_request_sent_again(
    place: BucketPath, key: Path, bucket_service: BucketService
) -> None:
    accounts.write_key(key, bucket_service.url)
    place.write_bytes(b"1")
    bucket_service.clear()
    bucket_service.guard()
    assert place.read_bytes() == b"1"
    assert place.read_bytes() == b"1"
    assert seen(bucket_service) == [("object", 401), ("token", 200), ("object", 200), ("object", 200)]


def test_a_token_is_replaced_before_it_expires(place: BucketPath, key: Path, bucket_service: BucketService) -> None:
    """One that has less than four minutes left: no request ever meets a 401."""
    accounts.write_key(key, bucket_service.url)
    bucket_service.guard(lifetime=120)
    place.write_bytes(b"1")
    assert place.read_bytes() == b"1"
    assert seen(bucket_service) == [("token", 200), ("object", 200)] * 2


def test_an_account_that_stays_unknown_is_refused_by_its_name(
    place: BucketPath, key: Path, bucket_service: BucketService
) -> None:
    accounts.write_key(key, bucket_service.url)
    bucket_service.faults(refuse(UNAUTHORIZED, "GET"))
    with pytest.raises(BucketRefusedError) as caught:
        place.read_bytes()
    assert caught.value.exit_code == ExitCode.USER
    assert str(caught.value) == f"{place}: refused to {accounts.ACCOUNT}: Invalid Credentials"
    asked = [status for what, status in seen(bucket_service) if what == "object"]
    assert set(asked) == {401}
    assert len(asked) <= 3, "the client asks for new tokens, and then nobody does"


def test_a_key_that_was_deleted_ends_with_75_and_the_issuers_reason(
    place: BucketPath, key: Path, bucket_service: BucketService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Patience, "seconds", 0.5)
    accounts.write_key(key, bucket_service.url)
    bucket_service.faults(refuse(error(400, "Invalid JWT Signature."), "POST", "^/token"))
    with pytest.raises(
        BucketAwayError, match=r"the credentials do not work: .*Invalid JWT Signature.* \(tried for 0 s;"
    ) as caught:
        place.read_bytes()
    assert caught.value.exit_code == ExitCode.AGAIN


@pytest.mark.slow
def test_on_google_cloud_the_machines_account_is_found(bucket: str, bucket_service: BucketService) -> None:
    """A machine or a pod with a service account has no key: its metadata server issues tokens, at times late."""
    bucket_service.guard()
    bucket_service.faults(Fault("status", "GET", "default/token", times=2))
    host = bucket_service.url.removeprefix("http://")
    variables = {"GCE_METADATA_HOST": host, "GCE_METADATA_IP": host, "NO_GCE_CHECK": "", "CLOUDSDK_CONFIG": "/nonexistent"}
    given = {"STORAGE_EMULATOR_HOST": "", "API_ENDPOINT_OVERRIDE": bucket_service.url, "GOOGLE_APPLICATION_CREDENTIALS": ""}
    done = run_trainer(f"--model_dir={bucket}/run", "--set=train.batch_size=1000", cold=True, **variables, **given)
    assert done.returncode == 2, done.stderr
    assert "train.batch_size: got 1000" in done.stderr.splitlines()[-1], "all that comes before it has worked"
    asked = bucket_service.requests()
    assert [request.status for request in asked if "default/token" in request.path][:3] == [503] * 2 + [200]
    assert {request.status for request in asked if "/b/" in request.path} <= {200, 204, 404}, "no 401"
