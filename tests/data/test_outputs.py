"""Where a data set appears on this machine: what an interrupted run left, what is somebody else's, and what is left at the end.

The same in a bucket is in test_bucket_prepare.py.
"""

import contextlib
import errno
import json
from pathlib import Path

import pytest

from tests.helpers.journal import Journal, fail_rename
from trainer.data import records
from trainer.data.outputs import PARTIAL_MARK, BucketOutput, Entry, LocalOutput, note_of, output_at, read_note, write_note
from trainer.data.records import ImageSpec, Manifest
from trainer.errors import UserError
from trainer.storage.bucket import BucketPath

NAMES = [records.shard_name("train", index, 3) for index in range(3)]
PHOTO = ImageSpec(kind="photo", channels=3, bit_depth=8)


def write_shard(folder: Path, name: str) -> Entry:
    """A shard and the note that it is finished."""
    entry = records.write_shard(folder / name, [name.encode(), b"another"]), [f"x.png: left out of {name}"]
    write_note(folder, entry, "these")
    return entry


def manifest(entries: list[Entry], made_from: str = "these") -> Manifest:
    return Manifest(
        version=1, name="n", source="s", licence="l", layout="pair", input=PHOTO, target=PHOTO,
        splits={"train": [shard for shard, _ in entries]}, made_from=made_from,
    )  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_set_appears_whole_under_its_name_and_nothing_else_is_left(tmp_path: Path) -> None:
    output = LocalOutput(tmp_path / "data", "these")
    assert not output.is_prepared()
    with output.room() as room:
        entries = [write_shard(room, name) for name in NAMES]
        (room / "of an earlier run.tfrecord").write_bytes(b"")
        assert list(output.keep(entries, 3)) == entries
        assert names(tmp_path) == ["data.partial"]
        output.publish(manifest(entries))
    assert names(tmp_path) == ["data"]
    assert names(tmp_path / "data") == [records.MANIFEST_NAME, *NAMES]
    assert records.read_manifest(tmp_path / "data") == manifest(entries)
    assert LocalOutput(tmp_path / "data", "these").is_prepared()


def test_a_set_takes_its_name_when_its_own_names_are_on_disk_and_then_that_one_is_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, journal = LocalOutput(tmp_path / "data", "these"), Journal(monkeypatch)
    with output.room() as room:
        output.publish(manifest([write_shard(room, NAMES[0])]))
    (names_synced,), (renamed_synced,) = journal.syncs(room), journal.syncs(tmp_path)
    assert journal.rename_of(room / records.MANIFEST_NAME) < names_synced < journal.rename_of(tmp_path / "data") < renamed_synced


@pytest.mark.parametrize("done", [False, True], ids=["not renamed", "renamed"])
@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_a_rename_that_fails_loses_no_shard(code: int, done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest's is the first, that of the folder the second; what was done counts as done."""
    (tmp_path / "data").mkdir()
    output = LocalOutput(tmp_path / "data", "these")
    with output.room() as room:
        entries = [write_shard(room, name) for name in NAMES]
    with monkeypatch.context() as patch:
        renames = fail_rename(patch, 2, code, done=done)
        refused = pytest.raises(OSError, match=r"Stale file handle|Input/output error")
        with contextlib.nullcontext() if done else refused:
            output.publish(manifest(entries))
        assert renames() == 2
    again = LocalOutput(tmp_path / "data", "these")
    assert again.is_prepared() == done
    if not done:
        with again.room() as room:
            assert not (room / records.MANIFEST_NAME).exists(), "shards may be written in it"
        assert again.finished(NAMES) == entries
        again.publish(manifest(entries))
    assert names(tmp_path) == ["data"]
    assert names(tmp_path / "data") == [records.MANIFEST_NAME, *NAMES]


def test_notes_that_a_killed_run_left_in_a_finished_set_are_removed_and_nothing_else(tmp_path: Path) -> None:
    output = LocalOutput(tmp_path / "data", "these")
    with output.room() as room:
        entries = [write_shard(room, name) for name in NAMES]
        output.publish(manifest(entries))
    write_note(tmp_path / "data", entries[2], "these")
    for name in (PARTIAL_MARK, "README"):
        (tmp_path / "data" / name).touch()
    assert LocalOutput(tmp_path / "data", "these").is_prepared()
    assert names(tmp_path / "data") == ["README", records.MANIFEST_NAME, *NAMES]


def test_what_an_interrupted_run_finished_is_known_with_what_it_left_out(tmp_path: Path) -> None:
    with LocalOutput(tmp_path / "data", "these").room() as room:
        entries = [write_shard(room, name) for name in NAMES[:2]]
    assert LocalOutput(tmp_path / "data", "these").finished(NAMES) == [*entries, None]
    assert LocalOutput(tmp_path / "data", "others").finished(NAMES) == [None, None, None]


@pytest.mark.parametrize(
    "note", ["", "{", "null", "[1]", '{"made_from": "these"}', '{"made_from": "these", "shard": {"file": "x"}, "problems": []}']
)
def test_a_shard_whose_note_is_no_note_is_made_again(note: str, tmp_path: Path) -> None:
    write_shard(tmp_path, NAMES[0])
    (tmp_path / note_of(NAMES[0])).write_text(note)
    assert read_note(tmp_path, NAMES[0], "these") is None


def test_a_shard_that_is_gone_or_cut_is_made_again(tmp_path: Path) -> None:
    output = LocalOutput(tmp_path / "data", "these")
    with output.room() as room:
        for name in NAMES:
            write_shard(room, name)
    (room / NAMES[0]).unlink()
    (room / NAMES[1]).write_bytes((room / NAMES[1]).read_bytes()[:-1])
    assert [entry is None for entry in output.finished(NAMES)] == [True, True, False]


def test_an_empty_folder_is_filled_and_one_of_somebody_is_not(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    output = LocalOutput(tmp_path / "data", "these")
    assert not output.is_prepared()
    with output.room() as room:
        entries = [write_shard(room, NAMES[0])]
        output.publish(manifest(entries))
    with pytest.raises(UserError, match=f"^--output={tmp_path}/data: holds another data set; choose another or remove it$"):
        LocalOutput(tmp_path / "data", "others").is_prepared()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("thesis", "file"):
        with pytest.raises(UserError, match=f"^--output={tmp_path}/{name}: is there and is no data set"):
            LocalOutput(tmp_path / name, "these").is_prepared()


def test_a_partial_folder_without_our_mark_is_not_written_into(tmp_path: Path) -> None:
    output = LocalOutput(tmp_path / "data", "these")
    (tmp_path / "data.partial").mkdir()
    with pytest.raises(UserError, match="is in the way"), output.room():
        pass
    assert names(tmp_path / "data.partial") == []
    (tmp_path / "data.partial" / PARTIAL_MARK).touch()
    with output.room() as room:
        assert room == tmp_path / "data.partial"
        output.discard()
    assert names(tmp_path) == []


def test_a_note_says_what_the_shard_holds_and_from_what(tmp_path: Path) -> None:
    shard, problems = write_shard(tmp_path, NAMES[0])
    note = json.loads((tmp_path / f"{NAMES[0]}.json").read_text())
    assert note == {"made_from": "these", "shard": shard.model_dump(), "problems": problems}


def test_the_place_decides_how_it_is_written(tmp_path: Path) -> None:
    assert isinstance(output_at(tmp_path, ""), LocalOutput)
    assert isinstance(output_at(BucketPath("b", "data"), ""), BucketOutput)
