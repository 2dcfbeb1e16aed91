"""The stand-in for Google Cloud Storage, through the client that the trainer uses: what it keeps, refuses and breaks."""

import base64
import datetime
import email.message
import io
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import requests
from google.api_core import exceptions
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from google.cloud.storage.retry import DEFAULT_RETRY

from tests.helpers.bucket.answers import QUANTUM, RATE_LIMITED, forbidden, retained
from tests.helpers.bucket.faults import Call, Chance, Fault, Request, refuse
from tests.helpers.bucket.service import BucketService
from tests.helpers.clock import assert_within
from tests.helpers.processes import is_running
from tests.helpers.waiting import wait_until

ROOT = Path(__file__).parents[2]
SOON = DEFAULT_RETRY.with_delay(initial=0.05, maximum=0.2).with_timeout(20)
NETWORK = (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError)


@pytest.fixture
def box(bucket: str) -> storage.Bucket:
    """A fresh bucket, as the client shows it."""
    return storage.Client().bucket(bucket.removeprefix("gs://"))


def content(length: int, seed: int = 0) -> bytes:
    block = bytes((index * 31 + index // 251 + seed) % 256 for index in range(65536))
    return (block * (length // 65536 + 1))[:length]


def put(box: storage.Bucket, name: str, data: bytes, chunk: int | None = None, **options: Any) -> storage.Blob:
    """Uploads without the client's own retries: at once, or resumable in chunks of this size."""
    blob = box.blob(name, chunk_size=chunk)
    # Told the length, the client would send up to 8 MiB at once whatever the size of the chunks is.
    length = len(data) if chunk is None or len(data) > 8 << 20 else None
    blob.upload_from_file(io.BytesIO(data), size=length, **{"retry": None, "timeout": 10} | options)
    return blob


def get(box: storage.Bucket, name: str, **options: Any) -> bytes:
    data: bytes = box.blob(name).download_as_bytes(**{"retry": None, "timeout": 10} | options)
    return data


def names(box: storage.Bucket, **options: Any) -> list[str]:
    return [blob.name for blob in box.list_blobs(**options)]


def objects(service: BucketService, method: str) -> list[Request]:
    return [entry for entry in service.requests() if entry.method == method and "/o" in entry.path]


# What it keeps.


def test_a_bucket_made_by_the_client_takes_objects_and_is_deleted_when_empty(bucket_service: BucketService) -> None:
    box = storage.Client().create_bucket("made-by-client")
    put(box, "a", b"1")
    with pytest.raises(exceptions.Conflict, match="not empty"):
        box.delete()
    box.delete_blob("a")
    box.delete()
    assert not box.exists()


@pytest.mark.parametrize("chunk", [None, QUANTUM])
@pytest.mark.parametrize("length", [0, 5, QUANTUM, 3 * QUANTUM + 17])
def test_an_object_comes_back_as_it_was_sent(box: storage.Bucket, length: int, chunk: int | None) -> None:
    data = content(length)
    put(box, "models/ü x/1.keras", data, chunk)
    assert get(box, "models/ü x/1.keras") == data


def test_a_resumable_upload_comes_in_chunks(bucket_service: BucketService, box: storage.Bucket) -> None:
    put(box, "a", content(2 * QUANTUM + 1), QUANTUM)
    parts = [(entry.range, entry.status, entry.received) for entry in objects(bucket_service, "PUT")]
    assert parts == [
        ("bytes 0-262143/*", 308, QUANTUM),
        ("bytes 262144-524287/*", 308, QUANTUM),
        ("bytes 524288-524288/524289", 200, 1),
    ]


def test_metadata_tell_size_checksum_generation_and_time(box: storage.Bucket) -> None:
    data = content(1000)
    sent = box.blob("a")
    sent.metadata = {"step": "12"}
    sent.upload_from_string(data, content_type="application/x-tar", retry=None)
    blob = box.get_blob("a")
    assert (blob.size, blob.content_type, blob.metadata) == (1000, "application/x-tar", {"step": "12"})
    assert base64.b64decode(blob.crc32c) == google_crc32c.value(data).to_bytes(4, "big")
    assert blob.generation == sent.generation > 0
    assert abs(blob.updated - datetime.datetime.now(datetime.UTC)) < datetime.timedelta(minutes=1)
    assert box.get_blob("b") is None


def test_metadata_can_be_changed(box: storage.Bucket) -> None:
    blob = put(box, "a", b"1")
    blob.metadata = {"step": "13"}
    blob.patch(retry=None)
    assert box.get_blob("a").metadata == {"step": "13"}
    assert blob.generation == box.get_blob("a").generation


@pytest.mark.parametrize(("start", "end"), [(0, 0), (10, 19), (990, None), (990, 5000), (-7, None), (0, 999)])
def test_a_range_is_read_exactly(bucket_service: BucketService, box: storage.Bucket, start: int, end: int | None) -> None:
    data = content(1000)
    put(box, "a", data)
    expected = data[start:] if end is None else data[start : end + 1]
    assert get(box, "a", start=start, end=end) == expected
    last = objects(bucket_service, "GET")[-1]
    assert (last.status, last.sent) == (206, len(expected))


def test_a_range_beyond_the_end_is_refused(box: storage.Bucket) -> None:
    put(box, "a", b"12345")
    with pytest.raises(exceptions.RequestRangeNotSatisfiable):
        get(box, "a", start=5)


def test_a_list_knows_prefixes_and_delimiters(box: storage.Bucket) -> None:
    for name in ["a", "d/1", "d/2", "d/e/3", "f/4", "z"]:
        put(box, name, b"1")
    assert names(box) == ["a", "d/1", "d/2", "d/e/3", "f/4", "z"]
    assert names(box, prefix="d/") == ["d/1", "d/2", "d/e/3"]
    found = box.list_blobs(prefix="d/", delimiter="/")
    assert ([blob.name for blob in found], found.prefixes) == (["d/1", "d/2"], {"d/e/"})
    assert names(box, start_offset="d/2", end_offset="z") == ["d/2", "d/e/3", "f/4"]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pages_hold_objects_and_prefixes_together(box: storage.Bucket, size: int) -> None:
    for name in ["a", "b/1", "b/2", "b/3", "c", "d/1", "e"]:
        put(box, name, b"1")
    found = box.list_blobs(delimiter="/", page_size=size)
    pages = [[blob.name for blob in page] for page in found.pages]
    assert (list(itertools.chain(*pages)), found.prefixes) == (["a", "c", "e"], {"b/", "d/"})
    assert len(pages) == -(-5 // size)
    assert names(box, page_size=size) == ["a", "b/1", "b/2", "b/3", "c", "d/1", "e"]


def test_a_page_has_at_most_so_many_entries_and_each_what_is_asked_for(
    bucket_service: BucketService, box: storage.Bucket
) -> None:
    for number in range(7):
        put(box, f"{number}", b"12")
    bucket_service.limit_pages(3)
    assert [len(list(page)) for page in box.list_blobs().pages] == [3, 3, 1]
    assert [len(list(page)) for page in box.list_blobs(page_size=100, max_results=6).pages] == [3, 3]
    found = list(box.list_blobs(fields="items(name,generation),nextPageToken"))
    assert [(blob.name, blob.size) for blob in found] == [(f"{number}", None) for number in range(7)]
    assert len(list(box.list_blobs(fields="items(name)"))) == 3, "the token of the next page is a field like others"


@pytest.mark.slow
def test_a_page_has_at_most_a_thousand_entries(box: storage.Bucket) -> None:
    expected = [f"{number:05}" for number in range(1003)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: put(box, name, b""), expected))
    assert [len(list(page)) for page in box.list_blobs().pages] == [1000, 3]
    assert names(box) == expected


def test_a_deleted_object_is_gone(box: storage.Bucket) -> None:
    put(box, "a", b"1")
    box.delete_blob("a")
    assert names(box) == []
    with pytest.raises(exceptions.NotFound, match=f"No such object: {box.name}/a"):
        box.delete_blob("a")
    with pytest.raises(exceptions.NotFound, match=f"No such object: {box.name}/a"):
        get(box, "a")


def test_a_batch_deletes_with_one_request(bucket_service: BucketService, box: storage.Bucket) -> None:
    for number in range(20):
        put(box, f"{number:02}", b"1")
    bucket_service.clear()
    with box.client.batch():
        for number in range(19):
            box.blob(f"{number:02}").delete()
    assert bucket_service.count() == 1
    assert [entry.status for entry in bucket_service.requests() if entry.batched] == [204] * 19
    assert names(box) == ["19"]


def test_a_batch_heeds_preconditions_and_faults_for_each_part(bucket_service: BucketService, box: storage.Bucket) -> None:
    for name in "abcd":
        put(box, name, b"1")
    bucket_service.faults(refuse(RATE_LIMITED, "DELETE", r"/o/c\b"))
    with box.client.batch(raise_exception=False) as batch:
        box.blob("a").delete()
        box.blob("b").delete(if_generation_match=1)
        box.blob("c").delete()
        box.blob("e").delete()
    assert [response.status_code for response in batch._responses] == [204, 412, 429, 404]
    assert names(box) == ["b", "c", "d"]


def test_compose_joins_in_order(box: storage.Bucket) -> None:
    parts = [content(QUANTUM, seed) for seed in range(3)]
    blobs = [put(box, f"part-{index}", part) for index, part in enumerate(parts)]
    whole = box.blob("whole")
    whole.compose(blobs, if_generation_match=0, retry=None)
    assert get(box, "whole") == b"".join(parts)
    assert base64.b64decode(whole.crc32c) == google_crc32c.value(b"".join(parts)).to_bytes(4, "big")
    with pytest.raises(exceptions.NotFound, match="no-such-part"):
        box.blob("other").compose([blobs[0], box.blob("no-such-part")], retry=None)


def test_a_copy_is_independent(box: storage.Bucket) -> None:
    source = put(box, "a", b"old")
    box.copy_blob(source, box, "b", retry=None)
    box.blob("c").rewrite(source, retry=None)
    put(box, "a", b"new")
    assert [get(box, name) for name in "abc"] == [b"new", b"old", b"old"]


def test_an_object_of_many_megabytes_is_kept(box: storage.Bucket) -> None:
    data = content(20 << 20)
    blob = put(box, "big", data, 8 << 20)
    assert blob.size == len(data)
    assert get(box, "big", start=15 << 20, end=(15 << 20) + 99) == data[15 << 20 :][:100]
    assert get(box, "big") == data


# Preconditions and overwriting.

Write = Callable[[storage.Bucket, int], Any]


def composed(box: storage.Bucket, generation: int) -> None:
    box.blob("a").compose([put(box, "source", b"new")], if_generation_match=generation, retry=None)


def rewritten(box: storage.Bucket, generation: int) -> None:
    box.blob("a").rewrite(put(box, "source", b"new"), if_generation_match=generation, retry=None)


WRITES: dict[str, Write] = {
    "multipart": lambda box, generation: put(box, "a", b"new", if_generation_match=generation),
    "resumable": lambda box, generation: put(box, "a", b"new", QUANTUM, if_generation_match=generation),
    "compose": composed,
    "rewrite": rewritten,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_generation_0_writes_only_what_is_not_there(box: storage.Bucket, write: Write) -> None:
    write(box, 0)
    assert get(box, "a") == b"new"
    old = put(box, "a", b"old").generation
    with pytest.raises(exceptions.PreconditionFailed):
        write(box, 0)
    assert (get(box, "a"), box.get_blob("a").generation) == (b"old", old)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_generation_writes_only_over_itself(box: storage.Bucket, write: Write) -> None:
    with pytest.raises(exceptions.PreconditionFailed):
        write(box, 1)
    assert not box.blob("a").exists()
    first = put(box, "a", b"old").generation
    second = put(box, "a", b"newer").generation
    with pytest.raises(exceptions.PreconditionFailed):
        write(box, first)
    assert (get(box, "a"), box.get_blob("a").generation) == (b"newer", second)
    write(box, second)
    assert get(box, "a") == b"new"
    assert first < second < box.get_blob("a").generation


def test_only_the_right_generation_is_deleted(box: storage.Bucket) -> None:
    now = put(box, "a", b"1").generation
    for wrong in (0, now - 1):
        with pytest.raises(exceptions.PreconditionFailed):
            box.blob("a").delete(if_generation_match=wrong, retry=None)
    assert get(box, "a") == b"1"
    box.blob("a").delete(if_generation_match=now, retry=None)
    assert names(box) == []


def test_a_resumable_upload_loses_to_who_wrote_meanwhile(box: storage.Bucket) -> None:
    session = box.blob("a").create_resumable_upload_session(if_generation_match=0)
    put(box, "a", b"first")
    assert requests.put(session, data=b"second", timeout=10).status_code == 412
    assert get(box, "a") == b"first"


@pytest.mark.parametrize("chunk", [None, QUANTUM])
def test_of_many_writers_one_wins(box: storage.Bucket, chunk: int | None) -> None:
    def attempt(number: int) -> int:
        try:
            put(box, "lease", b"%d" % number, chunk, if_generation_match=0)
        except exceptions.PreconditionFailed:
            return -1
        return number

    with ThreadPoolExecutor(8) as pool:
        winners = {number for number in pool.map(attempt, range(24)) if number >= 0}
    assert len(winners) == 1
    assert get(box, "lease") == b"%d" % winners.pop()


@pytest.mark.parametrize("chunk", [None, 4 * QUANTUM])
def test_a_cut_upload_leaves_the_old_object(bucket_service: BucketService, box: storage.Bucket, chunk: int | None) -> None:
    old = put(box, "a", b"old").generation
    bucket_service.faults(Fault("cut_upload", "PUT" if chunk else "POST", "name=a", bytes=700_000))
    with pytest.raises(NETWORK):
        put(box, "a", content(2_000_000), chunk)
    assert (get(box, "a"), box.get_blob("a").generation) == (b"old", old)
    assert [entry.received for entry in bucket_service.requests() if entry.fault] == [700_000]


def test_what_was_looked_at_is_read_or_nothing(box: storage.Bucket) -> None:
    put(box, "a", b"old")
    seen = box.get_blob("a")
    assert seen.download_as_bytes(retry=None) == b"old"
    put(box, "a", b"new")
    with pytest.raises(exceptions.NotFound):
        seen.download_as_bytes(retry=None)


# Resumable uploads.


def progress(session: str) -> tuple[int, str | None]:
    reply = requests.put(session, headers={"Content-Range": "bytes */*"}, timeout=10)
    return reply.status_code, reply.headers.get("Range")


def test_a_session_tells_how_far_it_came_and_goes_on(bucket_service: BucketService, box: storage.Bucket) -> None:
    data = content(5 * QUANTUM + 5)
    session = box.blob("a").create_resumable_upload_session(size=len(data))
    assert progress(session) == (308, None)
    bucket_service.faults(Fault("cut_upload", "PUT", bytes=2 * QUANTUM + 100))
    with pytest.raises(NETWORK):
        requests.put(session, data=data, timeout=10)
    assert progress(session) == (308, f"bytes=0-{2 * QUANTUM - 1}")
    assert not box.blob("a").exists()
    rest = {"Content-Range": f"bytes {2 * QUANTUM}-{len(data) - 1}/{len(data)}"}
    assert requests.put(session, data=data[2 * QUANTUM :], headers=rest, timeout=10).json()["size"] == str(len(data))
    assert get(box, "a") == data
    assert progress(session)[0] == 200


def test_a_client_that_dies_in_the_middle_leaves_whole_quanta(box: storage.Bucket) -> None:
    def dying() -> Any:
        yield content(QUANTUM + 1000)
        raise KeyboardInterrupt

    session = box.blob("a").create_resumable_upload_session()
    with pytest.raises(KeyboardInterrupt):
        requests.put(session, data=dying(), headers={"Content-Length": "9999999"}, timeout=10)
    wait_until(lambda: progress(session)[1] is not None, seconds=30)
    assert progress(session) == (308, f"bytes=0-{QUANTUM - 1}")


def test_a_cancelled_session_is_gone(box: storage.Bucket) -> None:
    session = box.blob("a").create_resumable_upload_session()
    assert requests.delete(session, timeout=10).status_code == 499
    assert progress(session)[0] == 404


@pytest.mark.parametrize("action", ["cut_upload", "lost_reply", "reset", "status"])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_the_client_goes_on_after_a_fault(bucket_service: BucketService, box: storage.Bucket, action: Any, part: int) -> None:
    data = content(5 * QUANTUM + 5)
    bucket_service.faults(Fault(action, "PUT", "upload_id", skip=part))
    put(box, "a", data, 2 * QUANTUM, retry=SOON)
    assert get(box, "a") == data
    assert [entry.fault for entry in objects(bucket_service, "PUT") if entry.fault] == [action]


# Faults.


@pytest.mark.parametrize("chunk", [None, QUANTUM])
def test_a_refusal_reads_as_from_the_service(bucket_service: BucketService, box: storage.Bucket, chunk: int | None) -> None:
    bucket_service.faults(refuse(forbidden(), path="name=models/"))
    with pytest.raises(exceptions.Forbidden, match=r"does not have storage\.objects\.create access") as caught:
        put(box, "models/a", b"1", chunk)
    assert caught.value.response.json() == {
        "error": {
            "code": 403,
            "message": "trainer@project.iam.gserviceaccount.com does not have storage.objects.create access to the Google Cloud "
            "Storage object. Permission 'storage.objects.create' denied on resource (or it may not exist).",
            "errors": [{"message": caught.value.response.json()["error"]["message"], "domain": "global", "reason": "forbidden"}],
        }
    }
    put(box, "elsewhere", b"1", chunk)


def test_retention_protects_an_object(bucket_service: BucketService, box: storage.Bucket) -> None:
    put(box, "o", b"1")
    bucket_service.faults(refuse(retained(box.name, "o"), "DELETE"))
    with pytest.raises(exceptions.Forbidden, match="retention policy or object retention") as caught:
        box.blob("o").delete()
    assert caught.value.errors[0]["reason"] == "retentionPolicyNotMet"


@pytest.mark.parametrize("chunk", [None, QUANTUM])
def test_a_missing_bucket_says_so(bucket_service: BucketService, chunk: int | None) -> None:
    box = storage.Client().bucket("nowhere")
    for attempt in (lambda: put(box, "a", b"1", chunk), lambda: get(box, "a"), lambda: names(box), box.blob("a").delete):
        with pytest.raises(exceptions.NotFound, match="The specified bucket does not exist"):
            attempt()


def test_a_rule_skips_counts_and_chooses(bucket_service: BucketService, box: storage.Bucket) -> None:
    put(box, "a", b"1")
    put(box, "b", b"1")
    bucket_service.clear()
    bucket_service.faults(Fault("status", "GET", "/o/a", times=2, skip=1, status=502))
    for name in "aabaa":
        box.client._http.get(f"{bucket_service.url}/storage/v1/b/{box.name}/o/{name}", timeout=10)
    assert [(entry.status, entry.fault) for entry in bucket_service.requests()] == [
        (200, ""),
        (502, "status"),
        (200, ""),
        (502, "status"),
        (200, ""),
    ]


@pytest.mark.parametrize("action", ["reset", "close", "away"])
def test_a_connection_ends_without_an_answer(bucket_service: BucketService, box: storage.Bucket, action: Any) -> None:
    put(box, "a", b"1")
    bucket_service.faults(Fault(action, "GET"), Fault(action, "POST"))
    with pytest.raises(NETWORK):
        get(box, "a")
    with pytest.raises(NETWORK):
        put(box, "b", content(2_000_000))
    assert get(box, "a") == b"1"
    assert not box.blob("b").exists()


@pytest.mark.clock
@pytest.mark.parametrize("position", [None, 400])
def test_a_stall_outlasts_the_client(bucket_service: BucketService, box: storage.Bucket, position: int | None) -> None:
    put(box, "a", content(1000))
    bucket_service.faults(Fault("stall", "GET", path=f"{box.name}/o/a", seconds=30, bytes=position))
    start = time.monotonic()
    with pytest.raises(requests.exceptions.RequestException, match="timed out"):
        get(box, "a", timeout=0.3)
    assert_within(0.3, time.monotonic() - start, 3)
    # Readers that another test has left may still ask for their own records: only this bucket's requests count.
    (stalled,) = [entry for entry in objects(bucket_service, "GET") if box.name in entry.path]
    assert stalled.sent == (position or 0)


@pytest.mark.clock
def test_a_stall_ends_after_its_time(bucket_service: BucketService, box: storage.Bucket) -> None:
    put(box, "a", b"1")
    bucket_service.faults(Fault("stall", "GET", path=f"{box.name}/o/a", seconds=0.3))
    start = time.monotonic()
    with pytest.raises(NETWORK):
        get(box, "a")
    assert_within(0.3, time.monotonic() - start, 3)


def test_a_truncated_reply_announces_more_than_comes(bucket_service: BucketService, box: storage.Bucket) -> None:
    put(box, "a", content(1_000_000))
    bucket_service.faults(Fault("truncate", "GET", bytes=300_000))
    with pytest.raises(NETWORK, match="300000 bytes read, 700000 more expected"):
        get(box, "a")
    assert objects(bucket_service, "GET")[-1].sent == 300_000


def test_a_corrupt_reply_has_one_wrong_byte(bucket_service: BucketService, box: storage.Bucket) -> None:
    data = content(600_000)
    put(box, "a", data)
    bucket_service.faults(Fault("corrupt", "GET", bytes=400_000, times=2))
    damaged = get(box, "a", checksum=None)
    assert [index for index in range(len(data)) if damaged[index] != data[index]] == [400_000]
    with pytest.raises(DataCorruption):
        get(box, "a")


def test_a_short_reply_looks_whole(bucket_service: BucketService, box: storage.Bucket) -> None:
    data = content(600_000)
    put(box, "a", data)
    bucket_service.faults(Fault("short", "GET", bytes=500_000))
    assert get(box, "a", start=0, end=599_999, checksum=None) == data[:500_000]


@pytest.mark.parametrize("chunk", [None, QUANTUM])
def test_a_corrupt_upload_is_refused(bucket_service: BucketService, box: storage.Bucket, chunk: int | None) -> None:
    bucket_service.faults(Fault("corrupt", "PUT" if chunk else "POST", "name=a", bytes=1000))
    with pytest.raises((exceptions.BadRequest, InvalidResponse), match="doesn't match calculated CRC32C"):
        put(box, "a", content(2 * QUANTUM), chunk, checksum="crc32c")
    assert not box.blob("a").exists()


def test_a_lost_reply_hides_what_was_done(bucket_service: BucketService, box: storage.Bucket) -> None:
    bucket_service.faults(Fault("lost_reply", "POST"), Fault("lost_reply", "DELETE"))
    with pytest.raises(NETWORK):
        put(box, "a", b"1", if_generation_match=0)
    assert get(box, "a") == b"1"
    with pytest.raises(NETWORK):
        box.blob("a").delete(retry=None)
    assert names(box) == []


def test_a_delay_is_only_late(bucket_service: BucketService, box: storage.Bucket) -> None:
    put(box, "a", b"1")
    bucket_service.faults(Fault("delay", "GET", seconds=0.3))
    start = time.monotonic()
    assert get(box, "a") == b"1"
    assert time.monotonic() - start >= 0.3


def test_away_is_away_until_it_is_back(bucket_service: BucketService, box: storage.Bucket) -> None:
    put(box, "a", b"1")
    bucket_service.clear()
    bucket_service.away(True)
    for _ in range(3):
        with pytest.raises(NETWORK):
            get(box, "a")
    bucket_service.away(False)
    assert get(box, "a") == b"1"
    assert [(entry.status, entry.fault) for entry in bucket_service.requests()] == [(0, "away")] * 3 + [(200, "")]


def test_away_ends_a_running_transfer(bucket_service: BucketService, box: storage.Bucket) -> None:
    put(box, "a", content(1_000_000))
    bucket_service.throttle(bytes_per_second=200_000)
    with ThreadPoolExecutor(1) as pool:
        transfer = pool.submit(get, box, "a")
        wait_until(lambda: any(0 < entry.sent < 1_000_000 for entry in objects(bucket_service, "GET")))
        bucket_service.away()
        with pytest.raises(NETWORK):
            transfer.result(30)


# Requests that are held.


@pytest.mark.parametrize("action", ["hold", "hold_reply"])
@pytest.mark.parametrize("size", [1000, 600_000])
def test_the_request_of_a_number_is_held_until_it_is_let_go(
    bucket_service: BucketService, box: storage.Bucket, action: Any, size: int
) -> None:
    bucket_service.faults(Fault(action, "POST", "name=a", skip=1))
    put(box, "a", b"first")
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(put, box, "a", content(size))
        wait_until(bucket_service.held)
        assert get(box, "a") == (b"first" if action == "hold" else content(size))
        assert not second.done()
        bucket_service.release()
        assert second.result(30).size == size
    assert (bucket_service.held(), get(box, "a")) == (0, content(size))
    put(box, "a", b"third")


def test_an_upload_is_held_in_the_middle(bucket_service: BucketService, box: storage.Bucket) -> None:
    bucket_service.faults(Fault("hold", "POST", "name=a", bytes=300_000))
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(put, box, "a", content(600_000))
        wait_until(bucket_service.held)
        assert not box.blob("a").exists()
        bucket_service.release()
        assert upload.result(30).size == 600_000
    assert get(box, "a") == content(600_000)


@pytest.mark.parametrize(("held_by", "left"), [({"action": "hold"}, []), ({"action": "hold_reply"}, ["a"])])
@pytest.mark.parametrize("position", [None, 100])
def test_of_a_held_request_whose_sender_has_died_nothing_more_is_done(
    bucket_service: BucketService, box: storage.Bucket, held_by: Any, left: list[str], position: int | None
) -> None:
    """The sender is a connection that is closed, as the kernel closes those of a killed process."""
    bucket_service.faults(Fault(**held_by, method="POST", bytes=position))
    body = f"POST /upload/storage/v1/b/{box.name}/o?uploadType=media&name=a HTTP/1.1\r\nContent-Length: 200\r\n\r\n" + "x" * 200
    with socket.create_connection(("127.0.0.1", bucket_service.port)) as connection:
        connection.sendall(body.encode())
        wait_until(bucket_service.held)
    bucket_service.release()
    wait_until(lambda: all(entry.seconds for entry in bucket_service.requests() if entry.method == "POST"))
    assert names(box) == left


def test_what_is_held_is_let_go_when_a_test_ends(bucket_service: BucketService, box: storage.Bucket) -> None:
    bucket_service.faults(Fault("hold", "GET"))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(names, box)
        wait_until(bucket_service.held)
        bucket_service.clear()
        assert reading.result(30) == []


# Faults by lot.


def lots(service: BucketService, box: storage.Bucket, seed: int) -> list[str]:
    """The faults that a fixed sequence of requests meets."""
    service.clear()
    service.random_faults(0.3, seed, stall_seconds=0.01)
    target = f"{service.url}/storage/v1/b/{box.name}/o"
    with requests.Session() as session:
        for number in range(40):
            for method, url in (("GET", f"{target}/a?alt=media"), ("GET", target), ("DELETE", f"{target}/{number}")):
                try:
                    session.request(method, url, timeout=5)
                except NETWORK:
                    continue
    return [f"{entry.method}{entry.fault}{entry.status}" for entry in service.requests()]


def test_a_seed_decides_which_requests_fail(bucket_service: BucketService, box: storage.Bucket) -> None:
    put(box, "a", content(1000))
    first = lots(bucket_service, box, 1)
    assert first == lots(bucket_service, box, 1) != lots(bucket_service, box, 2)
    failed = [entry for entry in first if entry not in ("GET200", "DELETE404")]
    assert 0.2 < len(failed) / len(first) < 0.4
    assert {"GETstatus503", "GETstatus429", "GETtruncate200", "GETstall0", "DELETElost_reply0", "DELETEreset0"} <= set(failed)
    assert not {"GETlost_reply0", "DELETEtruncate404"} & set(failed)
    assert get(box, "a", retry=SOON) == content(1000)


def request(method: str, path: str, **headers: str) -> Call:
    message = email.message.Message()
    for name, value in headers.items():
        message[name] = value
    return Call(method, path, message)


def drawn(chance: Chance, calls: list[Call]) -> dict[str, list[str]]:
    """The faults that each request meets, try by try."""
    met: dict[str, list[str]] = {}
    for call in calls:
        fault = chance.draw(call)
        met.setdefault(call.target, []).append(f"{fault.action}{fault.status}" if fault else "")
    return met


def test_a_fault_hangs_on_the_object_and_the_try_and_not_on_what_else_is_asked_for() -> None:
    calls = [request("GET", f"/storage/v1/b/x/o/{name}?alt=media") for name in "abcdefgh" for _ in range(20)]
    mixed = calls[:]
    random.Random(1).shuffle(mixed)
    first = drawn(Chance(0.3, 1), calls)
    assert first == drawn(Chance(0.3, 1), mixed)
    assert len({tuple(faults) for faults in first.values()}) == 8, "each object has its own"
    met = sum(bool(fault) for faults in first.values() for fault in faults)
    assert 0.2 < met / len(calls) < 0.4


def test_names_made_by_lot_and_other_buckets_meet_the_same_faults() -> None:
    one = [request("POST", f"/upload/storage/v1/b/one/o?uploadType=media&name=r/step-00000010-0123456789.{n}") for n in range(50)]
    other = [
        request("POST", f"/upload/storage/v1/b/two/o?uploadType=media&name=r/step-00000010-abcdef6789.{n}") for n in range(50)
    ]
    assert [*drawn(Chance(0.5, 1), one).values()] == [*drawn(Chance(0.5, 1), other).values()]
    parts = [request("GET", "/storage/v1/b/one/o/x?alt=media", Range=f"bytes={n}-{n + 9}") for n in range(50)]
    assert len({call.subject for call in parts}) == 50, "the parts of an object are read by several threads"


def test_an_unknown_kind_of_fault_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown"):
        Chance(0.1, 1, ["explode"])


def test_the_client_copes_with_a_bad_network(bucket_service: BucketService, box: storage.Bucket) -> None:
    bucket_service.random_faults(0.2, seed=3, stall_seconds=0.05)
    data = {f"{number:02}": content(1000 * number, number) for number in range(30)}
    for name, value in data.items():
        put(box, name, value, QUANTUM, retry=SOON)
    assert {name: get(box, name, retry=SOON) for name in data} == data
    faults = [entry.fault for entry in bucket_service.requests() if entry.fault]
    assert len(faults) >= 10


# Accounts and clock.


def test_a_guarded_service_answers_who_has_a_token(bucket_service: BucketService, box: storage.Bucket) -> None:
    listing, tokens = f"{bucket_service.url}/storage/v1/b/{box.name}/o", f"{bucket_service.url}/token"
    bucket_service.guard()
    assert requests.get(listing, timeout=10).status_code == 401
    header = {"Authorization": f"Bearer {requests.post(tokens, timeout=10).json()['access_token']}"}
    assert requests.get(listing, headers=header, timeout=10).status_code == 200
    bucket_service.guard()
    assert requests.get(listing, headers=header, timeout=10).status_code == 401
    bucket_service.clear()
    assert requests.get(listing, timeout=10).status_code == 200


def test_the_service_has_a_clock_of_its_own(bucket_service: BucketService, box: storage.Bucket) -> None:
    bucket_service.clock(3600)
    blob = put(box, "a", b"1")
    for updated in (blob.updated, box.get_blob("a").updated, next(iter(box.list_blobs())).updated):
        assert 3500 < (updated - datetime.datetime.now(datetime.UTC)).total_seconds() < 3700


# Throttle, log, life.


@pytest.mark.clock
def test_latency_waits_before_every_request(bucket_service: BucketService, box: storage.Bucket) -> None:
    put(box, "a", b"1")
    bucket_service.throttle(latency=0.1)
    start = time.monotonic()
    for _ in range(3):
        get(box, "a")
    assert_within(0.3, time.monotonic() - start, 1.5)


@pytest.mark.clock
def test_a_connection_keeps_to_its_rate(bucket_service: BucketService, box: storage.Bucket) -> None:
    data = content(1_000_000)
    bucket_service.throttle(bytes_per_second=2_000_000)
    start = time.monotonic()
    put(box, "a", data)
    sent = time.monotonic()
    assert get(box, "a") == data
    assert_within(0.5, sent - start, 1.5)
    assert_within(0.5, time.monotonic() - sent, 1.5)
    bucket_service.clear()
    start = time.monotonic()
    get(box, "a")
    assert_within(0, time.monotonic() - start, 0.4)


def test_the_log_tells_every_request_and_is_cleared(bucket_service: BucketService, box: storage.Bucket) -> None:
    put(box, "a", content(1000))
    get(box, "a", start=10, end=19)
    first, second = bucket_service.requests()
    assert (first.method, first.status, first.received > 1000) == ("POST", 200, True)
    assert first.path.startswith(f"/upload/storage/v1/b/{box.name}/o?uploadType=multipart")
    assert first.path.endswith("&name=a")
    assert (second.method, second.range, second.status, second.sent) == ("GET", "bytes=10-19", 206, 10)
    assert abs(second.time - time.time()) < 10
    assert bucket_service.count() == 2
    bucket_service.clear()
    assert (bucket_service.count(), bucket_service.requests()) == (0, [])


def test_the_program_runs_a_command_with_a_bucket() -> None:
    code = (
        "import sys; from google.cloud import storage; b = storage.Client().bucket('data');"
        "b.blob('a').upload_from_string(b'x' * 100_000); print(b.get_blob('a').size, sys.argv[1:]); sys.exit(7)"
    )
    options = ["--bucket", "data", "--latency", "0.01", "--megabytes_per_second", "50", "--"]
    command = [sys.executable, "-m", "tests.helpers.bucket.service", *options, sys.executable, "-c", code, "--flag", "value"]
    environment = {name: value for name, value in os.environ.items() if name != "STORAGE_EMULATOR_HOST"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, env=environment, check=False)
    assert (done.returncode, done.stdout) == (7, "100000 ['--flag', 'value']\n"), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux to end the children")
def test_nothing_outlives_a_process_that_is_killed() -> None:
    code = (
        "import time, psutil; from tests.helpers.bucket.service import BucketService; service = BucketService().__enter__();"
        "print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as owner:
        assert owner.stdout is not None
        children = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(children) == 2
        assert all(map(is_running, children))
        owner.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(map(is_running, children)), seconds=30)


def test_the_environment_exempts_loopback_from_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "example.org")
    environment = BucketService().environment
    assert environment["no_proxy"] == environment["NO_PROXY"] == "example.org,127.0.0.1,localhost"
