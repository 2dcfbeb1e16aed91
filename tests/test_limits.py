"""What a machine must give: measured on the paper's networks at 256x256, batch 1, in a real process."""

import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.processes import start_trainer

FULL = ("model.generator.filters=64", "model.discriminator.filters=64")
SETTINGS = ("train.steps=16", "train.checkpoint_every=8", "train.evaluate_every=8", "train.sample_every=8")


@pytest.mark.clock
@pytest.mark.slow
def test_memory_and_time_to_the_first_step(tmp_path: Path) -> None:
    """Under 3 GB with checkpoints, pictures and evaluation; under 20 s from the command to the first step."""
    began = time.monotonic()
    settings = (*FULL, *SETTINGS, "train.summary_every=1", "train.steps_per_loop=1")
    process = start_trainer(f"--model_dir={tmp_path}", *(f"--set={setting}" for setting in settings))
    peak, first = 0, 0.0
    while process.poll() is None:
        status = psutil.Process(process.pid)
        if status.status() != psutil.STATUS_ZOMBIE:
            peak = max(peak, status.memory_info().rss)
        if not first and list(tmp_path.glob("summaries/train/events*")):
            first = time.monotonic() - began
        time.sleep(0.05)
    assert process.returncode == 0
    print(f"peak memory {peak / 1e9:.2f} GB, first step after {first:.1f} s")
    assert peak < 3e9
    assert 0 < first < 20
