import json
import os
import socket
from pathlib import Path

import pytest

from tests.helpers.settings import small_config
from trainer.errors import ExitCode, UserError
from trainer.runtime import run_folder
from trainer.runtime.run_folder import RecordedFailure, RunFolder, fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run").claim()


def test_second_process_is_kept_out_and_told_by_whom(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.3)
    with pytest.raises(UserError, match=rf"process {os.getpid()} on {socket.gethostname()} is training in it"):
        RunFolder(folder.path).claim()


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


def test_failure_is_told_again_until_config_or_data_change(folder: RunFolder, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "shard").write_bytes(b"bad")
    config = small_config()
    folder.record_failure("shard, record 3: damaged", ExitCode.USER, fingerprint(config, data))
    with pytest.raises(RecordedFailure, match=r"shard, record 3: damaged \(nothing has changed") as caught:
        folder.check_failure([fingerprint(config, data)])
    assert caught.value.exit_code == ExitCode.USER
    (data / "shard").write_bytes(b"good")
    folder.check_failure([fingerprint(config, data)])
    folder.check_failure([fingerprint(small_config("seed=3"), data)])


def test_what_a_killed_writer_left_is_swept_away(folder: RunFolder, tmp_path: Path) -> None:
    for place in ("", "samples", "summaries/train"):
        (folder.path / place).mkdir(parents=True, exist_ok=True)
        (folder.path / place / ".writing-123").write_text("torn")
    (folder.path / ".making-xyz").mkdir()
    folder._lock.close()
    RunFolder(folder.path).claim()
    left = [path for path in folder.path.rglob(".*") if path.name != ".lock"]
    assert left == []
