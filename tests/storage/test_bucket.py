"""Addresses in a bucket, used as paths are: what they read, write, list, and say when they are refused."""

import logging
from pathlib import Path

import google_crc32c
import pytest
from google.api_core.exceptions import PreconditionFailed

from tests.helpers.bucket.answers import QUANTUM, UNAVAILABLE, Action, forbidden, retained
from tests.helpers.bucket.faults import Fault, refuse
from tests.helpers.bucket.service import BucketService
from trainer.errors import BucketAwayError, BucketRefusedError, ExitCode, UserError
from trainer.storage.bucket import UPLOAD_CHUNK, BucketPath, parse
from trainer.storage.places import place, sizes_in
from trainer.storage.service import Patience, patiently

CONTENT = bytes(range(256)) * 4000


@pytest.fixture
def folder(bucket: str, monkeypatch: pytest.MonkeyPatch) -> BucketPath:
    monkeypatch.setattr(Patience, "seconds", 30.0)
    return parse(f"{bucket}/some/folder")


@pytest.mark.parametrize("text", ["gs://", "gs:///x", "gs://b/../x", "gs:/b/x", "gs:b", "s3://b/x", "file:/x", "http://host/x"])
def test_what_is_no_address_is_refused_before_it_becomes_a_local_folder(text: str) -> None:
    with pytest.raises(UserError, match=f"--output={text}: allowed: "):
        place(text, "--output")


def test_text_becomes_a_path_or_an_address() -> None:
    assert place("some/folder", "--output") == Path("some/folder")
    assert place("gs://bucket/a//b/", "--output") == BucketPath("bucket", "a/b")
    assert str(place("gs://bucket", "--output")) == "gs://bucket"
    assert str(BucketPath("bucket") / "a" / "b.png") == "gs://bucket/a/b.png"
    assert (BucketPath("bucket", "a/b.png").parent, BucketPath("bucket", "a").parent) == (
        BucketPath("bucket", "a"),
        BucketPath("bucket"),
    )


def test_what_is_written_is_read_again_in_whole_and_in_part(folder: BucketPath) -> None:
    state = (folder / "x").write_bytes(CONTENT)
    assert state.size == len(CONTENT)
    assert state.crc32c == google_crc32c.Checksum(CONTENT).digest().hex()
    assert (folder / "x").read_bytes() == CONTENT
    assert (folder / "x").read_range(1000, 1256) == CONTENT[1000:1256]
    assert (folder / "x").read_range(len(CONTENT) - 3, len(CONTENT) + 50) == CONTENT[-3:]
    assert (folder / "x").read_range(len(CONTENT) + 3, len(CONTENT) + 50) == b""
    assert (folder / "x").read_versioned() == (CONTENT, state.generation)


def test_a_folder_is_what_its_objects_begin_with(folder: BucketPath) -> None:
    for name in ("a.png", "b.jpg", "deeper/c.png"):
        (folder / name).write_bytes(b"1234")
    assert folder.is_dir()
    assert not folder.is_file()
    assert not (folder / "a").exists()
    assert [path.name for path in folder.iterdir()] == ["a.png", "b.jpg", "deeper"]
    assert [path.name for path in folder.glob("*.png")] == ["a.png"]
    assert list(folder.listing()) == ["a.png", "b.jpg", "deeper/c.png"]
    assert sizes_in(folder) == {"a.png": 4, "b.jpg": 4}


def test_a_list_of_many_pages_is_read_to_its_end(folder: BucketPath, bucket_service: BucketService) -> None:
    """And it asks for no more of each object than is needed: a page of a thousand is 100 KB and not 900."""
    sent = {f"{number}.png": (folder / f"{number}.png").write_bytes(b"1" * number) for number in range(8)}
    bucket_service.clear()
    bucket_service.limit_pages(3)
    assert folder.listing() == sent
    assert bucket_service.count() == 3
    assert all("fields=items(name,size,crc32c,generation,updated)" in request.path for request in bucket_service.requests())


def test_what_is_not_there_is_a_missing_file(folder: BucketPath) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        (folder / "none").read_bytes()
    assert caught.value.filename == str(folder / "none")
    assert (folder / "none").state() is None
    assert (folder / "none").read_versioned() == (b"", 0)
    (folder / "none").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (folder / "none").unlink()


def test_a_write_under_a_condition_that_does_not_hold_changes_nothing(folder: BucketPath) -> None:
    first = (folder / "x").write_bytes(b"first", 0)
    with pytest.raises(PreconditionFailed):
        (folder / "x").write_bytes(b"second", 0)
    second = (folder / "x").write_bytes(b"second", first.generation)
    with pytest.raises(PreconditionFailed):
        (folder / "x").write_bytes(b"third", first.generation)
    with pytest.raises(PreconditionFailed):
        (folder / "x").unlink_if(first.generation)
    assert (folder / "x").read_bytes() == b"second"
    (folder / "x").unlink_if(second.generation)
    assert not (folder / "x").is_file()


