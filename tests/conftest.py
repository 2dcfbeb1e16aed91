"""What many tests need: the sample as shards, small configs, 64-bit arithmetic, the command as a real process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from trainer.config import Config, load_config
from trainer.startup import load_tensorflow

load_tensorflow()

import keras  # noqa: E402

from trainer.data.pipeline import PairData  # noqa: E402
from trainer.data.sample import ensure_sample  # noqa: E402
from trainer.runtime.checkpoints import Checkpoints  # noqa: E402
from trainer.trained import TrainedRun, open_run  # noqa: E402

# A shell gives what it starts in the background an ignored Ctrl-C, and children inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CLOCK_TRIES = 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What compares times may be disturbed by a busy machine; a real slowness fails every time."""
    for item in items:
        if item.get_closest_marker("clock"):
            item.add_marker(pytest.mark.flaky(reruns=CLOCK_TRIES - 1))


SMALL = (
    "data.image_size=[64,64]",
    "data.jitter=6",
    "model.generator.filters=4",
    "model.discriminator.filters=4",
    "model.discriminator.receptive_field=16",
)


def small_config(*overrides: str) -> Config:
    """Networks of four filters on 64x64 images: a step takes milliseconds."""
    return load_config(None, [*SMALL, *overrides])


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_sample(tmp_path_factory.mktemp("sample") / "data")


@pytest.fixture
def small_data(sample_folder: Path) -> PairData:
    return PairData(sample_folder, small_config("train.batch_size=2"))


@pytest.fixture
def float64() -> Iterator[None]:
    """Networks, losses and updates in double precision, where equality means more."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def start_trainer(*arguments: str, output: TextIO | None = None, **environment: str) -> subprocess.Popen[str]:
    """`trainer ARGUMENTS` as its own process; both its streams go to `output`, if that is given."""
    command = [sys.executable, "-m", "trainer", *arguments]
    out, err = (output, subprocess.STDOUT) if output else (subprocess.PIPE, subprocess.PIPE)
    return subprocess.Popen(command, stdout=out, stderr=err, text=True, env=dict(os.environ) | environment)


def run_trainer(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `trainer ARGUMENTS` to its end."""
    process = start_trainer(*arguments, **environment)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A run of 24 steps on the sample, its best evaluation at step 20 by decree."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    settings = (*SMALL, "train.steps=24", "train.evaluate_every=20", "train.sample_every=0", "optimizer.learning_rate=0.01")
    done = run_trainer(f"--model_dir={folder}", *(f"--set={setting}" for setting in settings))
    assert done.returncode == 0, done.stderr
    Checkpoints(folder / "checkpoints", 3).mark_best(20, 0.0)
    return open_run(folder)
