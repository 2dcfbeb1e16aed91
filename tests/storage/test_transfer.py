"""Many files at once: in order, bounded, no more than is needed, and in an order that no reader can be hurt by."""

import threading
import time
from pathlib import Path

import pytest

from tests.helpers.bucket.answers import forbidden
from tests.helpers.bucket.faults import Fault, refuse
from tests.helpers.bucket.service import BucketService
from tests.helpers.waiting import wait_until
from trainer.errors import BucketRefusedError
from trainer.storage.bucket import BucketPath, parse
from trainer.storage.transfer import ahead, remove_all, replace_folder


def written(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_pb", ".pb")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def contents(folder: BucketPath) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in folder.listing()}


def test_results_come_in_order_and_no_more_than_one_a_thread_waits() -> None:
    begun, lock = [0], threading.Lock()

    def slowly(number: int) -> int:
        with lock:
            begun[0] += 1
        time.sleep(0.02 if number % 3 else 0.06)
        return number * number

    results = ahead(slowly, iter(range(40)), threads=4)
    for number, result in enumerate(results):
        assert result == number * number
        assert begun[0] <= number + 5
    assert begun[0] == 40


def test_after_a_failure_nothing_new_begins_and_nobody_waits() -> None:
    """The others are still held when the caller has the error."""
    begun, ended, hold = [], [], threading.Event()

    def fails(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise ValueError("the first")
        hold.wait(200)
        ended.append(number)

    with pytest.raises(ValueError, match="the first"):
        list(ahead(fails, range(100), threads=3))
    assert ended == []
    hold.set()
    wait_until(lambda: not any(thread.name.startswith("transfer") for thread in threading.enumerate()))
    assert len(begun) <= 4


def test_a_folder_becomes_what_is_given_and_only_what_differs_is_sent(
    bucket_service: BucketService, bucket: str, tmp_path: Path
) -> None:
    to = parse(f"{bucket}/deep/model")
    first = written(tmp_path / "1", saved_model_pb=b"one", variables__index=b"i", variables__data=b"d" * 1000)
    replace_folder(first, to, "saved_model.pb")
    assert contents(to) == {"saved_model.pb": b"one", "variables/index": b"i", "variables/data": b"d" * 1000}
    bucket_service.clear()
    replace_folder(first, to, "saved_model.pb")
    assert [request.method for request in bucket_service.requests()] == ["GET"]
    bucket_service.clear()
    second = written(tmp_path / "2", saved_model_pb=b"two", variables__index=b"i", variables__other=b"o")
    replace_folder(second, to, "saved_model.pb")
    assert contents(to) == {"saved_model.pb": b"two", "variables/index": b"i", "variables/other": b"o"}
    changes = [(request.method, request.path) for request in bucket_service.requests() if request.method != "GET"]
    assert [method for method, _ in changes] == ["DELETE", "POST", "DELETE", "POST"]
    assert "saved_model.pb" in changes[0][1]
    assert "saved_model.pb" in changes[-1][1]


def test_a_cut_replacement_leaves_nothing_that_can_be_loaded(bucket_service: BucketService, bucket: str, tmp_path: Path) -> None:
    to = parse(f"{bucket}/model")
    replace_folder(written(tmp_path / "1", saved_model_pb=b"one", variables__data=b"old"), to, "saved_model.pb")
    bucket_service.faults(refuse(forbidden(), path="name=model/variables"))
    second = written(tmp_path / "2", saved_model_pb=b"two", variables__data=b"new")
    with pytest.raises(BucketRefusedError, match=r"storage\.objects\.create"):
        replace_folder(second, to, "saved_model.pb")
    assert contents(to) == {"variables/data": b"old"}
    bucket_service.clear()
    replace_folder(second, to, "saved_model.pb")
    assert contents(to) == {"saved_model.pb": b"two", "variables/data": b"new"}


def test_removing_what_is_gone_already_is_no_failure(bucket_service: BucketService, bucket: str) -> None:
    to = parse(f"{bucket}/x")
    (to / "a").write_bytes(b"a")
    bucket_service.faults(Fault("lost_reply", "DELETE"))
    remove_all(to, ["a", "b"])
    assert contents(to) == {}
