"""Prepared data read from a bucket: the same batches as from a folder, few requests, and one line for what is wrong."""

import contextlib
import gc
import re
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Shared
from tests.helpers.bucket.answers import forbidden
from tests.helpers.bucket.faults import Fault, Request, refuse
from tests.helpers.bucket.runs import copy_up
from tests.helpers.bucket.service import BucketService
from tests.helpers.clock import assert_within
from tests.helpers.damage import flip_in_record
from tests.helpers.processes import run_trainer, start_trainer
from tests.helpers.sets import write_set
from tests.helpers.settings import SMALL, small_config
from tests.helpers.waiting import wait_until
from trainer.check import check
from trainer.config import Config
from trainer.data import keep, order, reading, records
from trainer.data.pipeline import PairData, elements
from trainer.data.reading import Needs, ReadAhead, Runs
from trainer.data.shards import Shards
from trainer.data.split import Split
from trainer.data.verify import verify
from trainer.errors import BucketAwayError, BucketRefusedError, DataError
from trainer.storage.bucket import BucketPath, parse
from trainer.storage.service import Patience

BIG = 600
SAYING = "tfrecord, record "


@pytest.fixture(scope="session")
def little(shared: Shared) -> Path:
    """Forty pairs in two shards to train on, and some others."""
    return shared("little", lambda folder: write_set(folder, {"train": [20, 20], "val": [8], "test": [15]}))


@pytest.fixture(scope="session")
def big(shared: Shared) -> Path:
    """Six hundred pairs in three shards of unlike sizes."""
    return shared("big", lambda folder: write_set(folder, {"train": [170, 230, 200]}))


def config(*settings: str) -> Config:
    return small_config("data.image_size=[32,32]", "data.jitter=2", *settings)


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """600 records are shuffled as a large set is: by chunks of 12 neighbours, in windows of 96 records."""
    order.epoch_order.cache_clear()
    for name, value in (("WHOLE_SHUFFLE_LIMIT", 50), ("MAX_CHUNK", 12), ("WINDOW", 96)):
        monkeypatch.setattr(order, name, value)
    yield
    order.epoch_order.cache_clear()


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patience, "seconds", 20.0)


@pytest.fixture
def little_there(little: Path, bucket: str) -> BucketPath:
    return copy_up(little, f"{bucket}/data")


@pytest.fixture
def big_there(big: Path, bucket: str) -> BucketPath:
    return copy_up(big, f"{bucket}/data")


def batches(data: PairData, first: int, last: int, places: range | None = None) -> list[bytes]:
    found = elements(data.training_batches(first, last, places=places))
    return [b"".join(batch[name].numpy().tobytes() for name in ("input", "target", "index")) for batch in found]


def reads(service: BucketService) -> list[Request]:
    """The requests for bytes of shards, since the log was cleared."""
    found = [entry for entry in service.requests() if ".tfrecord" in entry.path and "alt=media" in entry.path]
    return [entry for entry in found if entry.status != 404]  # of an earlier test, whose bucket is gone


def ranges(service: BucketService) -> list[tuple[str, int, int]]:
    """(shard, first byte, end) of each of them."""
    found = []
    for entry in reads(service):
        shard, limits = re.search(r"([^/]*tfrecord)", entry.path), re.fullmatch(r"bytes=(\d+)-(\d+)", entry.range or "")
        assert shard
        assert limits, entry
        found.append((shard[1], int(limits[1]), int(limits[2]) + 1))
    return found


def assert_each_byte_once(found: list[tuple[str, int, int]], total: int) -> None:
    for (shard, _, end), (following, start, _) in pairwise(sorted(found)):
        assert shard != following or end <= start
    assert sum(end - start for _, start, end in found) == total


def total_bytes(folder: Path, split: str = "train") -> int:
    return sum(shard.bytes for shard in records.read_manifest(folder).splits[split])


# The same batches.


