"""Real signals to a real process that is deep in a TensorFlow call."""

import signal
import subprocess
import time

import pytest

from tests.helpers.clock import assert_within
from tests.helpers.processes import finish, start_program

PROGRAM = """
from trainer.startup import load_tensorflow
load_tensorflow()
import logging, sys, threading, time
import tensorflow as tf
from trainer.runtime.preemption import StopSignal
logging.basicConfig(level=logging.INFO, format="%(message)s")

def say(text):  # in one piece, for two threads speak
    sys.stdout.write(text + "\\n")
    sys.stdout.flush()

def spin(flag, steps):
    return tf.while_loop(lambda step: ~flag.read_value(), lambda step: [steps.assign_add(1)], [steps.read_value()])

def tell(steps):
    while steps.numpy() == 0:
        time.sleep(0.001)
    say("in the block")

with StopSignal(lambda: say("then")) as stop:
    steps = tf.Variable(0, dtype=tf.int64)
    compiled = tf.function(lambda: spin(stop.flag, steps), autograph=False).get_concrete_function()
    threading.Thread(target=tell, args=(steps,), daemon=True).start()
    compiled()
    say(f"left the block after {stop.received}")
    if "wait" in sys.argv:
        time.sleep(60)
say("restored")
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    """A process whose main thread is in a loop of TensorFlow's that only a signal can end."""
    process = start_program(PROGRAM, *arguments, merged=True)
    read_until(process, "in the block")
    return process


def read_until(process: subprocess.Popen[str], words: str) -> None:
    """Read lines until one has these words."""
    assert process.stdout is not None
    while words not in (line := process.stdout.readline()):
        assert line, f"{words!r} never came"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_block_of_steps(number: signal.Signals) -> None:
    process = start()
    process.send_signal(number)
    out = finish(process, 30).stdout
    said = f"{number.name}: stopping after this step and saving (Ctrl-C once more: leave at once)"
    assert sorted(out.splitlines()) == sorted([said, "then", f"left the block after {number.name}", "restored"])
    assert process.returncode == 0


@pytest.mark.clock
def test_a_signal_ends_a_block_of_steps_within_a_second() -> None:
    process = start()
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    read_until(process, "left the block")
    seconds = time.monotonic() - began
    finish(process, 30)
    assert_within(0, seconds, 1)


def test_a_wish_that_is_repeated_at_once_is_one_wish() -> None:
    """As `timeout` does, which signals the process and then its group."""
    process = start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
    out = finish(process, 30).stdout
    assert process.returncode == 0, out
    assert out.count("stopping after this step") == out.count("then\n") == out.count("left the block after") == 1
    assert "leaving at once" not in out


def test_a_later_ctrl_c_leaves_at_once() -> None:
    """Later is more than a second; a supervisor's SIGTERM may come as often as it likes."""
    process = start("wait")
    process.send_signal(signal.SIGTERM)
    read_until(process, "left the block")
    time.sleep(1.1)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    out = finish(process, 30).stdout
    assert process.returncode == 143
    assert "SIGINT again: leaving at once, without saving" in out
    assert "restored" not in out


HELD = """
from trainer.startup import load_tensorflow
load_tensorflow()
import os, signal, time
from trainer.runtime.preemption import StopSignal, hold_signals
hold_signals()
os.kill(os.getpid(), signal.SIGTERM)
signal.signal(signal.SIGTERM, lambda number, frame: None)  # as building a strategy does
with StopSignal() as stop:
    while not stop.received:
        time.sleep(0.02)
print(stop.received)
"""


def test_a_signal_that_comes_while_the_strategy_is_built_is_heard_afterwards() -> None:
    done = finish(start_program(HELD), 60)
    assert (done.returncode, done.stdout) == (0, "SIGTERM\n"), done.stderr
