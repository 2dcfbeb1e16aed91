"""Event files in a bucket: sent seldom, rotated, cut after the restored step; what cannot be sent waits."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.bucket.answers import forbidden
from tests.helpers.bucket.faults import refuse
from tests.helpers.bucket.service import BucketService
from tests.helpers.events import scalars_of
from trainer.errors import BucketAwayError
from trainer.runtime import summaries
from trainer.runtime.lease import LostClaimError
from trainer.runtime.summaries import BucketSummaries, NullSummaries, Summaries, open_summaries
from trainer.storage.bucket import BucketPath, parse
from trainer.storage.service import Patience


@pytest.fixture
def folder(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketPath]:
    monkeypatch.setattr(Patience, "seconds", 5.0)
    yield parse(f"{bucket}/run/summaries")


def held() -> None:
    """The lease is ours."""


def steps(folder: BucketPath, scratch: Path) -> list[int]:
    """The steps of all scalars in the bucket, sorted."""
    found = []
    for name in folder.listing():
        (folder / name).download(scratch / "copy")
        found += [scalar.step for scalar in scalars_of(scratch / "copy")]
    return sorted(found)


def uploads(service: BucketService) -> int:
    return sum(request.method == "POST" and "tfevents" in request.path for request in service.requests())


def test_scalars_are_sent_at_a_flush_and_not_before(folder: BucketPath, tmp_path: Path, bucket_service: BucketService) -> None:
    log = BucketSummaries(folder, held)
    for step in range(50):
        log.scalars("train", {"loss/l1": 1.0}, step)
    assert uploads(bucket_service) == 0
    log.flush()
    log.flush()
    assert uploads(bucket_service) == 1, "what has not changed is not sent again"
    assert steps(folder, tmp_path) == list(range(50))


def test_after_a_minute_they_are_sent_without_being_asked(folder: BucketPath, monkeypatch: pytest.MonkeyPatch) -> None:
    log = BucketSummaries(folder, held)
    log.scalars("val", {"l1": 1.0}, 1)
    assert folder.listing() == {}
    monkeypatch.setattr(summaries, "SEND_SECONDS", 0.0)
    log.scalars("val", {"l1": 1.0}, 2)
    assert [name.split("/")[0] for name in folder.listing()] == ["val"]


def test_a_file_that_has_grown_is_followed_by_a_new_one(
    folder: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket_service: BucketService
) -> None:
    monkeypatch.setattr(summaries, "ROTATE_BYTES", 2000)
    log = BucketSummaries(folder, held)
    for step in range(100):
        log.scalars("train", {"loss/l1": 1.0}, step)
        if step % 20 == 19:
            log.flush()
    log.close()
    assert len(folder.listing()) >= 3
    assert max(state.size for state in folder.listing().values()) < 5000
    assert steps(folder, tmp_path) == list(range(100))


def test_a_refused_upload_is_counted_said_and_tried_again(
    folder: BucketPath, tmp_path: Path, bucket_service: BucketService, caplog: pytest.LogCaptureFixture
) -> None:
    log = BucketSummaries(folder, held)
    log.scalars("train", {"loss/l1": 1.0}, 1)
    bucket_service.faults(refuse(forbidden(), "POST", "tfevents"))
    log.flush()
    log.scalars("train", {"loss/l1": 1.0}, 2)
    log.flush()
    assert log._outbox.failures == 2
    assert folder.listing() == {}
    bucket_service.faults()
    log.flush()
    assert steps(folder, tmp_path) == [1, 2]


def test_events_after_a_step_are_taken_back_and_the_others_stay(folder: BucketPath, tmp_path: Path) -> None:
    for first in (0, 10):
        log = BucketSummaries(folder, held)
        for step in range(first, first + 10):
            log.scalars("train", {"loss/l1": 1.0}, step)
        log.close()
    before = folder.listing()
    BucketSummaries(folder, held).cut_after(14)
    assert steps(folder, tmp_path) == list(range(15))
    after = folder.listing()
    assert sum(before[name].generation == after[name].generation for name in before) == 1, "the first file is left alone"


@pytest.mark.parametrize("error", [LostClaimError("taken over"), BucketAwayError("away")])
def test_without_a_lease_that_holds_nothing_is_sent(folder: BucketPath, error: Exception, bucket_service: BucketService) -> None:
    def lost() -> None:
        raise error

    log = BucketSummaries(folder, lost)
    log.scalars("train", {"loss/l1": 1.0}, 1)
    if isinstance(error, LostClaimError):
        with pytest.raises(LostClaimError):
            log.flush()
    else:
        log.flush()
    log.close()
    assert uploads(bucket_service) == 0


def test_the_kind_follows_the_place_and_the_worker(folder: BucketPath, tmp_path: Path) -> None:
    assert type(open_summaries(folder, held, writes=True)) is BucketSummaries
    assert type(open_summaries(tmp_path, held, writes=True)) is Summaries
    assert type(open_summaries(folder, held, writes=False)) is NullSummaries