@pytest.mark.parametrize(
    ("cache", "size"), [pytest.param("none", 1, marks=pytest.mark.slow), ("none", 8), ("memory", 3), ("disk", 8)]
)
def test_batches_are_those_of_the_folder(
    cache: str, size: int, little: Path, little_there: BucketPath, bucket_service: BucketService
) -> None:
    """Over two epochs and a half, from step 0 and from a step in the middle."""
    steps = 40 // size * 5 // 2
    settings = f"train.batch_size={size}", f"data.cache={cache}"
    expected = batches(PairData(little, config(*settings)), 0, steps)
    assert batches(PairData(little_there, config(*settings)), 0, steps) == expected
    assert batches(PairData(little_there, config(*settings)), 7, steps) == expected[7:]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "workers"), [(4, 1), (4, 2), (4, 4), (32, 2), (32, 4)])
@pytest.mark.usefixtures("in_chunks")
def test_workers_read_their_own_records_each_byte_once_and_in_runs(
    size: int, workers: int, big: Path, big_there: BucketPath, bucket_service: BucketService
) -> None:
    settings, steps = config(f"train.batch_size={size}", "data.cache=none"), BIG // size
    found: list[tuple[str, int, int]] = []
    for worker in range(workers):
        places = range(worker * size // workers, (worker + 1) * size // workers)
        data = PairData(big_there, settings)
        bucket_service.clear()
        assert batches(data, 0, steps, places) == batches(PairData(big, settings), 0, steps, places)
        found += ranges(bucket_service)
    assert_each_byte_once(found, sum(sizes(big)[number] for number in order.epoch_order(BIG, 0, 0, size).ravel()))
    assert len(found) < BIG / 4


def sizes(folder: Path) -> list[int]:
    """Bytes of each training record in its shard."""
    shards = records.read_manifest(folder).splits["train"]
    return [end - start for shard in shards for start, end in pairwise([*shard.offsets, shard.bytes])]


@pytest.mark.usefixtures("in_chunks")
def test_going_on_in_the_middle_reads_only_what_is_still_needed(
    big: Path, big_there: BucketPath, bucket_service: BucketService
) -> None:
    settings = config("train.batch_size=4", "data.cache=none")
    data = PairData(big_there, settings)
    bucket_service.clear()
    assert batches(data, 130, 150) == batches(PairData(big, settings), 130, 150)
    needed = order.epoch_order(BIG, 0, 0, 4)[130:].ravel()
    assert_each_byte_once(ranges(bucket_service), sum(sizes(big)[number] for number in needed))


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_what_is_kept_is_fetched_once_for_all_epochs(
    cache: str, little: Path, little_there: BucketPath, bucket_service: BucketService
) -> None:
    data = PairData(little_there, config("train.batch_size=4", f"data.cache={cache}"))
    bucket_service.clear()
    batches(data, 0, 40)
    batches(data, 15, 40)
    assert data.train.find_damage(range(40)) is None
    assert_each_byte_once(ranges(bucket_service), total_bytes(little))
    assert len(reads(bucket_service)) == 2
    assert data.bytes_read >= total_bytes(little)


def test_an_evaluation_reads_each_shard_in_long_runs(
    little: Path, little_there: BucketPath, bucket_service: BucketService
) -> None:
    """The last number is repeated, as a worker does that has fewer pictures than another."""
    here, there = (PairData(folder, config("data.cache=none")) for folder in (little, little_there))
    bucket_service.clear()
    numbers = [*range(15), 14, 14]
    pictures = [
        np.concatenate([batch["input"] for batch in data.batches_of(data.split("test"), numbers, 4)]) for data in (here, there)
    ]
    np.testing.assert_array_equal(*pictures)
    assert there.split("test").keys() == [here.split("test").key(number) for number in range(15)]
    assert len(reads(bucket_service)) == 2


def test_the_sizes_of_all_shards_are_one_request(little_there: BucketPath, bucket_service: BucketService) -> None:
    bucket_service.clear()
    PairData(little_there, config())
    assert [entry.method for entry in bucket_service.requests()] == ["GET", "GET"]


@pytest.mark.slow
@pytest.mark.parametrize("room", [1, 5])
@pytest.mark.usefixtures("in_chunks")
def test_a_small_room_costs_time_and_no_more(room: int, big: Path, big_there: BucketPath, bucket_service: BucketService) -> None:
    """1 MB holds 23 of these records; a batch alone is more than that."""
    settings = ["train.batch_size=32", "data.cache=none", f"data.read_ahead_mb={room}", "data.readers=3"]
    expected = batches(PairData(big, config(*settings)), 0, 18)
    data = PairData(big_there, config(*settings))
    bucket_service.clear()
    assert batches(data, 0, 18) == expected
    assert_each_byte_once(ranges(bucket_service), sum(sizes(big)[number] for number in order.epoch_order(BIG, 0, 0, 32).ravel()))


# What the line and the service do.


FAULTS = (("status", 503), ("truncate", 0), ("reset", 0), ("status", 429), ("stall", 0), ("corrupt", 0))


@pytest.mark.parametrize(
    "cache", ["none", pytest.param("memory", marks=pytest.mark.slow), pytest.param("disk", marks=pytest.mark.slow)]
)
@pytest.mark.usefixtures("in_chunks")
def test_each_kind_of_fault_changes_no_batch(cache: str, big: Path, big_there: BucketPath, bucket_service: BucketService) -> None:
    """The first requests for each shard meet two of them, so that all are met however few requests there are.

    Where nothing is kept there are many: then every third request for a shard meets the next kind.
    """
    settings = ["train.batch_size=8", f"data.cache={cache}", "data.readers=4"]
    expected = batches(PairData(big, config(*settings)), 0, 75)
    data = PairData(big_there, config(*settings))
    ordered = [
        Fault(action, path=f"{index:05d}-of-00003.*alt=media", status=status or 503, seconds=0.3, skip=2 * place if many else 0)
        for many in [cache == "none"]
        for index in range(3)
        for place, (action, status) in enumerate(FAULTS if many else FAULTS[2 * index : 2 * index + 2])
    ]
    bucket_service.faults(*ordered)
    assert batches(data, 0, 75) == expected
    assert sorted(entry.fault for entry in reads(bucket_service) if entry.fault) == sorted(fault.action for fault in ordered)


def test_a_byte_that_flips_on_the_way_is_fetched_again(
    little: Path, little_there: BucketPath, bucket_service: BucketService, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config("train.batch_size=4", "data.cache=memory")
    data = PairData(little_there, settings)
    bucket_service.faults(Fault("corrupt", path="00001-of-00002"))
    with caplog.at_level("INFO"):
        assert batches(data, 0, 10) == batches(PairData(little, settings), 0, 10)
    assert [line for line in caplog.messages if "sound when it was fetched again" in line and SAYING in line]
    assert len(reads(bucket_service)) == 3


def failure(data: PairData, split: str = "train") -> str:
    """The line with which training or an evaluation ends."""
    of = data.split(split)
    found = data.training_batches(0, 10) if split == "train" else data.batches_of(of, range(of.examples), 2)
    with pytest.raises((DataError, BucketAwayError, BucketRefusedError)) as caught, data.naming_damage(of, lambda: []):
        for _ in elements(found):
            pass
    return f"{type(caught.value).__name__}: {caught.value}"


SLOWER = [pytest.param(cache, split, marks=pytest.mark.slow) for cache, split in (("disk", "train"), ("none", "test"))]


@pytest.mark.parametrize(("cache", "split"), [("none", "train"), ("memory", "test"), *SLOWER])
def test_a_damaged_object_is_named_by_shard_and_record(cache: str, split: str, little: Path, little_there: BucketPath) -> None:
    shard = records.read_manifest(little).splits[split][-1]
    damaged = flip_in_record(little_there, split, records.read_manifest(little).examples(split) - shard.examples + 7)
    line = failure(PairData(little_there, config("train.batch_size=4", f"data.cache={cache}")), split)
    assert line.startswith(f"DataError: {damaged}: the record's checksum does not match its bytes")
    assert damaged == f"{little_there / shard.file}, record 7"
    assert verify(little_there, 2)[1] == [line.removeprefix("DataError: ")]
    with pytest.raises(DataError, match="1 problems"):
        check(little_there, None)


def test_missing_and_cut_shards_are_named_before_training(little: Path, little_there: BucketPath) -> None:
    first, second = (shard.file for shard in records.read_manifest(little).splits["train"])
    (little_there / first).unlink()
    (little_there / second).write_bytes(b"short")
    with pytest.raises(DataError) as caught:
        PairData(little_there, config())
    missing, cut = str(caught.value).splitlines()
    assert missing.startswith(f"{little_there / first}: this shard is missing")
    assert cut.startswith(f"{little_there / second}: has 5 bytes, the manifest says")


def test_a_shard_that_goes_away_while_it_is_read_is_named(little: Path, little_there: BucketPath) -> None:
    data = PairData(little_there, config("train.batch_size=4", "data.cache=none"))
    shard = records.read_manifest(little).splits["train"][0].file
    (little_there / shard).unlink()
    assert re.match(rf"DataError: {little_there / shard}, record \d+: cannot be read: there is no such object$", failure(data))


@pytest.mark.clock
@pytest.mark.parametrize("split", ["train", pytest.param("test", marks=pytest.mark.slow)])
def test_a_bucket_that_stays_away_ends_with_what_it_said(
    split: str, little_there: BucketPath, bucket_service: BucketService, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = PairData(little_there, config("train.batch_size=4"))
    monkeypatch.setattr(Patience, "seconds", 2.0)
    bucket_service.away()
    began = time.monotonic()
    assert re.match(rf"BucketAwayError: {little_there}.* \(tried for 2 s; run this again", failure(data, split))
    assert_within(0, time.monotonic() - began, 8)


@pytest.mark.slow
def test_a_bucket_that_comes_back_is_read_on(little: Path, little_there: BucketPath, bucket_service: BucketService) -> None:
    settings = config("train.batch_size=4", "data.cache=none")
    data = PairData(little_there, settings)
    bucket_service.faults(Fault("away", path="alt=media", times=9))
    assert batches(data, 0, 10) == batches(PairData(little, settings), 0, 10)
    assert len([entry for entry in bucket_service.requests() if entry.fault == "away"]) == 9


def test_what_failed_while_nobody_waited_for_it_is_tried_again(
    little: Path, little_there: BucketPath, bucket_service: BucketService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Patience, "seconds", 1.0)
    monkeypatch.setattr(reading, "REST_SECONDS", 600.0)
    here = Split(little, records.read_manifest(little), "train")
    shards = Shards(little_there, records.read_manifest(little).splits["train"])
    runs = Runs(np.arange(40), shards, 8)
    ahead = ReadAhead(shards, None, 3, 10**9, lambda at: Needs(np.arange(0 if at else 40), runs))
    bucket_service.faults(Fault("status", path="00001-of-00002.*alt=media", times=None))
    found = ahead.read(0, [0])

    def failed_and_resting() -> bool:
        first, second = range(3), range(3, 6)  # of the two shards
        ended = all(map(runs.here, first)) and all(map(runs.untouched, second))
        return ended and len(runs.failures) > 0 and ahead._again_at > time.monotonic()

    wait_until(failed_and_resting, what="the failure of all that was read ahead")
    bucket_service.faults()
    for number in range(1, 40):
        found += ahead.read(0, [number])
    assert found == [here.read(number) for number in range(40)]


def test_a_refusal_names_account_and_permission(little_there: BucketPath, bucket_service: BucketService) -> None:
    data = PairData(little_there, config("train.batch_size=4"))
    bucket_service.faults(refuse(forbidden("storage.objects.get")))
    assert re.match(r"BucketRefusedError: gs://.*/train-.*denied.*; grant it storage\.objects\.get", failure(data))


def test_no_such_folder_bucket_or_manifest_is_one_line(bucket: str) -> None:
    with pytest.raises(DataError, match=rf"^{bucket}/none: no such data folder; --data_dir names a prepared data set$"):
        records.read_manifest(parse(f"{bucket}/none"))
    (parse(bucket) / "some" / "thing").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no dataset\.json in it, so it is not a prepared data set"):
        records.read_manifest(parse(f"{bucket}/some"))
    with pytest.raises(BucketRefusedError, match="there is no bucket of this name"):
        records.read_manifest(parse("gs://no-such-bucket-here/data"))


# The look at one record before all else.


def test_one_record_is_read_before_tensorflow_is_there(little: Path, little_there: BucketPath) -> None:
    manifest = records.read_manifest(little_there)
    records.read_one(little_there, manifest)
    damaged = flip_in_record(little_there, "train", 0)
    with pytest.raises(DataError, match=f"^{damaged}: the record's checksum"):
        records.read_one(little_there, manifest)
    (little_there / manifest.splits["train"][0].file).unlink()
    with pytest.raises(DataError, match="record 0: cannot be read: there is no such object"):
        records.read_one(little_there, manifest)


# Keeping on disk.


def open_files() -> Iterator[str]:
    for entry in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):
            yield str(entry.readlink())


def test_the_file_of_kept_records_has_no_name(little_there: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = PairData(little_there, config("train.batch_size=4", "data.cache=disk"))
    batches(data, 0, 20)
    assert len([link for link in open_files() if link.startswith(str(tmp_path))]) == 1
    assert list(tmp_path.iterdir()) == []


def test_auto_says_what_it_chose(
    little_there: BucketPath, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        PairData(little_there, config())
        monkeypatch.setattr(keep, "memory_limit", lambda: 1_000_000)
        monkeypatch.setattr(keep, "free_disk", lambda: 10_000_000)
        PairData(little_there, config())
        monkeypatch.setattr(keep, "free_disk", lambda: 1_000_000)
        PairData(little_there, config())
    assert [line.split(":")[1] for line in caplog.messages if line.startswith("data.cache: ")] == [" memory", " disk", " none"]


# As a user meets it.


def test_check_reads_all_of_a_bucket_once(little: Path, little_there: BucketPath, bucket_service: BucketService) -> None:
    bucket_service.clear()
    assert "every shard, record and picture is sound" in check(little_there, None)
    assert_each_byte_once(ranges(bucket_service), sum(total_bytes(little, split) for split in ("train", "val", "test")))


@pytest.mark.slow
def test_a_signal_is_heard_while_records_of_a_bucket_are_waited_for(
    little_there: BucketPath, bucket_service: BucketService
) -> None:
    """The main thread and its readers wait, with five minutes of patience left, which are not waited out."""
    bucket_service.faults(Fault("status", "GET", r"tfrecord.*alt=media", times=None, skip=1))
    process = start_trainer("check", f"--data_dir={little_there}")
    wait_until(lambda: len([one for one in bucket_service.requests() if one.fault]) >= 5, process, what="the fifth refusal")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert err.strip().splitlines()[-1].startswith("trainer: SIGTERM: stopped")


def test_check_draws_thumbnails_of_a_bucket(little_there: BucketPath, little: Path, tmp_path: Path) -> None:
    check(little_there, tmp_path / "there.png")
    check(little, tmp_path / "here.png")
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()


@pytest.mark.slow
def test_a_run_that_loses_its_bucket_ends_with_75_and_one_line(
    little_there: BucketPath, bucket_service: BucketService, tmp_path: Path
) -> None:
    bucket_service.faults(Fault("status", path="train-.*alt=media", times=None, skip=3))
    done = run_trainer(
        f"--data_dir={little_there}", f"--model_dir={tmp_path}/run", "--set=runtime.bucket_patience_seconds=3",
        "--set=data.cache=none", "--set=train.steps=100", *(f"--set={setting}" for setting in SMALL),
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    assert re.match(rf"trainer: {little_there}/train-.*: the service answers 503", done.stderr.splitlines()[-1])


def test_an_evaluation_leaves_nothing_of_its_reading_behind(little_there: BucketPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow keeps the functions of a pipeline for ever; a run makes one for every evaluation."""
    monkeypatch.setattr(reading, "IDLE_SECONDS", 0.1)
    data = PairData(little_there, config("train.batch_size=4", "data.cache=none"))
    split = data.split("test")
    for _ in range(3):
        assert sum(len(batch["index"]) for batch in elements(data.batches_of(split, range(split.examples), 4))) == split.examples

    def left() -> int:
        gc.collect()
        return sum(isinstance(one, reading.ReadAhead) and one._shards is split._shards for one in gc.get_objects())

    wait_until(lambda: not left(), what="the end of all readers")
