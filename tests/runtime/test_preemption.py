"""Real signals to a real process that is deep in a TensorFlow call."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import logging, time, sys
from trainer.startup import load_tensorflow
load_tensorflow()
import tensorflow as tf
from trainer.runtime.preemption import StopSignal
logging.basicConfig(level=logging.INFO, format="%(message)s")

def spin(flag):
    count = tf.constant(0)
    while (count < 100_000_000) & ~flag:
        count += 1
    return count

with StopSignal() as stop:
    compiled = tf.function(lambda: spin(stop.flag)).get_concrete_function()
    print("ready", flush=True)
    compiled()
    print(f"left the block after {stop.received}", flush=True)
    if "wait" in sys.argv:
        time.sleep(30)
print("restored")
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(program), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    while "ready" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.3)
    return process


@pytest.mark.clock
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_a_block_of_steps_within_a_second(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path)
    began = time.monotonic()
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert f"left the block after {number.name}" in out
    assert "restored" in out
    assert process.returncode == 0
    assert time.monotonic() - began < 2  # with the interpreter's own end


def test_a_wish_that_is_repeated_at_once_is_one_wish(tmp_path: Path) -> None:
    """As `timeout` does, which signals the process and then its group."""
    process = start(tmp_path)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "left the block after" in out


@pytest.mark.clock
def test_later_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, "wait")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < 1
    assert process.returncode == 143
    assert "SIGINT again: leaving at once, without saving" in out


HELD = """
import os, signal, time
from trainer.startup import load_tensorflow
load_tensorflow()
from trainer.runtime.preemption import StopSignal, hold_signals
hold_signals()
os.kill(os.getpid(), signal.SIGTERM)
signal.signal(signal.SIGTERM, lambda number, frame: None)  # as building a strategy does
with StopSignal() as stop:
    for _ in range(100):
        if stop.received: break
        time.sleep(0.02)
print(stop.received)
"""


def test_a_signal_that_comes_while_the_strategy_is_built_is_heard_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "SIGTERM\n"), done.stderr
