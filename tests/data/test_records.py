from pathlib import Path

import pytest
import tensorflow as tf

from tests.helpers.journal import Journal
from trainer.data import records
from trainer.data.sample import SPLITS
from trainer.errors import DataError

RECORDS = [b"", b"one", bytes(range(256)) * 300]


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, records.Shard]:
    path = tmp_path / records.shard_name("train", 0, 1)
    return path, records.write_shard(path, RECORDS)


def test_shard_names() -> None:
    assert records.shard_name("train", 3, 16) == "train-00003-of-00016.tfrecord"


def test_tensorflow_reads_what_we_write(shard: tuple[Path, records.Shard]) -> None:
    assert list(tf.data.TFRecordDataset(str(shard[0])).as_numpy_iterator()) == RECORDS


def test_our_bytes_are_tensorflows_bytes(shard: tuple[Path, records.Shard], tmp_path: Path) -> None:
    with tf.io.TFRecordWriter(str(tmp_path / "theirs")) as writer:
        for record in RECORDS:
            writer.write(record)
    assert shard[0].read_bytes() == (tmp_path / "theirs").read_bytes()


def read(path: Path, shard: records.Shard, index: int) -> bytes:
    start, end = [*shard.offsets, shard.bytes][index : index + 2]
    return records.unframe(records.read_part(path, start, end), end - start)


def test_offsets_lead_to_each_record_alone(shard: tuple[Path, records.Shard]) -> None:
    assert [read(*shard, index) for index in (2, 0, 1)] == [RECORDS[2], RECORDS[0], RECORDS[1]]


def test_shard_entry_states_size_and_checksum(shard: tuple[Path, records.Shard]) -> None:
    path, entry = shard
    assert entry.bytes == path.stat().st_size
    assert entry.crc32c == f"{reference_crc32c(path.read_bytes()):08x}"


def reference_crc32c(data: bytes) -> int:
    """CRC-32C bit by bit, from its reversed polynomial 0x82F63B78."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("position", range(0, 19))
def test_every_flipped_byte_of_a_record_is_found(position: int, shard: tuple[Path, records.Shard]) -> None:
    path, entry = shard
    content = bytearray(path.read_bytes())
    content[entry.offsets[1] + position] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"length is damaged|checksum does not match"):
        read(path, entry, 1)


def test_cut_shard_is_found(shard: tuple[Path, records.Shard]) -> None:
    path, entry = shard
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="ends 5 bytes too early"):
        read(path, entry, 2)


def test_shards_and_manifest_are_on_disk_before_the_manifest_has_its_name(
    sample_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, journal = records.read_manifest(sample_folder), Journal(monkeypatch)
    shard = records.write_shard(tmp_path / "a.tfrecord", RECORDS)
    (synced,) = journal.acts
    assert (synced.kind, synced.path, synced.size) == ("sync", tmp_path / "a.tfrecord", shard.bytes)
    assert shard.bytes > sum(map(len, RECORDS))
    records.write_manifest(tmp_path, manifest)
    synced, renamed = journal.acts[1:]
    assert (renamed.kind, renamed.path) == ("rename", tmp_path / records.MANIFEST_NAME)
    assert (synced.kind, synced.path, synced.size) == ("sync", renamed.source, renamed.path.stat().st_size)


def test_manifest_round_trips(sample_folder: Path, tmp_path: Path) -> None:
    manifest = records.read_manifest(sample_folder)
    records.write_manifest(tmp_path, manifest)
    assert records.read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == [records.MANIFEST_NAME]


def test_digest_is_of_the_pairs_not_of_the_place(sample_folder: Path) -> None:
    manifest = records.read_manifest(sample_folder)
    other = manifest.model_copy(update={"name": "x"})
    assert manifest.digest() == records.read_manifest(sample_folder).digest() != other.digest()


def test_wrong_manifest_names_each_entry(sample_folder: Path, tmp_path: Path) -> None:
    text = (sample_folder / "dataset.json").read_text()
    (tmp_path / "dataset.json").write_text(
        text.replace('"layout": "pair"', '"layout": "diagonal"').replace('"licence"', '"license"')
    )
    with pytest.raises(DataError) as caught:
        records.read_manifest(tmp_path)
    lines = [line.removeprefix(f"{tmp_path}/dataset.json: ") for line in str(caught.value).splitlines()]
    assert "layout: got 'diagonal', allowed: 'pair' or 'separate'" in lines
    assert "license: unknown key" in lines
    assert "licence: missing" in lines


def test_manifest_that_is_no_json_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"^.*dataset\.json: not JSON: .*$"):
        records.read_manifest(tmp_path)


def test_folder_without_manifest_is_not_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a prepared data set"):
        records.read_manifest(tmp_path)


def test_missing_and_cut_shards_are_named_before_training(sample_folder: Path, tmp_path: Path) -> None:
    manifest = records.read_manifest(sample_folder)
    first, second = manifest.splits["train"]
    (tmp_path / second.file).write_bytes(b"short")
    with pytest.raises(DataError) as caught:
        records.check_shard_sizes(tmp_path, [first, second])
    missing, cut = str(caught.value).splitlines()
    assert f"{first.file}: this shard is missing" in missing
    assert f"{second.file}: has 5 bytes, the manifest says {second.bytes}" in cut


def test_sample_has_the_splits_of_its_source(sample_folder: Path) -> None:
    manifest = records.read_manifest(sample_folder)
    assert [manifest.examples(split) for split in SPLITS] == [40, 8, 15]
    assert manifest.examples("nothing") == 0
