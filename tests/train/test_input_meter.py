"""The time that devices wait for input, against sleeps of known length on both sides of the queue between them."""

import logging
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers import events
from tests.helpers.clock import assert_within
from tests.helpers.ports import held_ports
from tests.helpers.processes import start_program
from tests.helpers.settings import SMALL, TINY, flags, small_config
from tests.helpers.workers import tf_config
from trainer.config import Config, load_config
from trainer.data.pipeline import PairData
from trainer.runtime.meter import Fed, InputWatch
from trainer.runtime.preemption import StopSignal
from trainer.train import block
from trainer.train.actions import Run
from trainer.train.state import LOSSES, TrainState
from trainer.train.step import StepResult

STEPS = 30
# Networks that take some 50 ms for a step: what it takes to hand a ready batch over, about 1 ms on a busy machine, is little.
SETTINGS = load_config(None, [*TINY, "train.batch_size=2", "train.steps=100"])
HEAVY = ("train.batch_size=8", "model.generator.filters=16", "model.discriminator.filters=16")


def sleeping(dataset: tf.data.Dataset, seconds: float, queue: int = 1) -> tf.data.Dataset:
    """The same elements, each so much later than the one before, made while some of them wait."""

    def sleep(_: Any) -> np.int64:
        time.sleep(seconds)
        return np.int64(0)

    def late(element: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        with tf.control_dependencies([tf.numpy_function(sleep, [element["index"]], tf.int64)]):
            return tf.nest.map_structure(tf.identity, element)

    return dataset.map(late).prefetch(queue)


def sleeping_step(seconds: float) -> Callable[..., StepResult]:
    """A step that takes a known time and leaves no weight changed."""

    def sleep(_: Any) -> np.float32:
        time.sleep(seconds)
        return np.float32(1.0)

    def step(state: TrainState, config: Config, batch: dict[str, tf.Tensor], clock: object, stop: tf.Tensor) -> StepResult:
        loss = tf.ensure_shape(tf.numpy_function(sleep, [batch["index"]], tf.float32), [])
        return StepResult(dict.fromkeys(LOSSES, loss), loss > 0, stop)

    return step


def wait_share(config: Config, data: PairData, batches: tf.data.Dataset, state: TrainState) -> tuple[float, float]:
    """The measured share of a block of steps, after a first block that is not looked at; and the block's seconds."""
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    state.step.assign(0)
    run = block.make_block(strategy, state, config, StopSignal(), iter(block.stamped(batches)))
    run(tf.constant(3, tf.int64))
    before, began = float(state.waited.numpy()), time.perf_counter()
    run(tf.constant(3 + STEPS, tf.int64))
    seconds = time.perf_counter() - began
    return (float(state.waited.numpy()) - before) / seconds, seconds


def ready(data: PairData) -> tf.data.Dataset:
    """One batch that costs nothing, again and again."""
    return data.training_batches(0, 1).cache().repeat()


@pytest.fixture(scope="module")
def data(sample_folder: Path) -> PairData:
    return PairData(sample_folder, SETTINGS)


@pytest.fixture(scope="module")
def state(data: PairData) -> TrainState:
    """Networks that the sleeping steps leave as they are, so that all of them may have the same."""
    return TrainState(SETTINGS, data.specs)


@pytest.mark.clock
@pytest.mark.parametrize(
    ("input_seconds", "step_seconds", "queue", "share"),
    [
        # Both work at the same time: what the input takes longer is waited for.
        pytest.param(0.05, 0.01, 1, 4 / 5, marks=pytest.mark.slow),
        pytest.param(0.06, 0.02, 1, 2 / 3, marks=pytest.mark.slow),
        (0.02, 0.01, 4, 1 / 2),
        (0.01, 0.03, 1, 0.0),  # the step is the slower one
    ],
)
def test_the_share_is_what_the_sleeps_say(
    input_seconds: float,
    step_seconds: float,
    queue: int,
    share: float,
    data: PairData,
    state: TrainState,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block, "train_step", sleeping_step(step_seconds))
    measured, _ = wait_share(SETTINGS, data, sleeping(ready(data), input_seconds, queue), state)
    assert_within(share - 0.06, measured, share + 0.06)


@pytest.mark.clock
@pytest.mark.slow
def test_under_a_real_step_it_is_what_the_step_leaves_of_the_time(sample_folder: Path) -> None:
    """The independent measure: how long the same steps take, before and after, with an input that is always ready."""
    config = small_config(*HEAVY)
    data = PairData(sample_folder, config)
    state = TrainState(config, data.specs)
    share, before = wait_share(config, data, ready(data).prefetch(4), state)
    assert_within(0, share, 0.05)
    share, seconds = wait_share(config, data, sleeping(ready(data), 2.5 * before / STEPS), state)
    _, after = wait_share(config, data, ready(data).prefetch(4), state)
    assert_within(1.0 - max(before, after) / seconds - 0.1, share, 1.0 - min(before, after) / seconds + 0.1)
    assert_within(0.4, share, 1)


def test_what_is_told_is_of_the_worker_that_waited_most_and_all_that_was_read(caplog: pytest.LogCaptureFixture) -> None:
    """Two workers of one run, whose sums are known; the chief alone says it."""
    logging.getLogger("trainer").propagate = True
    fed = [Fed(10.0, 0.2, 5e6), Fed(8.0, 4.0, 3e6)]
    told = [Run.judge_input(seen_by(index, fed)) for index in (0, 1)]
    assert told == [{"input/wait_share": 0.5, "input/mb_per_second": pytest.approx(8.0 / 8.0)}] * 2
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("input-bound: worker 1 waited for input for 50 % of the last 8 s, 1.0 MB/s were read; ")


def test_before_anything_is_measured_nothing_is_told() -> None:
    assert Run.judge_input(seen_by(0, [Fed(), Fed()])) == {}


def seen_by(index: int, fed: list[Fed]) -> Any:
    """What judging the input needs of a run, as one of its workers has it: the sum over the workers is that of the table."""
    table = np.array(fed)

    def add_up(values: np.ndarray) -> np.ndarray:
        rows = values.reshape(table.shape)
        np.testing.assert_array_equal(rows, np.where(np.arange(len(fed))[:, None] == index, table, 0.0))
        return table.ravel()

    workers = SimpleNamespace(size=len(fed), index=index, add_up=add_up)
    return SimpleNamespace(workers=workers, meter=SimpleNamespace(end_interval=lambda: fed[index]), input_watch=InputWatch())


SLOWED = """
import sys, time
from trainer.startup import load_tensorflow
load_tensorflow()
from trainer.data.shards import Shards
read, Shards.read = Shards.read, lambda self, number: (time.sleep({seconds}), read(self, number))[1]
from trainer.__main__ import main
sys.exit(main())
"""


def start(folder: Path, seconds: float, *settings: str, **environment: str) -> subprocess.Popen[str]:
    """The trainer in a process of its own, in which every record takes so much longer to read."""
    given = (*SMALL, "train.checkpoint_every=0", "train.sample_every=0", "train.evaluate_every=0", *settings)
    return start_program(SLOWED.format(seconds=seconds), *flags(folder, *given), **environment)


def lines_of(process: subprocess.Popen[str]) -> list[str]:
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return [line for line in err.splitlines() if "input" in line]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(found.step, found.value) for found in events.scalars(folder, measured=True) if found.tag == name]


