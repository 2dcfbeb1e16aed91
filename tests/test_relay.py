"""--log_format=json: every line of the process, from Python, C++ or a crash, as one object; signals and codes pass through."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers.damage import flip_in_record
from tests.helpers.processes import finish, is_running, run_trainer, start_program, start_trainer
from tests.helpers.runs import wait_for_step
from tests.helpers.settings import SMALL
from tests.helpers.waiting import wait_until
from trainer import relay
from trainer.relay import entries
from trainer.runtime.logs import Where, entry
from trainer.startup import STOPS

FIELDS = ["severity", "time", "step", "worker", "message"]


def objects(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def flags(folder: Path, *overrides: str) -> list[str]:
    return [f"--model_dir={folder}", "--log_format=json", *(f"--set={setting}" for setting in (*SMALL, *overrides))]


# The relay's child without the relay, which would start it cold; what the relay makes of its lines is `entries`.
CHILD = "import sys; from trainer.__main__ import told; sys.exit(told(sys.argv))"


def told_in_objects(*arguments: str, program: str = CHILD, **environment: str) -> tuple[int, list[dict[str, object]]]:
    done = finish(start_program(program, *arguments, merged=True, **environment))
    return done.returncode, list(entries(done.stdout.splitlines(keepends=True)))


@pytest.mark.slow
def test_a_run_is_told_in_objects_and_nothing_else(tmp_path: Path, where: None) -> None:
    settings = ("train.steps=12", "train.evaluate_every=6", "data.image_size=[32,32]")
    code, lines = told_in_objects(*flags(tmp_path / "run", *settings))
    assert code == 0, lines
    assert all(list(line) == FIELDS for line in lines)
    assert {line["severity"] for line in lines} == {"INFO"}
    assert {line["worker"] for line in lines} == {0}
    assert [line["step"] for line in lines if "test L1" in str(line["message"])] == [12, 12]
    assert str(lines[-1]["message"]).startswith("test L1 ")


def test_a_mistake_is_the_last_object(tmp_path: Path, where: None) -> None:
    code, lines = told_in_objects(*flags(tmp_path / "run", "train.batch_size=99"))
    assert (code, lines[-1]["severity"]) == (2, "ERROR")
    assert re.fullmatch(
        r"trainer: .+: train\.batch_size: got 99, allowed: up to the 40 training pairs", str(lines[-1]["message"])
    )


def test_a_wrong_flag_is_told_in_the_form_that_was_asked_for() -> None:
    wrong = run_trainer("--log_format=json", "--speed=3")
    assert (wrong.returncode, wrong.stderr) == (2, "")
    (last,) = objects(wrong.stdout)
    assert last["severity"] == "ERROR"
    assert "--help" in str(last["message"])


@pytest.mark.slow
def test_the_last_object_names_a_damaged_record_and_what_to_do(sample_folder: Path, tmp_path: Path, where: None) -> None:
    data = Path(shutil.copytree(sample_folder, tmp_path / "data"))
    damaged = flip_in_record(data, "train", 3)
    code, lines = told_in_objects(*flags(tmp_path / "run", "train.steps=40", "data.image_size=[32,32]"), f"--data_dir={data}")
    what = f"{damaged}: the record's checksum does not match its bytes"
    assert (code, lines[-1]["severity"]) == (2, "ERROR")
    assert lines[-1]["message"] == f"trainer: {what}; copy the shard again, or prepare the data again"


def wait_for_training(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    while "training on" not in process.stdout.readline():
        assert process.poll() is None


ENDLESS = ("train.steps=100000", "train.evaluate_every=0", "train.checkpoint_every=5")


@pytest.mark.slow
def test_a_signal_passes_through_and_its_answer_comes_out(tmp_path: Path) -> None:
    process = start_trainer(*flags(tmp_path / "run", *ENDLESS))
    wait_for_training(process)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    rest = process.stdout.read()
    assert process.wait(60) == 143
    last = objects(rest)[-1]
    assert "trainer: SIGTERM: stopped" in str(last["message"])
    assert last["severity"] == "WARNING"


# What the console script makes of its child, but for what a command does: it says who it is, and waits.
CHILD_THAT_WAITS = """
import os, sys, time
from trainer import __main__ as entry
entry.told = lambda argv: print(os.getpid(), flush=True) or time.sleep(600)
entry.relayed()
"""
RELAY_OF_IT = f"import sys; from trainer import relay; relay.CHILD = {CHILD_THAT_WAITS!r}; sys.exit(relay.relay(sys.argv))"


def test_when_the_relay_is_killed_its_child_ends() -> None:
    """It would go on training unseen, and hold the run's lock."""
    process = start_program(RELAY_OF_IT)
    assert process.stdout is not None
    child = int(json.loads(process.stdout.readline())["message"])
    assert is_running(child)
    process.kill()
    try:
        wait_until(lambda: not is_running(child), seconds=10, what="the end of the child")
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_a_run_whose_relay_was_killed_goes_on_with_the_same_command(tmp_path: Path) -> None:
    """The child saves as after any SIGTERM; the next one finds no lock."""
    process = start_trainer(*flags(tmp_path / "run", *ENDLESS))
    wait_for_training(process)
    wait_for_step(process, tmp_path / "run", 5)
    process.kill()
    process.communicate()
    done = run_trainer(*flags(tmp_path / "run", "train.steps=5"))
    assert done.returncode == 0, done.stdout
    assert any("going on from the checkpoint of step " in str(line["message"]) for line in objects(done.stdout))


