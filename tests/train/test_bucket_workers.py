"""Two workers with everything in a bucket: one lease, one writer, the same numbers as one process."""

import signal
import time
from pathlib import Path

import pytest

from tests.helpers.bucket.runs import arguments, copy_down, copy_up, listed
from tests.helpers.processes import run_trainer
from tests.helpers.runs import newest
from tests.helpers.workers import Workers
from trainer.storage.bucket import parse


@pytest.fixture
def data(bucket: str, sample_folder: Path) -> str:
    copy_up(sample_folder, f"{bucket}/data")
    return f"{bucket}/data"


@pytest.mark.slow
def test_two_workers_train_into_a_bucket_and_one_goes_on_alone(bucket: str, data: str, tmp_path: Path) -> None:
    settings = arguments(f"{bucket}/run", data, "train.steps=60", "model.norm=instance")
    workers = Workers(tmp_path / "logs", *settings)
    assert workers.codes() == {0: 0, 1: 0}, workers.log(0) + workers.log(1)
    assert "the chief has written everything to gs://" in workers.log(1)
    assert [entry["step"] for entry in listed(f"{bucket}/run")["checkpoints"]] == [45, 60]
    names = parse(f"{bucket}/run").listing()
    assert ".lease" not in names
    assert len([name for name in names if "tfevents" in name]) == 2, "only the chief writes events"
    alone = run_trainer(*arguments(f"{bucket}/run", data, "train.steps=75", "model.norm=instance"))
    assert alone.returncode == 0, alone.stderr
    assert "going on from the checkpoint of step 60" in alone.stderr


@pytest.mark.slow
def test_a_killed_worker_ends_the_chief_with_75_and_both_go_on(bucket: str, data: str, tmp_path: Path) -> None:
    settings = arguments(f"{bucket}/run", data, "train.steps=100000", "train.evaluate_every=0", "train.sample_every=0")
    workers = Workers(tmp_path / "logs", *settings)
    deadline = time.monotonic() + 120
    while (marker := newest(f"{bucket}/run")) is None or marker.step < 15:
        assert time.monotonic() < deadline, workers.log(0)
        time.sleep(0.1)
    workers.processes[1].kill()
    assert workers.codes(60) == {0: 75, 1: -signal.SIGKILL}
    saved = newest(f"{bucket}/run")
    assert saved
    again = Workers(tmp_path / "again", *settings, f"--set=train.steps={saved.step + 10}")
    assert again.codes() == {0: 0, 1: 0}, again.log(0) + again.log(1)
    assert f"going on from the checkpoint of step {saved.step}" in again.log(1)
    copy_down(f"{bucket}/run", tmp_path / "copy")


@pytest.mark.slow
def test_what_one_worker_finds_before_all_else_ends_all_of_them_at_once(bucket: str, data: str, tmp_path: Path) -> None:
    """Worker 1 reaches no bucket; the chief does not wait for it for a quarter of an hour."""
    settings = arguments(f"{bucket}/run", data, "runtime.bucket_patience_seconds=3")
    workers = Workers(tmp_path / "logs", *settings, only=(0,))
    workers.start(1, *settings, STORAGE_EMULATOR_HOST="http://127.0.0.1:9")
    assert workers.codes(60) == {0: 75, 1: 75}
    assert "the connection fails (tried for 3 s" in workers.last_line(1)
    assert "the connection fails (tried for 3 s" in workers.last_line(0)
    assert listed(f"{bucket}/run")["checkpoints"] == []
    assert ".lease" not in parse(f"{bucket}/run").listing()