@pytest.mark.clock
@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_whose_reading_is_slow_says_so_once(devices: int, tmp_path: Path) -> None:
    settings = ("train.batch_size=2", "train.steps=60", "train.summary_every=20", f"runtime.cpu_devices={devices}")
    lines = lines_of(start(tmp_path, 0.12, *settings))
    shares, speeds = scalars(tmp_path, "input/wait_share"), scalars(tmp_path, "input/mb_per_second")
    assert [step for step, _ in shares] == [step for step, _ in speeds] == [20, 40, 60]
    assert max(share for _, share in shares) <= 1.0
    assert_within(0.3, min(share for _, share in shares), 1.01)
    assert min(speed for _, speed in speeds) > 0.1
    (warning,) = (line for line in lines if "input-bound" in line)
    assert "the devices waited for input for" in warning
    assert "data.cache" in warning
    assert "MB/s" in lines[-1]
    assert "step 60/60" in lines[-1]


@pytest.mark.clock
@pytest.mark.slow
def test_a_run_whose_input_is_fast_has_no_such_line(tmp_path: Path) -> None:
    lines = lines_of(start(tmp_path, 0.0, *HEAVY, "train.steps=80", "train.summary_every=40"))
    (_, share) = scalars(tmp_path, "input/wait_share")[-1]
    assert_within(0, share, 0.1)
    assert [line for line in lines if "input-bound" in line] == []


@pytest.mark.clock
@pytest.mark.slow
def test_the_chief_tells_of_the_worker_that_waits_most(tmp_path: Path) -> None:
    """Worker 1 reads slowly; the chief, which waits for it inside the step, would not see that by itself."""
    settings = ("train.batch_size=2", "train.steps=60", "train.summary_every=30")
    with held_ports(2) as ports:
        running = [start(tmp_path, 0.3 * index, *settings, TF_CONFIG=tf_config(ports, index)) for index in (0, 1)]
        lines = [lines_of(process) for process in running]
    assert_within(0.3, min(share for _, share in scalars(tmp_path, "input/wait_share")), 1.01)
    assert [("worker 1 waited for input" in line) for line in lines[0] if "input-bound" in line] == [True]
    assert [line for line in lines[1] if "input-bound" in line] == []
