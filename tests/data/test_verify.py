"""A prepared set against its manifest: what is wrong is one line, and nothing is blamed that is sound."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.damage import flip_in_record
from trainer.check import check
from trainer.data import records
from trainer.data.verify import verify
from trainer.errors import DataError


@pytest.fixture
def data(sample_folder: Path, tmp_path: Path) -> Path:
    """The sample's 8 pairs of `val`, for a test alone."""
    shutil.copytree(sample_folder, tmp_path / "data", ignore=shutil.ignore_patterns("train*", "test*"))
    manifest = records.read_manifest(tmp_path / "data")
    records.write_manifest(tmp_path / "data", manifest.model_copy(update={"splits": {"val": manifest.splits["val"]}}))
    return tmp_path / "data"


def test_nothing_is_wrong_with_a_sound_set(data: Path) -> None:
    assert verify(data, 2) == (records.read_manifest(data), [])


def test_records_that_are_sound_but_others_than_the_manifests_are_found(data: Path) -> None:
    """A shard of another set of the same name and sizes: each record is whole, and only the shard's checksum tells."""
    manifest = records.read_manifest(data)
    (shard,) = manifest.splits["val"]
    other = shard.model_copy(update={"crc32c": f"{int(shard.crc32c, 16) ^ 1:08x}"})
    records.write_manifest(data, manifest.model_copy(update={"splits": {"val": [other]}}))
    line = f"{data / shard.file}: does not match the manifest's checksum; copy it again"
    assert verify(data, 1)[1] == [line]
    with pytest.raises(DataError) as caught:
        check(data, None)
    assert str(caught.value) == f"{line}\n{data}: 1 problems"


def test_each_damaged_record_is_a_line_and_their_shard_is_none(data: Path) -> None:
    damaged = [flip_in_record(data, "val", number) for number in (0, 5, 7)]
    assert [line.split(": ")[0] for line in verify(data, 2)[1]] == damaged


def test_of_a_shard_that_is_cut_its_size_is_told_and_no_record(data: Path) -> None:
    (shard,) = records.read_manifest(data).splits["val"]
    with (data / shard.file).open("r+b") as file:
        file.truncate(1000)
    assert verify(data, 2)[1] == [f"{data / shard.file}: has 1000 bytes, the manifest says {shard.bytes}; copy it again"]
