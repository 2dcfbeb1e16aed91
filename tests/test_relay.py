"""--log_format=json: every line of the process, from Python, C++ or a crash, as one object; signals and codes pass through."""

import json
import signal
import sys
from pathlib import Path

import pytest

from tests.conftest import SMALL, run_trainer, start_trainer
from trainer import relay
from trainer.relay import entries

FIELDS = ["severity", "time", "step", "worker", "message"]


def objects(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def flags(folder: Path, *overrides: str) -> list[str]:
    return [f"--model_dir={folder}", "--log_format=json", *(f"--set={setting}" for setting in (*SMALL, *overrides))]


def test_a_run_is_told_in_objects_and_nothing_else(tmp_path: Path) -> None:
    done = run_trainer(*flags(tmp_path / "run", "train.steps=12", "train.evaluate_every=6"))
    assert (done.returncode, done.stderr) == (0, "")
    lines = objects(done.stdout)
    assert all(list(line) == FIELDS for line in lines)
    assert {line["severity"] for line in lines} == {"INFO"}
    assert {line["worker"] for line in lines} == {0}
    assert [line["step"] for line in lines if "test L1" in str(line["message"])] == [12, 12]
    assert str(lines[-1]["message"]).startswith("test L1 ")


def test_a_mistake_is_the_last_object(tmp_path: Path) -> None:
    done = run_trainer(*flags(tmp_path / "run", "train.batch_size=99"))
    assert (done.returncode, done.stderr) == (2, "")
    last = objects(done.stdout)[-1]
    assert last["severity"] == "ERROR"
    assert str(last["message"]).startswith("trainer: ")
    wrong = run_trainer("--log_format=json", "--speed=3")
    assert (wrong.returncode, wrong.stderr) == (2, "")
    assert "--help" in str(objects(wrong.stdout)[-1]["message"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_passes_through_and_its_answer_comes_out(number: signal.Signals, tmp_path: Path) -> None:
    process = start_trainer(*flags(tmp_path / "run", "train.steps=100000", "train.evaluate_every=0", "train.checkpoint_every=5"))
    assert process.stdout is not None
    while "training on" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait(60) == 143
    assert f"trainer: {number.name}: stopped" in str(objects(rest)[-1]["message"])


CRASHES = """
import os, sys
sys.stderr.write("E0000 00:00:1795310650.782287    9332 port.cc:153] out of memory\\n")
sys.stderr.write("Traceback (most recent call last):\\n  File 'x', line 1\\n\\nValueError: no\\nafter\\n")
sys.stderr.flush()
os.abort()
"""


def test_a_process_that_dies_in_c_is_told_of(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(relay, "CHILD", CRASHES)
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    code = relay.relay([sys.argv[0]])
    for number, handler in old.items():
        signal.signal(number, handler)
    assert code == 128 + signal.SIGABRT
    lines = objects(capfd.readouterr().out)
    assert [(line["severity"], line["message"]) for line in lines] == [
        ("ERROR", "out of memory"),
        ("ERROR", "Traceback (most recent call last):\n  File 'x', line 1\n\nValueError: no"),
        ("INFO", "after"),
        ("CRITICAL", "trainer: SIGABRT ended the process; the same command goes on from what is saved"),
    ]


@pytest.mark.parametrize(
    ("line", "severity", "message"),
    [
        ("W0000 00:00:1795310650.782287    9332 port.cc:153] slow", "WARNING", "slow"),
        ("I1122 10:00:00.123456 140 logging.py:48] fine", "INFO", "fine"),
        ("F0000 00:00:1795310650.782287    9332 tensor.cc:7] check failed", "CRITICAL", "check failed"),
        ("trainer: --set x: no", "ERROR", "trainer: --set x: no"),
        ('{"a": 1}', "INFO", '{"a": 1}'),
        ("12", "INFO", "12"),
        ('{"severity": "WARNING", "message": "m", "step": 7, "worker": 1}', "WARNING", "m"),
    ],
)
def test_a_line_gets_the_severity_that_it_has(line: str, severity: str, message: str) -> None:
    (found,) = entries([line + "\n"])
    assert (found["severity"], found["message"]) == (severity, message)
