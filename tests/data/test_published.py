"""Data sets by name from a server that drops connections, and archives that mean harm."""

import io
import tarfile
from pathlib import Path

import pytest

from tests.helpers.mirror import Server
from trainer.data import published, records
from trainer.data.prepare import Options
from trainer.data.published import fetch, sha256, unpack
from trainer.errors import DataError, TrainerError, UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published.time, "sleep", lambda seconds: None)


def options(tmp_path: Path) -> Options:
    return Options("facades", "side_by_side", tmp_path / "data")


def test_a_set_comes_by_name_with_its_splits_and_its_label_side(server: Server, tmp_path: Path) -> None:
    fetch("facades", options(tmp_path), server.url, 1, False)
    manifest = records.read_manifest(tmp_path / "data")
    assert {split: manifest.examples(split) for split in manifest.splits} == {"train": 12, "val": 4, "test": 3}
    assert (manifest.name, manifest.input.kind, manifest.target.kind) == ("facades", "photo", "labels")
    assert manifest.source == f"{server.url}facades.tar.gz"


def test_dropped_connections_are_gone_on_from_where_they_broke(server: Server, archive: bytes, tmp_path: Path) -> None:
    server.portion, server.fail_first = len(archive) // 4 + 1, 1
    fetch("facades", options(tmp_path), server.url, 1, False)
    assert server.requests == 5
    kept = tmp_path / "data.download" / "facades.tar.gz"
    assert kept.read_bytes() == archive
    assert (tmp_path / "data.download" / "facades.tar.gz.sha256").read_text().split()[0] == sha256(kept)


def test_a_server_without_ranges_is_asked_from_the_start(server: Server, archive: bytes, tmp_path: Path) -> None:
    work = tmp_path / "data.download"
    work.mkdir()
    (work / "facades.tar.gz.part").write_bytes(archive[:1000])
    server.ranges = False
    fetch("facades", options(tmp_path), server.url, 1, False)
    assert (work / "facades.tar.gz").read_bytes() == archive


def test_a_later_call_goes_on_with_the_part(server: Server, archive: bytes, tmp_path: Path) -> None:
    server.portion = len(archive) // 20
    with pytest.raises(TrainerError, match="could not be downloaded in 8 tries") as caught:
        fetch("facades", options(tmp_path), server.url, 1, False)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "data").exists()
    part = tmp_path / "data.download" / "facades.tar.gz.part"
    assert archive.startswith(part.read_bytes())
    assert part.stat().st_size > 7 * server.portion
    server.portion = len(archive)
    fetch("facades", options(tmp_path), server.url, 1, False)
    assert records.read_manifest(tmp_path / "data").examples("train") == 12


def test_kept_archive_is_verified_from_then_on(server: Server, tmp_path: Path) -> None:
    fetch("facades", options(tmp_path), server.url, 1, False)
    kept = tmp_path / "data.download" / "facades.tar.gz"
    content = bytearray(kept.read_bytes())
    content[100] ^= 1
    kept.write_bytes(content)
    other = Options("facades", "side_by_side", tmp_path / "data")
    (tmp_path / "data" / "dataset.json").unlink()
    with pytest.raises(DataError, match="does not match the checksum kept"):
        fetch("facades", other, server.url, 1, False)


def test_a_set_that_the_server_has_not_is_said_once(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the server says 404"):
        fetch("maps", options(tmp_path), server.url, 1, False)
    assert server.requests == 1


def harmful(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 4) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, link, size if kind == tarfile.REGTYPE else 0
        tar.addfile(member, io.BytesIO(b"evil") if member.size else None)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        harmful("../outside.txt"),
        harmful("a/../../outside.txt"),
        harmful("a/link", tarfile.SYMTYPE, "/etc/passwd"),
        harmful("a/hard", tarfile.LNKTYPE, "../outside.txt"),
        harmful("a/device", tarfile.CHRTYPE),
        b"not an archive",
        harmful("a/x.png")[:-20],
    ],
    ids=["parent", "inner parent", "symlink", "hard link", "device", "text", "cut"],
)
def test_harmful_or_damaged_archives_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / "x.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"not unpacked|cannot be unpacked safely"):
        unpack(tmp_path / "box" / "x.tar.gz", tmp_path / "box" / "unpacked")
    assert not list(tmp_path.glob("outside*"))
    assert not list((tmp_path / "box").glob("outside*"))


def test_an_absolute_path_stays_inside(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(harmful(f"{tmp_path}/absolute.txt"))
    unpack(tmp_path / "x.tar.gz", tmp_path / "unpacked")
    assert not (tmp_path / "absolute.txt").exists()


@pytest.mark.parametrize("limit", ["MAX_UNPACKED_BYTES", "MAX_MEMBERS"])
def test_archive_bombs_are_refused(limit: str, archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, limit, 5)
    (tmp_path / "x.tar.gz").write_bytes(archive)
    with pytest.raises(DataError, match="not unpacked"):
        unpack(tmp_path / "x.tar.gz", tmp_path / "unpacked")


def test_an_archive_that_came_damaged_is_not_believed_and_comes_again(server: Server, archive: bytes, tmp_path: Path) -> None:
    spoilt = bytearray(archive)
    for place in range(len(archive) // 2, len(archive) // 2 + 40):
        spoilt[place] ^= 0xFF
    server.content = bytes(spoilt)
    with pytest.raises(TrainerError, match="came damaged"):
        fetch("facades", options(tmp_path), server.url, 1, False)
    server.content = archive
    fetch("facades", options(tmp_path), server.url, 1, False)
    assert records.read_manifest(tmp_path / "data").examples("train") == 12


def test_another_set_in_the_output_is_not_taken_for_this_one(server: Server, tmp_path: Path) -> None:
    fetch("facades", options(tmp_path), server.url, 1, False)
    assert "is prepared already" in fetch("facades", options(tmp_path), server.url, 1, False)
    with pytest.raises(UserError, match="holds another data set, facades"):
        fetch("maps", options(tmp_path), server.url, 1, False)
