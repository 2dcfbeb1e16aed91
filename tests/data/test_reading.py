"""How records are cut into runs, kept, and read ahead: against plain Python, and in disorder."""

import logging
import random
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.damage import flip_between
from tests.helpers.settings import small_config
from tests.helpers.waiting import wait_until
from trainer.config import DataConfig
from trainer.data import keep, records
from trainer.data.keep import InMemory, OnDisk, choose, file_system, shown
from trainer.data.pipeline import PairData, run_length
from trainer.data.reading import Needs, ReadAhead, Runs
from trainer.data.shards import Run, Shards
from trainer.errors import DataError, TrainerError
from trainer.storage.bucket import BucketPath

ENDS = [0, 7, 7, 30, 50]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def record(number: int) -> bytes:
    return bytes([number]) * (number * 37 % 91 + 1)


@pytest.fixture
def shards(folder: Path) -> Shards:
    """Fifty records in four shards, one of them empty."""
    written = [
        records.write_shard(folder / str(index), map(record, range(start, end)))
        for index, (start, end) in enumerate(pairwise(ENDS))
    ]
    return Shards(folder, written)


def runs_by_hand(rows: list[int], longest: int) -> list[Run]:
    found: list[Run] = []
    for row in rows:
        last = found[-1] if found else Run(-9, -9)
        if row == last.end and row not in ENDS and row % longest:
            found[-1] = Run(last.first, row + 1)
        else:
            found.append(Run(row, row + 1))
    return found


@pytest.mark.parametrize("longest", [1, 4, 9, 1000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
def test_runs_are_those_cut_by_hand(longest: int, share: float, shards: Shards) -> None:
    rows = [number for number in range(50) if random.Random(number).random() < share]
    runs = Runs(np.array(rows, np.int64), shards, longest)
    expected = runs_by_hand(rows, longest)
    assert [runs[index] for index in range(len(expected))] == expected
    shuffled = random.Random(0).sample(rows, len(rows))
    order = [next(index for index, run in enumerate(expected) if number in range(*run)) for number in shuffled]
    assert runs.in_order(np.array(shuffled, np.int64)).tolist() == list(dict.fromkeys(order))


def test_a_run_is_one_read_of_sound_records(shards: Shards) -> None:
    assert shards.read_run(Run(7, 30)) == [record(number) for number in range(7, 30)]
    assert shards.bytes_read == shards.size(Run(7, 30)) == sum(len(record(number)) + 16 for number in range(7, 30))


def test_a_damaged_record_in_a_run_is_named_and_the_others_are_there(shards: Shards, folder: Path) -> None:
    flip_between(folder / "2", shards.size(Run(7, 12)), shards.size(Run(7, 13)))
    found = shards.read_run(Run(7, 30))
    assert str(found[5]).startswith(f"{folder}/2, record 5: the record's checksum does not match")
    assert [answer for answer in found if isinstance(answer, bytes)] == [record(n) for n in range(7, 30) if n != 12]


def test_a_shard_that_is_not_there_is_named(shards: Shards, folder: Path) -> None:
    (folder / "3").unlink()
    with pytest.raises(DataError, match=f"^{folder}/3, record 4: cannot be read: No such file or directory$"):
        shards.read_run(Run(34, 36))


@pytest.mark.parametrize("room", [0, 300, 10**6])
@pytest.mark.parametrize("kept", ["no", "memory", "disk"])
def test_any_order_of_asking_by_many_threads_gives_the_right_records(room: int, kept: str, shards: Shards) -> None:
    """Lists that overlap in time, records twice in a list, records that are in none, and lists from long ago."""
    store = {"no": None, "memory": InMemory(), "disk": OnDisk(shards)}[kept]
    lists = {at: np.array(random.Random(at).choices(range(50), k=40), np.int64) for at in range(6)}
    whole = Runs(np.arange(50), shards, 6)

    def needs(at: int) -> Needs:
        numbers = lists.get(at, np.zeros(0, np.int64))
        return Needs(numbers, whole if store else Runs(np.unique(numbers), shards, 6))

    ahead = ReadAhead(shards, store, 3, room, needs)
    asked = [(at, int(number)) for at, numbers in lists.items() for number in [*numbers, 49, 0]]
    near = sorted(asked, key=lambda one: one[0] + random.Random(repr(one)).random() * 2)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: ahead.read(one[0], [one[1]])[0], near * 2))
    assert found == [record(number) for _, number in near * 2]


def test_no_more_than_the_room_waits_for_its_use(shards: Shards) -> None:
    ahead = ReadAhead(shards, None, 4, 500, lambda at: Needs(np.arange(0 if at else 50), Runs(np.arange(50), shards, 1)))
    most = 0
    for number in range(50):
        assert ahead.read(0, [number]) == [record(number)]
        most = max(most, sum(len(held) for held in ahead._held.values() if isinstance(held, bytes)))
    assert most <= 500


def test_an_error_that_nobody_foresaw_leaves_nobody_waiting(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Run] = []
    ended: list[object] = []

    def broken(run: Run) -> list[bytes | TrainerError]:
        begun.append(run)
        raise RuntimeError

    monkeypatch.setattr(shards, "read_run", broken)
    monkeypatch.setattr("threading.excepthook", ended.append)
    ahead = ReadAhead(shards, None, 2, 500, lambda _: Needs(np.arange(50), Runs(np.arange(50), shards, 6)))
    for _ in range(5):
        with pytest.raises(TrainerError, match="record 0: the thread that reads it broke"):
            ahead.read(0, [0])

    def at_rest() -> bool:
        """Whether all threads that read have broken, those that read ahead too, and those in their place have nothing to do."""
        with ahead._work:
            return ahead._threads == ahead._idle and len(ended) == len(begun)

    wait_until(at_rest, what="the end of the threads that broke")


