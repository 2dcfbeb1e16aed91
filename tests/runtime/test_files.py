"""Files are written whole or not at all, whatever the disk does."""

import contextlib
import errno
from pathlib import Path

import pytest

from tests.helpers.disks import small_disk
from tests.helpers.journal import Journal, fail_rename
from trainer.runtime import files


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_a_file_takes_its_name_when_its_bytes_are_on_disk_and_then_the_name_is_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(monkeypatch)
    files.write_bytes(tmp_path / "x.json", b"12345")
    written, renamed, named = journal.acts[:3]
    assert (renamed.kind, renamed.path) == ("rename", tmp_path / "x.json")
    assert (written.kind, written.path, written.size) == ("sync", renamed.source, 5)
    assert (named.kind, named.path) == ("sync", tmp_path)


def test_a_folder_takes_its_name_when_all_its_files_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, made = Journal(monkeypatch), tmp_path / "export"
    with files.replacing_folder(made) as folder:
        (folder / "inner").mkdir()
        (folder / "a").write_bytes(b"12345")
        (folder / "inner" / "b").write_bytes(b"123456789")
    renamed = journal.rename_of(made)
    source = journal.acts[renamed].source
    assert source is not None
    synced = {act.path: act.size for act in journal.acts[:renamed] if act.kind == "sync"}
    assert (synced[source / "a"], synced[source / "inner" / "b"]) == (5, 9)
    assert {source, source / "inner"} < synced.keys()
    assert journal.syncs(tmp_path)[-1] > renamed
    assert (made / "inner" / "b").read_bytes() == b"123456789"


def test_an_old_folder_is_removed_when_the_new_one_has_its_name_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "export"
    made.mkdir()
    (made / "old").write_text("old")
    journal = Journal(monkeypatch)
    with files.replacing_folder(made) as folder:
        (folder / "a").write_text("new")
    (removed,) = [number for number, act in enumerate(journal.acts) if act.kind == "remove"]
    assert journal.rename_of(made) < journal.syncs(tmp_path)[-1] < removed
    assert list(tmp_path.rglob("*")) == [made, made / "a"]


@pytest.mark.parametrize("done", [False, True], ids=["not renamed", "renamed"])
@pytest.mark.parametrize("number", [1, 2], ids=["the old one", "the new one"])
@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_a_rename_that_fails_leaves_the_old_folder_or_the_new_one(
    code: int, number: int, done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done counts as done, whatever the file system says."""
    made = tmp_path / "export"
    with files.replacing_folder(made) as folder:
        (folder / "a").write_text("old")
    renames = fail_rename(monkeypatch, number, code, done=done)
    refused = pytest.raises(OSError, match=r"Stale file handle|Input/output error")
    with contextlib.nullcontext() if done else refused, files.replacing_folder(made) as folder:
        (folder / "b").write_text("new")
    assert renames() >= number
    name, text = ("b", "new") if done else ("a", "old")
    assert list(tmp_path.rglob("*")) == [made, made / name]
    assert (made / name).read_text() == text


def test_a_file_or_a_link_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(NotADirectoryError, match=f"{tmp_path}/{name}"), files.replacing_folder(tmp_path / name):
            pass
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", tmp_path / "link"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    made = tmp_path / "export"
    for text in ("old", "new"):
        with files.replacing_folder(made) as folder:
            (folder / "a").write_text(text)
    with pytest.raises(RuntimeError), files.replacing_folder(made) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert [(path.name, path.read_text()) for path in tmp_path.rglob("*") if path.is_file()] == [("a", "new")]
    assert list(tmp_path.iterdir()) == [made]


@pytest.mark.parametrize("done", [False, True], ids=["not renamed", "renamed"])
@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_a_rename_that_fails_leaves_the_old_file_or_the_new_one(
    code: int, done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    files.write_text(path, "old")
    fail_rename(monkeypatch, 1, code, done=done)
    with pytest.raises(OSError, match=r"Stale file handle|Input/output error") as caught:
        files.write_text(path, "new, and longer")
    assert (caught.value.errno, caught.value.filename) == (code, str(path))
    assert path.read_text() == ("new, and longer" if done else "old")
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_the_error_names_it(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        path = disk.path / "x.json"
        files.write_text(path, "old")
        disk.fill(left=8192)
        with pytest.raises(OSError, match="No space left on device") as caught:
            files.write_text(path, "new" * 10_000)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
        assert path.read_text() == "old"
        disk.free()
        assert list(disk.path.iterdir()) == [path]
        files.write_text(path, "new" * 10_000)
        assert path.read_text() == "new" * 10_000


def test_the_speed_of_a_disk_is_bytes_over_seconds_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, moments = Journal(monkeypatch), iter([10.0, 10.5])
    monkeypatch.setattr(files, "PROBE_MEBIBYTES", 3)
    monkeypatch.setattr(files.time, "perf_counter", lambda: next(moments))
    assert files.write_speed(tmp_path / "not" / "there") == pytest.approx(3 * 1.048576 / 0.5)
    assert [act.size for act in journal.acts if act.kind == "sync"] == [3 << 20], "what is not synced measures memory"
    assert list(tmp_path.iterdir()) == []


def test_what_killed_writers_left_is_swept_away_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "deep", tmp_path / "deep" / "deeper"):
        (folder / f"{files.TEMPORARY}abc").write_text("torn")
        (folder / "kept.writing-abc").write_text("whole")
        (folder / f"{files.TEMPORARY}export" / "variables").mkdir(parents=True)
        (folder / f"{files.TEMPORARY}export" / "variables" / f"{files.TEMPORARY}x").write_text("torn")
    files.sweep(tmp_path)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"kept.writing-abc"}
    assert len(list(tmp_path.rglob("kept*"))) == 3
