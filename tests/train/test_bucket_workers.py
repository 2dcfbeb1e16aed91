"""Two workers with everything in a bucket: one lease, one writer, the same bits as two workers with everything here."""

import signal
from pathlib import Path

import pytest

from tests.helpers.bucket.runs import assert_same, copy_up, keys, listed
from tests.helpers.runs import newest_step, short
from tests.helpers.workers import NOTICED_SOON, Workers
from trainer.storage.bucket import parse

DIES_AT_12 = """
import os, signal
from trainer.train import loop
run_block = loop.run_block

def run_block_or_die(run, block, step):
    if step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return run_block(run, block, step)

loop.run_block = run_block_or_die
"""


@pytest.fixture
def data(bucket: str, sample_folder: Path) -> str:
    copy_up(sample_folder, f"{bucket}/data")
    return f"{bucket}/data"


@pytest.mark.slow
def test_a_killed_worker_ends_the_chief_with_75_and_both_go_on_to_what_two_leave_on_a_disk(
    bucket: str, data: str, run_of_two: Path, tmp_path: Path
) -> None:
    url = f"{bucket}/run"
    arguments = [*short(url), f"--data_dir={data}"]
    workers = Workers(tmp_path / "logs", only=())
    for index, dies in enumerate(("", DIES_AT_12)):
        workers.start(index, *arguments, first=NOTICED_SOON + dies)
    assert workers.codes() == {0: 75, 1: -signal.SIGKILL}, workers.log(0)
    saved = newest_step(url)
    assert 7 <= saved <= 12
    again = Workers(tmp_path / "again", *arguments)
    assert again.codes() == {0: 0, 1: 0}, again.log(0) + again.log(1)
    assert f"going on from the checkpoint of step {saved}" in again.log(1)
    assert again.last_line(1) == f"worker 1 is done; the chief has written everything to {url}"
    assert ".lease" not in " ".join(keys(url))
    assert_same(url, run_of_two, tmp_path / "copy")


def test_what_one_worker_finds_before_all_else_ends_all_of_them_at_once(bucket: str, data: str, tmp_path: Path) -> None:
    """Worker 1 reaches no bucket; the chief does not wait for it for a quarter of an hour."""
    arguments = [*short(f"{bucket}/run", "runtime.bucket_patience_seconds=1"), f"--data_dir={data}"]
    workers = Workers(tmp_path / "logs", *arguments, only=(0,))
    workers.start(1, *arguments, STORAGE_EMULATOR_HOST="http://127.0.0.1:9")
    assert workers.codes(60) == {0: 75, 1: 75}
    assert "the connection fails (tried for 1 s" in workers.last_line(1)
    assert workers.last_line(0) == workers.last_line(1).replace("trainer: ", "trainer: worker 1: ", 1)
    assert listed(f"{bucket}/run")["checkpoints"] == []
    assert ".lease" not in parse(f"{bucket}/run").listing()