def test_what_the_disk_changes_is_read_again(shards: Shards, caplog: pytest.LogCaptureFixture) -> None:
    store = OnDisk(shards)
    for number in range(50):
        store.put(number, record(number))
    assert [store.get(number) for number in range(50)] == [record(number) for number in range(50)]
    store._file.seek(int(shards.positions[20]) + 12)
    store._file.write(b"\xff\xff")
    store._file.flush()
    assert store.get(20) is None
    assert "checksum does not match" in caplog.text
    assert not store.has(Run(15, 25))


def test_a_full_disk_is_one_line(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    store = OnDisk(shards)
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(store, "_file", full)
        with pytest.raises(TrainerError, match=f"^{tempfile.gettempdir()}: No space left on device; make room, set TMPDIR"):
            store.put(3, record(3))


@pytest.mark.parametrize(
    ("kilobytes", "batch", "own", "run"), [(60, 1, 1, 64), (60, 64, 64, 64), (250, 64, 64, 4), (250, 64, 8, 32), (4000, 1, 1, 1)]
)
def test_runs_are_long_where_what_is_in_use_has_room(kilobytes: int, batch: int, own: int, run: int) -> None:
    at_once = own * (max(4096 // batch, 64) + 32)
    assert run_length([64, 32, 16, 8, 4, 2, 1], at_once, kilobytes * 1000, 1024 * 10**6) == run


@pytest.mark.parametrize("run", [2, 5, 64])
def test_the_part_that_waits_is_what_was_worked_out(run: int) -> None:
    """Simulated: runs of a large set are fetched whole when their first record is used."""
    records_in_all, most, here = 64 * 500, 0, set()
    for used, number in enumerate(random.Random(1).sample(range(records_in_all), records_in_all), 1):
        here.add(number // run)
        most = max(most, len(here) * run - used)
    room = int(most * 4 / 3)
    assert run_length([run], records_in_all, 1, int(room * 1.02)) == run
    assert run_length([run], records_in_all, 1, int(room * 0.98)) == 1


# What is kept, and where.


@pytest.mark.parametrize(
    ("asked", "memory", "disk", "chosen"),
    [
        ("auto", 8, 8, "memory"),
        ("auto", 7, 4, "disk"),
        ("auto", 7, 3, "none"),
        ("none", 8, 8, "none"),
        ("memory", 1, 1, "memory"),
        ("disk", 1, 1, "disk"),
    ],
)
def test_auto_keeps_where_there_is_room(
    asked: str, memory: int, disk: int, chosen: str, sample_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = records.read_manifest(sample_folder)
    size = sum(shard.bytes for shards in manifest.splits.values() for shard in shards)
    monkeypatch.setattr(keep, "memory_limit", lambda: memory * size // 2)
    monkeypatch.setattr(keep, "free_disk", lambda: disk * size // 2)
    config = DataConfig.model_validate({"cache": asked})
    assert choose(config, BucketPath("b", "data"), manifest) == chosen
    assert choose(config, sample_folder, manifest) == ("memory" if asked == "memory" else "none")


def test_the_choice_is_one_line(sample_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        choose(DataConfig(), BucketPath("b", "data"), records.read_manifest(sample_folder))
        choose(DataConfig(), sample_folder, records.read_manifest(sample_folder))
    (line,) = caplog.messages
    assert line.startswith("data.cache: memory: gs://b/data has 2.8 MB, no more than a quarter of the ")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (2_300_000, "2.3 MB"), (1_500_000_000_000, "1500.0 GB")]
)
def test_sizes_are_shown_for_people(size: int, text: str) -> None:
    assert shown(size) == text


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "4096\n"}, 4096),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/pod/box\n", {"pod/memory.max": "4096\n", "pod/box/memory.max": "max\n"}, 4096),
        (
            "4:memory:/pod\n0::/\n",
            {"memory/pod/memory.limit_in_bytes": "8192\n", "memory/memory.limit_in_bytes": f"{1 << 63}\n"},
            8192,
        ),
        ("4:memory:/docker/1\n", {"memory/memory.limit_in_bytes": "8192\n"}, 8192),
        ("", {}, None),
    ],
)
def test_the_limit_of_a_container_is_found(own: str, files: dict[str, str], limit: int | None, tmp_path: Path) -> None:
    for name, text in {"own": own, **{f"root/{name}": text for name, text in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = min(keep._limits_of_groups(tmp_path / "root", tmp_path / "own"), default=1 << 60)
    assert found == (limit or 1 << 60)


def test_a_folder_in_memory_is_no_disk(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("overlay / overlay rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/sda /tmp/disk ext4 rw 0 0\n")
    kinds = [file_system(Path(folder), mounts) for folder in ("/var/tmp", "/tmp", "/tmp/x/y", "/tmp/disk/z", "/tmpx")]
    assert kinds == ["overlay", "tmpfs", "tmpfs", "ext4", "overlay"]


@pytest.mark.parametrize("cache", ["auto", "none", "memory", "disk"])
def test_bytes_that_were_read_are_counted(cache: str, sample_folder: Path) -> None:
    data = PairData(sample_folder, small_config("train.batch_size=4", f"data.cache={cache}"))
    total = sum(shard.bytes for shard in data.manifest.splits["train"])
    list(data.training_batches(0, 20))
    assert data.bytes_read == (total if cache == "memory" else 2 * total)