CRASHES = """
import os, sys
sys.stderr.write("E0000 00:00:1795310650.782287    9332 port.cc:153] out of memory\\n")
sys.stderr.write("Check failed\\n    @ 0x1 main\\n")
sys.stderr.write("Traceback (most recent call last):\\n  File 'x', line 1\\n\\nValueError: no\\nafter\\n")
sys.stderr.flush()
os.abort()
"""


class Relayed:
    """The relay with a child of another program; what it says goes to stdout."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, program: str, *arguments: str) -> tuple[int, list[dict[str, object]]]:
        self.monkeypatch.setattr(relay, "CHILD", program)
        code = relay.relay([sys.argv[0], *arguments])
        return code, objects(self.capfd.readouterr().out)


@pytest.fixture
def where() -> Iterator[None]:
    """What lines say of step and worker is kept for lines that do not."""
    yield
    Where.step, Where.worker = None, 0


@pytest.fixture
def relayed(where: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Relayed]:
    old = {number: signal.getsignal(number) for number in STOPS}
    yield Relayed(monkeypatch, capfd)
    for number, handler in old.items():
        signal.signal(number, handler)


def test_a_process_that_dies_in_c_is_told_of(relayed: Relayed) -> None:
    code, lines = relayed(CRASHES)
    assert code == 128 + signal.SIGABRT
    assert [(line["severity"], line["message"]) for line in lines] == [
        ("ERROR", "out of memory"),
        ("ERROR", "Check failed"),
        ("ERROR", "    @ 0x1 main"),
        ("ERROR", "Traceback (most recent call last):\n  File 'x', line 1\n\nValueError: no"),
        ("INFO", "after"),
        ("CRITICAL", "trainer: SIGABRT ended the process; the same command goes on from what is saved"),
    ]


def test_a_process_that_is_killed_may_have_had_too_little_memory(relayed: Relayed) -> None:
    code, lines = relayed("import os; os.kill(os.getpid(), 9)")
    assert code == 137
    line = "trainer: SIGKILL ended the process; too little memory? raise the limit; the same command goes on from what is saved"
    assert [(found["severity"], found["message"]) for found in lines] == [("CRITICAL", line)]


HAS_NO_HANDLER = """
import os, signal, time
from trainer.relay import stop_with_the_relay
stop_with_the_relay()
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.kill(os.getppid(), {})
time.sleep(60)
"""


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_that_was_passed_on_is_a_stop_even_if_it_kills(number: signal.Signals, relayed: Relayed) -> None:
    code, lines = relayed(HAS_NO_HANDLER.format(int(number)))
    assert code == 143
    line = f"trainer: {number.name}: stopped; the same command begins again, or goes on from what is saved"
    assert [(found["severity"], found["message"]) for found in lines] == [("WARNING", line)]


GOES_ON = """
import sys
from trainer import relay
relay.CHILD = "import pathlib, sys; [print(n) for n in range(20000)]; pathlib.Path(sys.argv[1]).touch(); sys.exit(5)"
sys.exit(relay.relay(sys.argv))
"""


def test_a_reader_who_goes_away_does_not_end_the_child(tmp_path: Path) -> None:
    """As in `trainer --log_format=json | head -1`."""
    process = start_program(GOES_ON, str(tmp_path / "done"))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    assert (process.wait(60), "Traceback" in said) == (5, False), said
    assert (tmp_path / "done").exists()


LIBRARIES_SPEAK = """
import warnings
from trainer import commands
from trainer.__main__ import relayed
from trainer.runtime.logs import Where
begin = commands._begin

def begin_and_speak(values):
    begin(values)
    import tensorflow as tf
    from absl import logging
    Where.step, Where.worker = 7, 3
    logging.warning("absl warns")
    logging.error("absl fails\\nin two lines")
    tf.get_logger().warning("TensorFlow warns")
    tf.get_logger().error("TensorFlow fails")
    try:
        tf.io.read_file("/no/such/file")  # C++ warns
    except tf.errors.NotFoundError:
        pass
    warnings.warn("Python warns\\nin two lines")

