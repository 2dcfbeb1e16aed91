"""Prepared data read from a bucket: the same batches as from a folder, few requests, and one line for what is wrong."""

import contextlib
import gc
import re
import signal
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.bucket.answers import forbidden
from tests.helpers.bucket.faults import Fault, Request, refuse
from tests.helpers.bucket.service import BucketService
from tests.helpers.processes import run_trainer, start_trainer
from tests.helpers.settings import SMALL, small_config
from trainer.check import check
from trainer.data import keep, order, reading, records
from trainer.data.pipeline import PairData, elements
from trainer.data.split import Split
from trainer.data.verify import verify
from trainer.errors import BucketAwayError, BucketRefusedError, DataError
from trainer.storage.bucket import BucketPath, parse
from trainer.storage.service import Patience

BIG = 600
SAYING = "tfrecord, record "


@pytest.fixture(scope="module")
def big(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's 40 pairs fifteen times over, in three shards of unlike sizes."""
    folder = tmp_path_factory.mktemp("big")
    manifest = records.read_manifest(sample_folder)
    split = Split(sample_folder, manifest, "train")
    pictures = [split.read(number) for number in range(40)] * (BIG // 40)
    ends = [0, 170, 400, BIG]
    shards = [
        records.write_shard(folder / records.shard_name("train", index, 3), pictures[start:end])
        for index, (start, end) in enumerate(pairwise(ends))
    ]
    records.write_manifest(folder, manifest.model_copy(update={"splits": {"train": shards}}))
    return folder


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


def put(folder: Path, bucket: str) -> BucketPath:
    there = parse(f"{bucket}/data")
    for file in sorted(folder.iterdir()):
        (there / file.name).upload(file)
    return there


@pytest.fixture
def sample_there(sample_folder: Path, bucket: str) -> BucketPath:
    return put(sample_folder, bucket)


@pytest.fixture
def big_there(big: Path, bucket: str) -> BucketPath:
    return put(big, bucket)


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


@pytest.mark.parametrize("cache", ["none", "memory", "disk"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_batches_are_those_of_the_folder(
    cache: str, size: int, sample_folder: Path, sample_there: BucketPath, bucket_service: BucketService
) -> None:
    """Over two epochs and a half, from step 0 and from a step in the middle."""
    steps = 40 // size * 5 // 2
    settings = f"train.batch_size={size}", f"data.cache={cache}"
    expected = batches(PairData(sample_folder, small_config(*settings)), 0, steps)
    assert batches(PairData(sample_there, small_config(*settings)), 0, steps) == expected
    assert batches(PairData(sample_there, small_config(*settings)), 7, steps) == expected[7:]


@pytest.mark.parametrize("size", [4, 32])
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.usefixtures("in_chunks")
def test_workers_read_their_own_records_each_byte_once_and_in_runs(
    size: int, workers: int, big: Path, big_there: BucketPath, bucket_service: BucketService
) -> None:
    settings, steps = small_config(f"train.batch_size={size}", "data.cache=none"), BIG // size
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
    settings = small_config("train.batch_size=4", "data.cache=none")
    data = PairData(big_there, settings)
    bucket_service.clear()
    assert batches(data, 130, 150) == batches(PairData(big, settings), 130, 150)
    needed = order.epoch_order(BIG, 0, 0, 4)[130:].ravel()
    assert_each_byte_once(ranges(bucket_service), sum(sizes(big)[number] for number in needed))


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_what_is_kept_is_fetched_once_for_all_epochs(
    cache: str, sample_folder: Path, sample_there: BucketPath, bucket_service: BucketService
) -> None:
    data = PairData(sample_there, small_config("train.batch_size=4", f"data.cache={cache}"))
    bucket_service.clear()
    batches(data, 0, 40)
    batches(data, 15, 40)
    assert data.train.find_damage(range(40)) is None
    assert_each_byte_once(ranges(bucket_service), total_bytes(sample_folder))
    assert len(reads(bucket_service)) == 2
    assert data.bytes_read >= total_bytes(sample_folder)


def test_an_evaluation_reads_each_shard_in_long_runs(
    sample_folder: Path, sample_there: BucketPath, bucket_service: BucketService
) -> None:
    """The last number is repeated, as a worker does that has fewer pictures than another."""
    here, there = (PairData(folder, small_config("data.cache=none")) for folder in (sample_folder, sample_there))
    bucket_service.clear()
    numbers = [*range(15), 14, 14]
    pictures = [
        np.concatenate([batch["input"] for batch in data.batches_of(data.split("test"), numbers, 4)]) for data in (here, there)
    ]
    np.testing.assert_array_equal(*pictures)
    assert there.split("test").keys() == [here.split("test").key(number) for number in range(15)]
    assert len(reads(bucket_service)) == 2


def test_the_sizes_of_all_shards_are_one_request(sample_there: BucketPath, bucket_service: BucketService) -> None:
    bucket_service.clear()
    PairData(sample_there, small_config())
    assert [entry.method for entry in bucket_service.requests()] == ["GET", "GET"]


@pytest.mark.parametrize("room", [1, 5, 200])
@pytest.mark.usefixtures("in_chunks")
def test_a_small_room_costs_time_and_no_more(room: int, big: Path, big_there: BucketPath, bucket_service: BucketService) -> None:
    """1 MB holds 23 of these records; a batch alone is more than that."""
    settings = ["train.batch_size=32", "data.cache=none", f"data.read_ahead_mb={room}", "data.readers=3"]
    expected = batches(PairData(big, small_config(*settings)), 0, 18)
    data = PairData(big_there, small_config(*settings))
    bucket_service.clear()
    assert batches(data, 0, 18) == expected
    assert_each_byte_once(ranges(bucket_service), sum(sizes(big)[number] for number in order.epoch_order(BIG, 0, 0, 32).ravel()))


# What the line and the service do.


@pytest.mark.parametrize("cache", ["none", "memory", "disk"])
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.usefixtures("in_chunks")
def test_one_request_in_five_fails_and_the_batches_are_the_same(
    cache: str, seed: int, big: Path, big_there: BucketPath, bucket_service: BucketService
) -> None:
    settings = ["train.batch_size=8", f"data.cache={cache}", "data.readers=4"]
    expected = batches(PairData(big, small_config(*settings)), 0, 75)
    kinds = ("503", "429", "reset", "stall", "truncate")
    bucket_service.random_faults(0.2, seed, kinds, stall_seconds=0.5)
    data = PairData(big_there, small_config(*settings))
    assert batches(data, 0, 75) == expected
    assert cache != "none" or len([entry for entry in reads(bucket_service) if entry.fault]) > 5


def test_a_byte_that_flips_on_the_way_is_fetched_again(
    sample_folder: Path, sample_there: BucketPath, bucket_service: BucketService, caplog: pytest.LogCaptureFixture
) -> None:
    settings = small_config("train.batch_size=4", "data.cache=memory")
    data = PairData(sample_there, settings)
    bucket_service.faults(Fault("corrupt", path="00001-of-00002"))
    with caplog.at_level("INFO"):
        assert batches(data, 0, 10) == batches(PairData(sample_folder, settings), 0, 10)
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


@pytest.mark.parametrize("cache", ["none", "memory", "disk"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_object_is_named_by_shard_and_record(
    cache: str, split: str, sample_folder: Path, sample_there: BucketPath
) -> None:
    shard = records.read_manifest(sample_folder).splits[split][-1]
    content = bytearray((sample_folder / shard.file).read_bytes())
    content[shard.offsets[7] + 900] ^= 4
    (sample_there / shard.file).write_bytes(bytes(content))
    line = failure(PairData(sample_there, small_config("train.batch_size=4", f"data.cache={cache}")), split)
    assert line.startswith(f"DataError: {sample_there / shard.file}, record 7: the record's checksum does not match its bytes")
    assert verify(sample_there, 2)[1] == [line.removeprefix("DataError: ")]
    with pytest.raises(DataError, match="1 problems"):
        check(sample_there, None)


def test_missing_and_cut_shards_are_named_before_training(sample_folder: Path, sample_there: BucketPath) -> None:
    first, second = (shard.file for shard in records.read_manifest(sample_folder).splits["train"])
    (sample_there / first).unlink()
    (sample_there / second).write_bytes(b"short")
    with pytest.raises(DataError) as caught:
        PairData(sample_there, small_config())
    missing, cut = str(caught.value).splitlines()
    assert missing.startswith(f"{sample_there / first}: this shard is missing")
    assert cut.startswith(f"{sample_there / second}: has 5 bytes, the manifest says")


def test_a_shard_that_goes_away_while_it_is_read_is_named(sample_folder: Path, sample_there: BucketPath) -> None:
    data = PairData(sample_there, small_config("train.batch_size=4", "data.cache=none"))
    shard = records.read_manifest(sample_folder).splits["train"][0].file
    (sample_there / shard).unlink()
    assert re.match(rf"DataError: {sample_there / shard}, record \d+: cannot be read: there is no such object$", failure(data))


@pytest.mark.clock
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_bucket_that_stays_away_ends_with_what_it_said(
    split: str, sample_there: BucketPath, bucket_service: BucketService, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = PairData(sample_there, small_config("train.batch_size=4"))
    monkeypatch.setattr(Patience, "seconds", 2.0)
    bucket_service.away()
    began = time.monotonic()
    assert re.match(rf"BucketAwayError: {sample_there}.* \(tried for 2 s; run this again", failure(data, split))
    assert time.monotonic() - began < 8


def test_a_bucket_that_comes_back_is_read_on(
    sample_folder: Path, sample_there: BucketPath, bucket_service: BucketService
) -> None:
    settings = small_config("train.batch_size=4", "data.cache=none")
    data = PairData(sample_there, settings)
    bucket_service.away()
    threading.Timer(2.0, bucket_service.away, [False]).start()
    assert batches(data, 0, 10) == batches(PairData(sample_folder, settings), 0, 10)


def test_what_failed_while_nobody_waited_for_it_is_tried_again(
    sample_folder: Path, sample_there: BucketPath, bucket_service: BucketService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Patience, "seconds", 1.0)
    there, here = (Split(folder, records.read_manifest(sample_folder), "train") for folder in (sample_there, sample_folder))
    reader = there.reader(lambda _: np.arange(40), 8, 0)
    bucket_service.faults(Fault("status", path="alt=media", times=None, skip=1))
    found = reader(0, [0])
    time.sleep(4.0)
    bucket_service.faults()
    time.sleep(2.0)  # a try that is under way may still end with what it was told before
    for number in range(1, 40):
        found += reader(0, [number])
    assert found == [here.read(number) for number in range(40)]


def test_a_refusal_names_account_and_permission(sample_there: BucketPath, bucket_service: BucketService) -> None:
    data = PairData(sample_there, small_config("train.batch_size=4"))
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


def test_one_record_is_read_before_tensorflow_is_there(sample_folder: Path, sample_there: BucketPath) -> None:
    manifest = records.read_manifest(sample_there)
    records.read_one(sample_there, manifest)
    shard = manifest.splits["train"][0]
    content = bytearray((sample_folder / shard.file).read_bytes())
    content[40] ^= 1
    (sample_there / shard.file).write_bytes(bytes(content))
    with pytest.raises(DataError, match=f"^{sample_there / shard.file}, record 0: the record's checksum"):
        records.read_one(sample_there, manifest)
    (sample_there / shard.file).unlink()
    with pytest.raises(DataError, match="record 0: cannot be read: there is no such object"):
        records.read_one(sample_there, manifest)


# Keeping on disk.


def open_files() -> Iterator[str]:
    for entry in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):
            yield str(entry.readlink())


def test_the_file_of_kept_records_has_no_name(sample_there: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = PairData(sample_there, small_config("train.batch_size=4", "data.cache=disk"))
    batches(data, 0, 20)
    assert len([link for link in open_files() if link.startswith(str(tmp_path))]) == 1
    assert list(tmp_path.iterdir()) == []


def test_auto_says_what_it_chose(
    sample_there: BucketPath, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        PairData(sample_there, small_config())
        monkeypatch.setattr(keep, "memory_limit", lambda: 1_000_000)
        monkeypatch.setattr(keep, "free_disk", lambda: 10_000_000)
        PairData(sample_there, small_config())
        monkeypatch.setattr(keep, "free_disk", lambda: 1_000_000)
        PairData(sample_there, small_config())
    assert [line.split(":")[1] for line in caplog.messages if line.startswith("data.cache: ")] == [" memory", " disk", " none"]


# As a user meets it.


def test_check_reads_all_of_a_bucket_once(sample_folder: Path, sample_there: BucketPath, bucket_service: BucketService) -> None:
    bucket_service.clear()
    done = run_trainer("check", f"--data_dir={sample_there}")
    assert done.returncode == 0, done.stderr
    assert "every shard, record and picture is sound" in done.stdout
    assert_each_byte_once(ranges(bucket_service), sum(total_bytes(sample_folder, split) for split in ("train", "val", "test")))


@pytest.mark.clock
def test_a_signal_is_heard_while_records_of_a_bucket_are_waited_for(
    sample_there: BucketPath, bucket_service: BucketService
) -> None:
    """The main thread and its readers wait, with minutes of patience left."""
    bucket_service.faults(Fault("status", "GET", r"tfrecord.*alt=media", times=None, skip=1))
    process = start_trainer("check", f"--data_dir={sample_there}")
    deadline = time.monotonic() + 60
    while len([one for one in bucket_service.requests() if one.fault]) < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == 143, err
    assert err.strip().splitlines()[-1].startswith("trainer: SIGTERM: stopped")


def test_check_draws_thumbnails_of_a_bucket(sample_there: BucketPath, sample_folder: Path, tmp_path: Path) -> None:
    check(sample_there, tmp_path / "there.png")
    check(sample_folder, tmp_path / "here.png")
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()


def test_a_run_that_loses_its_bucket_ends_with_75_and_one_line(
    sample_there: BucketPath, bucket_service: BucketService, tmp_path: Path
) -> None:
    bucket_service.faults(Fault("status", path="train-.*alt=media", times=None, skip=3))
    done = run_trainer(
        f"--data_dir={sample_there}", f"--model_dir={tmp_path}/run", "--set=runtime.bucket_patience_seconds=3",
        "--set=data.cache=none", "--set=train.steps=100", *(f"--set={setting}" for setting in SMALL),
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    assert re.match(rf"trainer: {sample_there}/train-.*: the service answers 503", done.stderr.splitlines()[-1])


def test_an_evaluation_leaves_nothing_of_its_reading_behind(sample_there: BucketPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow keeps the functions of a pipeline for ever; a run makes one for every evaluation."""
    monkeypatch.setattr(reading, "IDLE_SECONDS", 0.1)
    data = PairData(sample_there, small_config("train.batch_size=4", "data.cache=none"))
    split = data.split("test")
    for _ in range(3):
        assert sum(len(batch["index"]) for batch in elements(data.batches_of(split, range(split.examples), 4))) == split.examples

    def left() -> int:
        gc.collect()
        return sum(isinstance(one, reading.ReadAhead) and one._shards is split._shards for one in gc.get_objects())

    deadline = time.monotonic() + 20
    while left():
        assert time.monotonic() < deadline
        time.sleep(0.1)
