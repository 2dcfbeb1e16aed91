"""Pictures and data sets in a bucket: the same shards as on this machine, made once, and nothing taken for what it is not."""

import json
import signal
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.helpers.bucket.answers import forbidden
from tests.helpers.bucket.faults import Fault, Request, refuse
from tests.helpers.bucket.runs import copy_up
from tests.helpers.bucket.service import BucketService
from tests.helpers.images import encode, label, photo, write_pairs
from tests.helpers.mirror import Server
from tests.helpers.preparing import digests, options, spoil
from tests.helpers.processes import run_trainer, start_trainer
from tests.helpers.waiting import wait_until
from trainer.data import prepare as prepare_module
from trainer.data import records
from trainer.data.outputs import PARTIAL_MARK
from trainer.data.prepare import Options, prepare
from trainer.data.published import fetch
from trainer.data.sources import list_pairs
from trainer.errors import BucketAwayError, BucketRefusedError, DataError, UserError
from trainer.storage.bucket import BucketPath, checksum_of, parse
from trainer.storage.service import Patience
from trainer.storage.transfer import UPLOADS

COUNT, SHARD_BYTES = 40, 20_000


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pairs(folder, COUNT, "jpeg")
    return folder


@pytest.fixture(scope="module")
def local(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set as it is made on this machine."""
    folder = tmp_path_factory.mktemp("local") / "data"
    prepare(options(pictures, folder, shard_bytes=SHARD_BYTES), 1)
    return folder


def to_bucket(source: object, url: str, **more: object) -> Options:
    return replace(options(str(source), Path(), **({"shard_bytes": SHARD_BYTES} | more)), output=parse(url))


def manifest_of(folder: Path | BucketPath) -> dict[str, object]:
    return records.read_manifest(folder).model_dump(exclude={"source"})


def need_equal(there: BucketPath, folder: Path) -> None:
    """The same objects as files, byte for byte but for the name of the source."""
    assert manifest_of(there) == manifest_of(folder)
    shards = {path.name: checksum_of(path) for path in folder.glob("*.tfrecord")}
    assert {name: state.crc32c for name, state in there.listing().items() if name != records.MANIFEST_NAME} == shards
    assert len(shards) > 3


def shards_sent(service: BucketService, bucket: str) -> list[str]:
    """The shards of which an upload to a bucket was begun."""
    begun = f"/b/{bucket.removeprefix('gs://')}/o"
    sent = [entry.path for entry in service.requests() if entry.method == "POST" and begun in entry.path]
    return sorted(path.split("name=")[-1].split("/")[-1] for path in sent if path.endswith(".tfrecord"))


def downloads(service: BucketService, suffix: str) -> list[Request]:
    return [entry for entry in service.requests() if "alt=media" in entry.path and suffix in entry.path]


def test_to_a_bucket_it_is_the_same_data_set_and_prepared_again_it_is_done(
    pictures: Path, local: Path, bucket_service: BucketService, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    wanted = to_bucket(pictures, f"{bucket}/sets/data")
    closing = prepare(wanted, 1)
    assert f"next: trainer --data_dir={bucket}/sets/data" in closing
    need_equal(parse(f"{bucket}/sets/data"), local)
    writes = [entry.path for entry in bucket_service.requests() if entry.method == "POST"]
    assert PARTIAL_MARK in writes[0]
    assert "dataset.json" in writes[-1]
    assert "ifGenerationMatch=0" in writes[-1]
    assert downloads(bucket_service, "tfrecord") == [], "nothing is read back"
    assert list(tmp_path.iterdir()) == []
    bucket_service.clear()
    assert "is prepared already, from the same pictures" in prepare(wanted, 1)
    assert {entry.method for entry in bucket_service.requests()} == {"GET"}


@pytest.mark.parametrize(
    ("keep", "times", "processes"), [(10**9, 1, 1), (0, 2, 1), pytest.param(10**9, 1, 2, marks=pytest.mark.slow)]
)
def test_from_a_bucket_it_is_the_same_data_set_and_each_picture_is_downloaded_once(
    keep: int, times: int, processes: int, pictures: Path, local: Path, bucket_service: BucketService, bucket: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In processes of their own; where the copies would not fit, twice."""
    source = copy_up(pictures, f"{bucket}/pictures")
    bucket_service.clear()
    monkeypatch.setattr(prepare_module, "KEEP_BYTES", keep)
    prepare(options(source, tmp_path / "data", shard_bytes=SHARD_BYTES), processes)
    assert {name: digest for name, digest in digests(tmp_path / "data").items() if name != records.MANIFEST_NAME} == {
        name: digest for name, digest in digests(local).items() if name != records.MANIFEST_NAME
    }
    assert manifest_of(tmp_path / "data") == manifest_of(local)
    assert len(downloads(bucket_service, ".jpeg")) == times * COUNT
    assert bucket_service.count() <= times * COUNT + 2, "one list, and one look whether the folder is there"


@pytest.mark.parametrize("layout", ["side_by_side", "folders", "list"])
def test_layouts_find_the_same_pairs_and_the_same_problems(layout: str, bucket: str, tmp_path: Path) -> None:
    for side, names in {
        "a": ("train/1.png", "val/2.jpg", "3.PNG", ".x/4.png", "5.txt"),
        "b": ("train/1.tif", "3.png", "6.bmp"),
    }.items():
        for name in names:
            (tmp_path / "top" / side / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "top" / side / name).write_bytes(name.encode())
    rows = "input,target,split,key\na/train/1.png,b/train/1.tif,train,one\na/3.PNG,b/../b/3.png,,\na/none.png,b/6.bmp,test,\n"
    (tmp_path / "top" / "list.csv").write_text(rows)
    copy_up(tmp_path / "top", f"{bucket}/top")

    def found(top: str) -> tuple[list[tuple[str, ...]], list[str]]:
        source = {"side_by_side": top, "folders": f"{top}/a,{top}/b", "list": f"{top}/list.csv"}[layout]
        listing = list_pairs(source, layout, (90, 5, 5))
        pairs = [(pair.key, pair.split, *(str(path).replace("b/../", "") for path in pair.paths)) for pair in listing.pairs]
        return [tuple(part.replace(top, "") for part in pair) for pair in pairs], [
            line.replace(top, "").replace("not there", "not on disk") for line in listing.problems
        ]

    here, there = found(f"{tmp_path}/top"), found(f"{bucket}/top")
    assert here == there
    assert len(here[0]) >= 2
    if layout != "side_by_side":
        assert here[1]


def test_a_list_may_name_addresses_and_two_folders_may_lie_apart(bucket: str, tmp_path: Path) -> None:
    for side, draw in (("a", label), ("b", photo)):
        for number in range(4):
            (tmp_path / side).mkdir(exist_ok=True)
            (tmp_path / side / f"{number}.png").write_bytes(encode(draw(number), "png"))
    copy_up(tmp_path / "b", f"{bucket}/b")
    prepare(options(f"{tmp_path}/a,{tmp_path}/b", tmp_path / "one" / "data", layout="folders"), 1)
    prepare(options(f"{tmp_path}/a,{bucket}/b", tmp_path / "two" / "data", layout="folders"), 1)
    rows = [{"input": f"a/{number}.png", "target": f"{bucket}/b/{number}.png", "key": str(number)} for number in range(4)]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    prepare(options(tmp_path / "list.jsonl", tmp_path / "three" / "data", layout="list"), 1)
    one, two, three = (manifest_of(tmp_path / folder / "data") for folder in ("one", "two", "three"))
    assert one == two
    assert one["splits"] == three["splits"]


@pytest.mark.slow
def test_under_faults_from_and_to_a_bucket_the_same_objects(
    pictures: Path, local: Path, bucket_service: BucketService, bucket: str
) -> None:
    source = copy_up(pictures, f"{bucket}/pictures")
    kinds = ("503", "429", "reset", "stall", "truncate", "lost_reply", "corrupt", "cut_upload")
    bucket_service.random_faults(0.2, seed=5, kinds=kinds, stall_seconds=0.3)
    prepare(to_bucket(source, f"{bucket}/data"), 1)
    faulty = sum(bool(entry.fault) for entry in bucket_service.requests())
    bucket_service.clear()
    assert faulty > 10
    need_equal(parse(f"{bucket}/data"), local)


def test_interrupted_it_goes_on_and_sends_only_what_is_not_there(
    pictures: Path, local: Path, bucket_service: BucketService, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away after three shards; then the same command, on another machine: nothing of the first one's disk is needed."""
    where, wanted = parse(f"{bucket}/data"), to_bucket(pictures, f"{bucket}/data")
    monkeypatch.setattr(Patience, "seconds", 1.0)
    before = threading.active_count()
    bucket_service.faults(Fault("reset", "POST", r"name=data/.*\.tfrecord$", times=None, skip=3))
    with pytest.raises(BucketAwayError, match="run this again when the bucket answers"):
        prepare(wanted, 1)
    wait_until(lambda: threading.active_count() <= before, what="the end of uploads that were under way when the first gave up")
    bucket_service.clear()
    there = set(where.listing())
    finished = {name.removesuffix(".json") for name in there if name.endswith(".json")}
    assert len(finished) == 3
    assert records.MANIFEST_NAME not in there
    (where / sorted(finished)[0]).write_bytes(b"cut short")  # of another size
    (where / f"{sorted(finished)[1]}.json").unlink()  # its note was lost: made again, and found to be there
    bucket_service.clear()
    prepare(wanted, 1)
    needed = {path.name for path in local.glob("*.tfrecord")} - set(sorted(finished)[1:])
    assert shards_sent(bucket_service, bucket) == sorted(needed)
    need_equal(where, local)


def test_killed_it_goes_on(pictures: Path, local: Path, bucket_service: BucketService, bucket: str, tmp_path: Path) -> None:
    """One shard of three is there with its note when it is killed; of the others the upload has begun."""
    where = parse(f"{bucket}/data")
    bucket_service.faults(Fault("hold", "POST", r"name=data/.*\.tfrecord$", times=None, skip=1))
    arguments = ("prepare", f"--source={pictures}", f"--output={bucket}/data", "--processes=1", "--shard_mb=1")
    process = start_trainer(*arguments, TMPDIR=str(tmp_path))  # what a killed one leaves there
    wait_until(lambda: bucket_service.held() == 2 and len(where.listing()) == 3, process, what="the first shard")
    process.kill()
    process.wait()
    bucket_service.clear()
    bucket_service.release()
    finished = {name for name in where.listing() if name.endswith(".tfrecord")}
    assert {PARTIAL_MARK, *(f"{name}.json" for name in finished)} < set(where.listing())
    done = run_trainer(*arguments)
    assert done.returncode == 0, done.stderr
    assert len(shards_sent(bucket_service, bucket)) == 2
    assert finished.isdisjoint(shards_sent(bucket_service, bucket))
    counts = {split: records.read_manifest(local).examples(split) for split in ("train", "val", "test")}
    there = records.read_manifest(parse(f"{bucket}/data"))
    assert {split: there.examples(split) for split in counts} == counts
    assert set(parse(f"{bucket}/data").listing()) == {
        records.MANIFEST_NAME, *(shard.file for shards in there.splits.values() for shard in shards)
    }  # fmt: skip


def test_what_a_killed_run_could_not_clear_away_the_next_one_does(pictures: Path, local: Path, bucket: str) -> None:
    where, wanted = parse(f"{bucket}/data"), to_bucket(pictures, f"{bucket}/data")
    prepare(wanted, 1)
    for name in (PARTIAL_MARK, "train-00000-of-00009.tfrecord", "train-00000-of-00002.tfrecord.json"):
        (where / name).write_bytes(b"")
    assert "is prepared already" in prepare(wanted, 1)
    need_equal(where, local)


def test_what_is_somebodys_is_not_touched(pictures: Path, bucket: str, tmp_path: Path) -> None:
    where, wanted = parse(f"{bucket}/data"), to_bucket(pictures, f"{bucket}/data")
    (where / "thesis.tex").write_text("mine")
    for mark in (False, True):
        if mark:
            (where / PARTIAL_MARK).write_bytes(b"")
        with pytest.raises(UserError, match=rf"--output={bucket}/data: is there and is no data set"):
            prepare(wanted, 1)
    assert (where / "thesis.tex").read_text() == "mine"
    with pytest.raises(UserError, match="is there and is no data set"):
        prepare(to_bucket(pictures, f"{bucket}/data/thesis.tex"), 1)
    prepare(to_bucket(pictures, f"{bucket}/other"), 1)
    before = parse(f"{bucket}/other").listing()
    write_pairs(tmp_path, 5)
    with pytest.raises(UserError, match=rf"--output={bucket}/other: holds another data set"):
        prepare(to_bucket(tmp_path, f"{bucket}/other"), 1)
    assert parse(f"{bucket}/other").listing() == before


def test_a_prepared_set_that_was_damaged_is_not_called_prepared(pictures: Path, bucket: str) -> None:
    where, wanted = parse(f"{bucket}/data"), to_bucket(pictures, f"{bucket}/data")
    prepare(wanted, 1)
    shard = next(name for name in where.listing() if name.endswith(".tfrecord"))
    (where / shard).unlink()
    with pytest.raises(DataError, match=rf"{where / shard}: is not what the manifest says"):
        prepare(wanted, 1)


def test_two_that_write_there_at_once_do_not_mix(
    pictures: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one, with other pictures, is done between our look and our first shard."""
    write_pairs(tmp_path, COUNT, "png")
    real = prepare_module.make_shards

    def late(*arguments: object) -> object:
        monkeypatch.setattr(prepare_module, "make_shards", real)
        prepare(to_bucket(tmp_path, f"{bucket}/data", percent=(100, 0, 0), shard_bytes=10**9), 1)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare_module, "make_shards", late)
    with pytest.raises(UserError, match="another process writes there"):
        prepare(to_bucket(pictures, f"{bucket}/data", percent=(100, 0, 0), shard_bytes=10**9), 1)
    there = records.read_manifest(parse(f"{bucket}/data"))
    assert there.examples("train") == COUNT
    assert parse(f"{bucket}/data").listing()[there.splits["train"][0].file].crc32c == there.splits["train"][0].crc32c


def test_all_that_is_bad_is_named_by_address_and_nothing_is_written(pictures: Path, bucket: str, tmp_path: Path) -> None:
    for path in sorted(pictures.iterdir())[:12]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    expected = spoil(tmp_path)
    source = copy_up(tmp_path, f"{bucket}/pictures")
    with pytest.raises(DataError) as caught:
        prepare(to_bucket(source, f"{bucket}/data"), 1)
    *lines, advice = str(caught.value).splitlines()
    assert [want for want in expected if sum(f"{source}/{want}" in line for line in lines) != 1] == []
    assert advice.startswith("5 problems in 17 pairs; nothing was written")
    assert parse(f"{bucket}/data").listing() == {}
    assert "5 left out" in prepare(to_bucket(source, f"{bucket}/data"), 1, skip_bad=True)
    assert len(records.read_manifest(parse(f"{bucket}/data")).skipped) == 5


def test_disk_is_needed_for_a_few_shards_only(
    pictures: Path, local: Path, bucket_service: BucketService, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uploads take longer than shards; nevertheless those that wait on the disk are few."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bucket_service.throttle(latency=0.02)
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.001):
            most[0] = max(most[0], len(list(tmp_path.glob("*/*.tfrecord"))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        prepare(to_bucket(pictures, f"{bucket}/data", percent=(100, 0, 0), shard_bytes=5_000), 1)
    finally:
        ended.set()
        watcher.join()
    assert len(records.read_manifest(parse(f"{bucket}/data")).splits["train"]) > 3 * UPLOADS
    assert 0 < most[0] <= UPLOADS + 1


def test_the_command_says_a_refusal_in_one_line(pictures: Path, bucket_service: BucketService, bucket: str) -> None:
    copy_up(pictures, f"{bucket}/pictures")
    bucket_service.faults(refuse(forbidden(), "POST"))
    refused = run_trainer("prepare", f"--source={bucket}/pictures", f"--output={bucket}/data", "--processes=1")
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if not line.startswith("headers: ")]
    for word in (f"{bucket}/data", "storage.objects.create", "trainer@project.iam.gserviceaccount.com"):
        assert word in line
    bucket_service.faults(refuse(forbidden("storage.objects.get"), "GET", r"alt=media.*"))
    with pytest.raises(BucketRefusedError, match=r"storage\.objects\.get"):
        prepare(to_bucket(f"{bucket}/pictures", f"{bucket}/data"), 1)


@pytest.mark.slow
def test_a_signal_ends_it_while_the_bucket_is_away(bucket_service: BucketService, bucket: str, tmp_path: Path) -> None:
    """Its processes wait for pictures, with five minutes of patience left, which are not waited out."""
    write_pairs(tmp_path / "some", 40, "jpeg")
    copy_up(tmp_path / "some", f"{bucket}/pictures")
    bucket_service.faults(Fault("reset", "GET", r"alt=media", times=None, skip=5))
    process = start_trainer("prepare", f"--source={bucket}/pictures", f"--output={tmp_path}/data", "--processes=2")
    wait_until(lambda: len(downloads(bucket_service, ".jpeg")) >= 40, process, what="the fortieth request")
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert err.strip().splitlines()[-1].startswith("trainer: SIGTERM: stopped")
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def test_a_published_set_goes_into_a_bucket(
    server: Server,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its archive stays in TMPDIR, where an interrupted download goes on."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    wanted = Options("facades", "side_by_side", parse(f"{bucket}/data"))
    assert f"the archive is kept in {tmp_path}/trainer-" in fetch("facades", wanted, server.url, 1, False)
    fetch("facades", replace(wanted, output=tmp_path / "local" / "data"), server.url, 1, False)
    there, here = records.read_manifest(parse(f"{bucket}/data")), records.read_manifest(tmp_path / "local" / "data")
    assert there == here
    requests = server.requests
    assert "is prepared already" in fetch("facades", wanted, server.url, 1, False)
    assert server.requests == requests