commands._begin = begin_and_speak
relayed()
"""


@pytest.mark.slow
def test_lines_of_absl_and_of_tensorflow_are_one_object_each(where: None) -> None:
    """What C++ puts before its first line, whether that comes with the import or later, is none of them."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "1"}
    code, lines = told_in_objects("--dry_run", *flags(Path("nowhere")), program=LIBRARIES_SPEAK, **quiet)
    assert code == 0, lines
    assert all(list(line) == FIELDS for line in lines)
    told = [(line["severity"], line["step"], line["worker"], line["message"]) for line in lines]
    assert told[:4] == [
        ("WARNING", 7, 3, "absl warns"),
        ("ERROR", 7, 3, "absl fails\nin two lines"),
        ("WARNING", 7, 3, "TensorFlow warns"),
        ("ERROR", 7, 3, "TensorFlow fails"),
    ]
    severity, step, worker, message = told[4]
    assert (severity, step, worker) == ("WARNING", 7, 3)
    assert str(message).startswith("OP_REQUIRES failed at whole_file_read_ops.cc:")
    (of_python,) = [line[:3] for line in told if "UserWarning: Python warns\nin two lines" in str(line[3])]
    assert of_python == ("WARNING", 7, 3)


@pytest.mark.slow
def test_at_a_start_as_text_nobody_but_the_trainer_speaks(tmp_path: Path) -> None:
    settings = (f"--set={setting}" for setting in (*SMALL, "data.image_size=[32,32]", "train.steps=4", "train.evaluate_every=0"))
    done = run_trainer(f"--model_dir={tmp_path / 'run'}", *settings, cold=True)
    assert done.returncode == 0, done.stderr
    ours = ("strategy ", "training on ", "step ")
    assert [line for line in done.stderr.splitlines() if not line.startswith(ours)] == []


@pytest.mark.parametrize(
    ("line", "severity", "message"),
    [
        ("W0000 00:00:1795310650.782287    9332 port.cc:153] slow", "WARNING", "slow"),
        ("I1122 10:00:00.123456 140 logging.py:48] fine", "INFO", "fine"),
        ("F0000 00:00:1795310650.782287    9332 tensor.cc:7] check failed", "CRITICAL", "check failed"),
        ("2026-11-22 04:54:07.720684: W tensorflow/core/framework/op_kernel.cc:1855] slow", "WARNING", "slow"),
        ("2026-11-22 04:54:07.720684: E external/local_xla/xla/a-b.cc:7] no", "ERROR", "no"),
        ("trainer: --set x: no", "ERROR", "trainer: --set x: no"),
        ("trainer: SIGTERM: stopped; step 3 is saved", "WARNING", "trainer: SIGTERM: stopped; step 3 is saved"),
        ("trainer: a signal to another worker: stopped; x", "WARNING", "trainer: a signal to another worker: stopped; x"),
        ("ordinary WARNING: All", "INFO", "ordinary WARNING: All"),
        ('{"a": 1}', "INFO", '{"a": 1}'),
        ('{"severity": "ERROR", "message": "m"}', "INFO", '{"severity": "ERROR", "message": "m"}'),
        ("12", "INFO", "12"),
        ('{"severity": "WARNING", "time": "t", "step": 7, "worker": 1, "message": "m"}', "WARNING", "m"),
    ],
)
def test_a_line_gets_the_severity_that_it_has(line: str, severity: str, message: str, where: None) -> None:
    (found,) = entries([line + "\n"])
    assert (found["severity"], found["message"]) == (severity, message)


def said(*lines: str) -> list[tuple[str, str]]:
    return [(found["severity"], found["message"]) for found in entries(f"{line}\n" for line in lines)]


def test_what_cpp_puts_before_its_first_line_is_left_out(where: None) -> None:
    noise = "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR"
    assert said(noise, "W0000 00:00:1795310650.782287    9332 port.cc:153] slow") == [("WARNING", "slow")]


OWN = json.dumps(entry("INFO", "step 1"))


def test_an_object_inside_a_traceback_is_an_object_of_its_own(where: None) -> None:
    """Another thread's line, or one of C++."""
    traceback = ("Traceback (most recent call last):", "  File 'x', line 1", "ValueError: no")
    mixed = said(*traceback[:2], OWN, "W0000 00:00:1795310650.782287    9332 port.cc:153] slow", traceback[2])
    assert mixed == [("INFO", "step 1"), ("WARNING", "slow"), ("ERROR", "\n".join(traceback))]


def test_further_lines_have_the_severity_of_the_message_before(where: None) -> None:
    lines = ("E0000 00:00:1795310650.782287    9332 x.cc:1] no", "because", "of this", OWN, "a line")
    assert [severity for severity, _ in said(*lines)] == ["ERROR", "ERROR", "ERROR", "INFO", "INFO"]
    assert [severity for severity, _ in said("Fatal Python error: Aborted", "Current thread:")] == ["ERROR", "ERROR"]