def test_a_conditional_write_whose_answer_was_lost_is_not_taken_for_anothers(
    folder: BucketPath, bucket_service: BucketService
) -> None:
    """The service has written; the second try is refused, because the object is of a new generation: our own."""
    bucket_service.faults(Fault("lost_reply", "POST", "name="))
    state = (folder / "x").write_bytes(b"mine", 0)
    assert [request.status for request in bucket_service.requests() if request.method == "POST"] == [0, 412]
    assert (folder / "x").state() == state


def test_equal_bytes_of_another_writer_are_not_taken_for_our_own(folder: BucketPath) -> None:
    """Two tries of a run write the same numbers; the one that was refused must know it."""
    before = (folder / "x").write_bytes(b"before")
    (folder / "x").write_bytes(b"after", before.generation)
    with pytest.raises(PreconditionFailed):
        (folder / "x").write_bytes(b"after", before.generation)


def resumed(file: Path, parts: int, fault: Fault, folder: BucketPath, service: BucketService) -> None:
    """Upload a file of this many parts; one of them is sent twice, and none from the beginning."""
    service.faults(fault)
    state = (folder / "large").upload(file, generation=0)
    puts = [request for request in service.requests() if request.method == "PUT"]
    assert len(puts) == parts + 1
    assert (state.size, state.crc32c) == (file.stat().st_size, google_crc32c.Checksum(file.read_bytes()).digest().hex())


@pytest.mark.parametrize("action", ["status", "reset", "cut_upload", "lost_reply"])
def test_an_upload_in_parts_goes_on_where_it_was_cut(
    action: Action, folder: BucketPath, tmp_path: Path, bucket_service: BucketService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.storage.bucket.UPLOAD_CHUNK", QUANTUM)
    monkeypatch.setattr("google.cloud.storage.blob._MAX_MULTIPART_SIZE", QUANTUM)
    (tmp_path / "large").write_bytes(CONTENT[: 2 * QUANTUM + 1000])
    resumed(tmp_path / "large", 3, Fault(action, "PUT", "upload_id", skip=1), folder, bucket_service)


@pytest.mark.slow
def test_a_large_upload_goes_on_where_it_was_cut(folder: BucketPath, tmp_path: Path, bucket_service: BucketService) -> None:
    """In the middle of a part of the real size."""
    (tmp_path / "large").write_bytes(CONTENT * (2 * UPLOAD_CHUNK // len(CONTENT) + 20))
    resumed(tmp_path / "large", 3, Fault("cut_upload", "PUT", "upload_id", skip=1), folder, bucket_service)


def test_a_service_that_stays_away_is_given_up_after_the_stated_time(
    folder: BucketPath, bucket_service: BucketService, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.storage.service.SAY_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(Patience, "seconds", 1.0)
    bucket_service.faults(refuse(UNAVAILABLE))
    logging.getLogger("trainer").propagate = True
    with pytest.raises(BucketAwayError, match=r"/x: the service answers 503 \(.*\) \(tried for 1 s; run this again") as caught:
        (folder / "x").read_bytes()
    assert caught.value.exit_code == ExitCode.AGAIN == 75
    assert "trying again for up to 1 s" in caplog.text


def test_one_that_comes_back_is_said_to(
    folder: BucketPath, bucket_service: BucketService, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.storage.service.SAY_AFTER_SECONDS", 0.0)
    (folder / "x").write_bytes(b"here")
    logging.getLogger("trainer").propagate = True
    caplog.set_level(logging.INFO)
    bucket_service.faults(refuse(UNAVAILABLE, times=3))
    assert (folder / "x").read_bytes() == b"here"
    assert "answers again, after" in caplog.text


def test_a_missing_permission_is_named_with_bucket_and_account(folder: BucketPath, bucket_service: BucketService) -> None:
    bucket_service.faults(refuse(forbidden("storage.objects.get", "somebody@project.iam.gserviceaccount.com")))
    with pytest.raises(BucketRefusedError) as caught:
        (folder / "x").read_bytes()
    line = str(caught.value)
    assert line.startswith(f"{folder / 'x'}: somebody@project.iam.gserviceaccount.com does not have storage.objects.get access")
    assert line.endswith("grant it storage.objects.get, which roles/storage.objectViewer has")
    assert "\n" not in line
    assert caught.value.exit_code == ExitCode.USER


def test_a_missing_bucket_is_named(folder: BucketPath) -> None:
    for act in (BucketPath("no-such-bucket", "x").read_bytes, BucketPath("no-such-bucket", "x").listing):
        with pytest.raises(BucketRefusedError, match="gs://no-such-bucket: there is no bucket of this name"):
            act()


def test_a_retention_policy_is_explained(folder: BucketPath, bucket_service: BucketService) -> None:
    """The emulator knows no retention: the answer is ordered, in the service's own words."""
    (folder / "x").write_bytes(b"1")
    bucket_service.faults(refuse(retained(folder.bucket, "x"), "DELETE"))
    with pytest.raises(BucketRefusedError, match="needs a bucket without a retention policy"):
        (folder / "x").unlink()


def test_a_mistake_of_ours_is_not_tried_again() -> None:
    tries = []

    def wrong() -> None:
        tries.append(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        patiently(wrong, "gs://b/x")
    assert len(tries) == 1
