"""What training does not wait for: files that could not be sent are counted, said, and sent later."""

import io
import logging
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.bucket.answers import UNAVAILABLE, forbidden
from tests.helpers.bucket.faults import Fault, refuse
from tests.helpers.bucket.service import BucketService
from tests.helpers.disks import small_disk
from trainer.runtime import files
from trainer.runtime.bucket_folder import BucketFolder
from trainer.runtime.outbox import Outbox
from trainer.runtime.run_folder import Columns
from trainer.storage.bucket import BucketPath, parse
from trainer.storage.service import Patience


@pytest.fixture
def folder(bucket: str, monkeypatch: pytest.MonkeyPatch) -> BucketPath:
    monkeypatch.setattr(Patience, "seconds", 0.5)
    return parse(f"{bucket}/run")


def columns(level: int) -> Columns:
    return [("input", np.full((1, 8, 8, 3), level, np.uint8))]


def drawn(place: BucketPath) -> tuple[int, ...]:
    """The colour of the picture on a sheet."""
    image = Image.open(io.BytesIO(place.read_bytes())).convert("RGB")
    return tuple(image.getpixel((4, image.height - 4)))  # type: ignore[arg-type]


def waiting(box: Outbox) -> list[str]:
    return [to.name for to in box._waiting]


@pytest.mark.parametrize("fault", [refuse(UNAVAILABLE, "POST"), refuse(forbidden("storage.objects.create"), "POST")])
def test_what_is_refused_today_is_sent_tomorrow(
    fault: Fault, folder: BucketPath, bucket_service: BucketService, caplog: pytest.LogCaptureFixture
) -> None:
    box = Outbox()
    bucket_service.faults(fault)
    for name in ("a", "b"):
        with box.adding(folder / name) as file:
            file.write_text(name)
        assert not box.send(0.5)
    assert waiting(box) == ["a", "b"]
    assert box.failures >= 2
    assert len(caplog.records) == 2, "one line for each round"
    assert "training goes on; waiting to be sent: 2 files, tried again later" in caplog.text
    bucket_service.faults()
    assert box.send()
    assert {name: (folder / name).read_text() for name in folder.listing()} == {"a": "a", "b": "b"}
    assert waiting(box) == []


def test_a_later_file_for_the_same_address_takes_the_place_of_the_earlier_one(
    folder: BucketPath, bucket_service: BucketService, tmp_path: Path
) -> None:
    box = Outbox()
    bucket_service.away()
    for text in ("old", "new"):
        (tmp_path / text).write_text(text)
        box.add(folder / "a", tmp_path / text)
        assert not box.send(0.5)
    bucket_service.away(False)
    assert box.send()
    assert (folder / "a").read_text() == "new"
    assert (tmp_path / "new").is_file(), "its owner keeps it"


def test_what_is_refused_holds_up_nothing_else(folder: BucketPath, bucket_service: BucketService) -> None:
    """An object on hold, say."""
    box = Outbox()
    bucket_service.faults(refuse(forbidden("storage.objects.delete"), "POST", "name=run/a"))
    for name in ("a", "b"):
        with box.adding(folder / name) as file:
            file.write_text(name)
    assert not box.send()
    assert list(folder.listing()) == ["b"]
    assert waiting(box) == ["a"]


def test_a_file_that_its_owner_has_lost_is_said_and_ends_nothing(
    folder: BucketPath, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    box = Outbox()
    box.add(folder / "a", tmp_path / "gone")
    assert not box.send()
    assert "No such file" in caplog.text
    assert box.failures == 1


def test_what_cannot_be_sent_at_the_end_is_named(
    folder: BucketPath, bucket_service: BucketService, caplog: pytest.LogCaptureFixture
) -> None:
    box = Outbox()
    with box.adding(folder / "a") as file:
        file.write_text("a")
    bucket_service.away()
    box.close(0.5)
    (line,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert line.getMessage() == f"not sent, and lost with this machine's temporary files: {folder}/a"


def test_the_last_sample_pictures_are_sent_when_the_run_ends(folder: BucketPath, bucket_service: BucketService) -> None:
    run = BucketFolder(folder)
    run.save_sample(1, lambda: columns(10))
    bucket_service.faults(refuse(UNAVAILABLE, "POST", "samples"))
    run.save_sample(2, lambda: columns(200))
    assert sorted((folder / "samples").listing()) == ["step-0000001.png"]
    bucket_service.faults()
    run.close()
    assert drawn(folder / "samples" / "step-0000002.png") == (200, 200, 200)
    assert drawn(folder / "samples" / "step-0000001.png") == (10, 10, 10)
    files.remove_scratch()


def test_pictures_that_cannot_be_drawn_here_are_left_out_and_training_goes_on(
    folder: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk for temporary files is full."""
    run = BucketFolder(folder)
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
        disk.fill()
        run.save_sample(1, lambda: columns(10))
        assert "step 1: its pictures are left out: [Errno 28] No space left on device" in caplog.text
        disk.free()
        run.save_sample(2, lambda: columns(10))
        files.remove_scratch()
        assert list(disk.path.iterdir()) == []
    assert sorted((folder / "samples").listing()) == ["step-0000002.png"]
