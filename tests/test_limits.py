"""What a machine must give: measured on the paper's networks at 256x256, batch 1, in real processes."""

import re
import time
from pathlib import Path

import pytest

from tests.helpers.clock import assert_within
from tests.helpers.processes import start_trainer
from tests.helpers.waiting import wait_until

FULL = ("model.generator.filters=64", "model.discriminator.filters=64")
SETTINGS = ("train.checkpoint_every=2", "train.evaluate_every=2", "train.sample_every=2", "train.summary_every=1")


def arguments(folder: Path, steps: int) -> list[str]:
    settings = (*FULL, *SETTINGS, f"train.steps={steps}", "train.steps_per_loop=1")
    return [f"--model_dir={folder}", *(f"--set={setting}" for setting in settings)]


def peak_bytes(pid: int) -> int:
    """The most memory that a process has held so far, as the system counts it; 0 when it has ended."""
    try:
        told = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(told[1]) * 1024 if told else 0


@pytest.mark.slow
def test_memory_of_a_run_with_checkpoints_pictures_and_evaluation(tmp_path: Path) -> None:
    process = start_trainer(*arguments(tmp_path, 2), cold=True)
    peaks = [0]

    def ended() -> bool:
        peaks.append(peak_bytes(process.pid))
        return process.poll() is not None

    try:
        wait_until(ended, seconds=900, what="the end of the run")
    finally:
        process.kill()
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "test L1" in out
    print(f"peak memory {max(peaks) / 1e9:.2f} GB")
    assert 1e9 < max(peaks) < 3e9


@pytest.mark.clock
@pytest.mark.slow
def test_time_to_the_first_step(tmp_path: Path) -> None:
    """Under 20 s from the command, with all that has to be imported."""
    began = time.monotonic()
    process = start_trainer(*arguments(tmp_path, 100), cold=True)
    try:
        wait_until(lambda: list(tmp_path.glob("summaries/train/events*")), process, what="the first step's summary")
        first = time.monotonic() - began
    finally:
        process.kill()
        process.communicate()
    print(f"first step after {first:.1f} s")
    assert_within(0, first, 20)
