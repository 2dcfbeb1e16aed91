"""A run's folder: one process writes in it, what it holds stands once, and a failure is told again until something is mended."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.disks import small_disk
from tests.helpers.holder import held_by_another
from tests.helpers.journal import Journal
from tests.helpers.settings import small_config
from trainer.errors import ExitCode, UserError
from trainer.runtime.run_folder import RecordedFailure, RunFolder, fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run").claim()


def test_second_process_is_kept_out_and_told_by_whom_until_the_first_is_dead(tmp_path: Path) -> None:
    with held_by_another(tmp_path / "run") as (holder, token):
        owner = f"{holder.pid} on {socket.gethostname()}"
        with pytest.raises(UserError, match=rf"run: process {owner} is training in it; stop it or"):
            RunFolder(tmp_path / "run").claim(0.05)
        assert (tmp_path / "run" / ".lock").read_text() == f"{owner}\n{token}\n"
        holder.send_signal(signal.SIGKILL)
        assert holder.wait(60) == -signal.SIGKILL
        again = RunFolder(tmp_path / "run").claim(0.05)
        assert again.is_claimed_with(again.token)
        assert (tmp_path / "run" / ".lock").read_text() == f"{os.getpid()} on {socket.gethostname()}\n{again.token}\n"
        assert again.token != token


def test_the_lock_is_waited_for_while_the_first_process_saves(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run").claim()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", lambda seconds: first._lock.close())  # what it does between two looks
        RunFolder(tmp_path / "run").claim(60)


def test_a_folder_that_another_host_does_not_share_is_not_the_chiefs(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("trainer.runtime.run_folder.SEE_SECONDS", 0.05)
    other = RunFolder(tmp_path / "other").claim()
    assert folder.is_claimed_with(folder.token)
    assert not other.is_claimed_with(folder.token)
    assert not RunFolder(tmp_path / "nowhere").is_claimed_with(folder.token)


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="choose another --model_dir"):
        RunFolder(tmp_path / "run").claim()


def test_config_is_kept_with_what_ran(folder: RunFolder) -> None:
    config = small_config()
    folder.write_config(config, {"tensorflow": "2.21.0", "threads": "2"})
    assert folder.saved_config() == config
    assert folder.notes() == {"tensorflow": "2.21.0", "threads": "2"}


def test_changed_settings_are_refused_with_the_difference(folder: RunFolder) -> None:
    folder.write_config(small_config(), {})
    folder.check_config(small_config("train.steps=7", "train.keep=1"))
    with pytest.raises(UserError) as caught:
        folder.check_config(small_config("model.norm=none", "seed=1"))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("config.yaml: seed: 0 in the run, 1 now")
    assert lines[1].endswith("config.yaml: model.norm: 'batch' in the run, 'none' now")
    assert "use another --model_dir" in lines[2]


def test_metrics_and_samples_after_a_step_are_cut_off(folder: RunFolder) -> None:
    folder.samples.mkdir()
    for step in (10, 20, 30):
        folder.add_metrics({"step": step, "split": "val", "l1": 1.5})
        (folder.samples / f"step-{step:07d}.png").write_bytes(b"x")
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 40, "l1"')
    folder.cut_after(20)
    assert [json.loads(line)["step"] for line in folder.metrics_file.read_text().splitlines()] == [10, 20]
    assert sorted(path.name for path in folder.samples.iterdir()) == ["step-0000010.png", "step-0000020.png"]


def test_pictures_of_the_user_are_not_cut_off(folder: RunFolder) -> None:
    folder.samples.mkdir()
    for name in ("step-best.png", "step-0000030 (copy).png", "step-0000030.jpg", "notes.txt"):
        (folder.samples / name).write_bytes(b"x")
    folder.cut_after(-1)
    assert len(list(folder.samples.iterdir())) == 4


def test_a_line_of_metrics_that_is_no_json_is_named_and_not_thrown_away(folder: RunFolder) -> None:
    folder.metrics_file.write_text('{"step": 10, "split": "val"}\n{"step": 20,\n{"step": 30, "split": "val"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: has a line that is not JSON; mend or remove it"):
        folder.cut_after(10)
    assert len(folder.metrics_file.read_text().splitlines()) == 3


def test_a_line_of_metrics_is_on_disk_when_it_is_added(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(monkeypatch)
    for step in (10, 20):
        folder.add_metrics({"step": step, "split": "val", "l1": 1.5})
        assert (journal.acts[-1].path, journal.acts[-1].size) == (folder.metrics_file, folder.metrics_file.stat().st_size)
    assert len(journal.acts) == 2


def test_metrics_on_a_full_disk_lose_no_line_and_the_error_names_the_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        folder = RunFolder(disk.path / "run").claim()
        long = {"split": "val", "note": "x" * 3000}
        folder.add_metrics({"step": 10, **long})
        disk.fill()
        with pytest.raises(OSError, match="No space left on device") as caught:
            folder.add_metrics({"step": 20, **long})
        assert caught.value.filename == str(folder.metrics_file)
        assert [entry["step"] for entry in folder.metrics()] == [10], "half a line does not count"
        assert folder.metrics_file.stat().st_size > 3100, "there is half a line"
        disk.free()
        folder._lock.close()
        again = RunFolder(disk.path / "run").claim()
        again.cut_after(10)
        again.add_metrics({"step": 20, **long})
        assert [entry["step"] for entry in again.metrics()] == [10, 20]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "shard").write_bytes(b"bad bytes")
    (folder / "other").write_bytes(b"good")
    return folder


def test_failure_is_told_again_until_config_or_data_change(folder: RunFolder, data: Path) -> None:
    config = small_config()
    folder.record_failure("shard, record 3: damaged", ExitCode.USER, fingerprint(config, data))
    for _ in range(2):
        with pytest.raises(RecordedFailure, match=r"shard, record 3: damaged \(nothing has changed") as caught:
            folder.check_failure([fingerprint(config, data)])
        assert caught.value.exit_code == ExitCode.USER
    folder.check_failure([fingerprint(small_config("seed=3"), data)])
    folder.check_failure([fingerprint(config, data)])


def mend_in_place(data: Path) -> None:
    """Other bytes, as many as before, with a time that is a nanosecond later."""
    moment = (data / "shard").stat().st_mtime_ns
    (data / "shard").write_bytes(b"new bytes")
    os.utime(data / "shard", ns=(moment, moment + 1))


def lengthen(data: Path) -> None:
    moment = (data / "shard").stat().st_mtime_ns
    (data / "shard").write_bytes(b"bad bytes, and more")
    os.utime(data / "shard", ns=(moment, moment))


CHANGES = {
    "mended in place": mend_in_place,
    "longer": lengthen,
    "renamed": lambda data: (data / "shard").rename(data / "shard2"),
    "removed": lambda data: (data / "shard").unlink(),
    "added": lambda data: (data / "third").write_bytes(b""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_data_that_a_user_may_have_mended_are_tried_again(change: str, folder: RunFolder, data: Path) -> None:
    config = small_config()
    folder.record_failure("shard, record 3: damaged", ExitCode.USER, fingerprint(config, data))
    CHANGES[change](data)
    folder.check_failure([fingerprint(config, data)])
    assert not (folder.path / "failure.json").exists()


def test_data_that_nobody_touched_have_the_same_fingerprint(data: Path, tmp_path: Path) -> None:
    before = fingerprint(small_config(), data)
    (data / "shard").read_bytes()
    (data / "folder").mkdir()
    assert fingerprint(small_config(), data) == before
    assert fingerprint(small_config(), None) == fingerprint(small_config(), None) != before


def test_of_several_workers_one_that_sees_the_same_is_enough(folder: RunFolder) -> None:
    folder.record_failure("step 7: not finite", ExitCode.DIVERGED, "of worker 1")
    with pytest.raises(RecordedFailure, match="step 7: not finite") as caught:
        folder.check_failure(["of the chief", "of worker 1"])
    assert caught.value.exit_code == ExitCode.DIVERGED


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """Where the folder's checkpoints really lie."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    yield place


def test_what_a_killed_writer_left_is_swept_away(folder: RunFolder, elsewhere: Path) -> None:
    """Also behind a link: checkpoints may lie on another disk."""
    (folder.path / "checkpoints").symlink_to(elsewhere)
    for place in ("", "samples", "summaries/train", "checkpoints"):
        (folder.path / place).mkdir(parents=True, exist_ok=True)
        (folder.path / place / ".writing-123").write_text("torn")
    (folder.path / ".making-xyz").mkdir()
    folder._lock.close()
    RunFolder(folder.path).claim()
    left = [path for path in folder.path.rglob(".*") if path.name != ".lock"]
    assert left == []
    assert list(elsewhere.iterdir()) == []
