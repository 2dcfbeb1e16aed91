"""The first acts of a process: an answer to signals, TensorFlow without its noise and with our defaults."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import keras
import pytest
import tensorflow as tf

from tests.helpers.processes import ROOT, start_trainer
from trainer import startup

WAITS = """
import time
print("loading", flush=True)
time.sleep(60)
"""


CASES = [(module, form, number) for module in ("absl", "tensorflow") for form in ("text", "json") for number in startup.STOPS]
QUICK = {CASES[1], CASES[2], CASES[4], CASES[7]}  # each of both modules, forms and signals


@pytest.mark.parametrize(
    ("module", "log_format", "number"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_a_stop_while_something_is_imported_is_one_line(
    module: str, log_format: str, number: signal.Signals, tmp_path: Path
) -> None:
    """absl is among the first that are imported, TensorFlow the last, and with json in the child."""
    (tmp_path / f"{module}.py").write_text(WAITS)
    process = start_trainer(f"--log_format={log_format}", f"--model_dir={tmp_path}/run", PYTHONPATH=str(tmp_path))
    assert process.stdout is not None
    assert "loading" in process.stdout.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 143
    line = f"trainer: {number.name}: stopped; the same command begins again, or goes on from what is saved"
    if log_format == "text":
        assert (out, err) == ("", line + "\n")
    else:
        found = json.loads(out)
        assert list(found) == ["severity", "time", "step", "worker", "message"]
        assert (found["severity"], found["message"], err) == ("WARNING", line, "")


WAITS_FOR_A_LINE = """
import sys
print("loading", flush=True)
print("heard", sys.stdin.readline().strip(), flush=True)
"""


@pytest.mark.parametrize("module", ["absl", "tensorflow"])
def test_a_signal_that_is_ignored_stays_so(module: str, tmp_path: Path) -> None:
    """As in `nohup` and in the background of a shell's script: while something is imported it goes on."""
    (tmp_path / f"{module}.py").write_text(WAITS_FOR_A_LINE)
    program = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from trainer.__main__ import main; main()"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, "-c", program, f"--model_dir={tmp_path}/run"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate("a line\n", timeout=20)
    assert out.startswith("heard a line\n")
    assert process.returncode == 1  # what stood in for the module is no module
    assert "SIGINT" not in err


def test_noise_of_a_start_is_held_back_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    """In the order in which it came; what cannot wait comes at once."""
    lines = [b"before\n", b"I0000 oneDNN custom operations are on. You may see\n", b"W0000 no driver\n", b"after\n"]
    with startup._filtered_stderr() as stderr:
        for line in lines:
            os.write(2, line)
        assert capfd.readouterr().err == ""
        os.write(stderr, b"at once\n")
        assert capfd.readouterr().err == "at once\n"
    assert capfd.readouterr().err == "before\nW0000 no driver\nafter\n"


def test_what_was_held_back_comes_out_when_an_import_fails(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ImportError), startup._filtered_stderr():
        os.write(2, b"libfoo.so: cannot open\n")
        raise ImportError
    assert capfd.readouterr().err == "libfoo.so: cannot open\n"


def test_threads_of_libraries_take_no_stop_and_the_main_thread_takes_them_again() -> None:
    """Else the kernel could give a SIGTERM to a thread that cannot answer it, later, while the main one keeps it back."""
    found: list[set[signal.Signals]] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with startup._signals_for_one_thread(2):
        thread = threading.Thread(target=lambda: found.append(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
        thread.start()
        thread.join()
    assert set(startup.STOPS) <= found[0]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert "stop-while-loading" not in [thread.name for thread in threading.enumerate()]


def test_keras_and_tensorflow_have_the_defaults_that_this_code_is_written_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A keras.json in the user's home may say otherwise."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras.config.set_image_data_format("channels_first")
    keras.config.set_floatx("float16")
    tf.config.optimizer.set_experimental_options({"remapping": True})
    startup.load_tensorflow()
    assert (keras.config.image_data_format(), keras.config.floatx()) == ("channels_last", "float32")
    assert tf.config.optimizer.get_experimental_options()["remapping"] is False
    assert os.environ["KERAS_BACKEND"] == "tensorflow"


@pytest.mark.parametrize(
    ("argv", "asks"),
    [
        (["trainer", "--log_format=json"], True),
        (["trainer", "check", "--log_format", "json"], True),
        (["trainer", "--log_format=text"], False),
        (["trainer", "--log_format", "text", "json"], False),
        (["trainer", "json", "--log_format"], False),
        (["trainer"], False),
    ],
)
def test_lines_for_machines_are_seen_before_the_flags_are_parsed(argv: list[str], asks: bool) -> None:
    assert startup.asks_for_json(argv) is asks


@pytest.mark.parametrize(("value", "hidden"), [("", True), ("-1", True), ("0", False), ("0,1", False), (None, False)])
def test_gpus_may_be_hidden(value: str | None, hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert startup.gpus_are_hidden() is hidden


@pytest.mark.parametrize(
    ("told", "devices", "answers", "said"),
    [
        ({}, ["accel0"], True, ""),
        ({}, ["vfio/0"], True, ""),
        ({}, [], True, "no TPU is visible"),
        ({}, ["vfio/vfio", "accelerator"], True, "no TPU is visible"),
        ({}, ["accel0"], False, "the metadata server of Google Cloud does not answer"),
        ({"TPU_NAME": "local"}, [], False, "no TPU is visible"),
        ({"TPU_WORKER_ID": "0"}, [], False, ""),
        ({"TPU_SKIP_MDS_QUERY": "false"}, [], False, ""),
    ],
)
def test_libtpu_asks_for_a_tpu_only_where_there_can_be_an_answer(
    told: dict[str, str], devices: list[str], answers: bool, said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for name in devices:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    find, environment = startup._devices_of_a_tpu, dict(told)
    monkeypatch.setattr(startup, "_devices_of_a_tpu", lambda: find(tmp_path))
    monkeypatch.setattr(startup, "_metadata_server_answers", lambda: answers)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "libtpu" or None)
    monkeypatch.setattr("os.environ", environment)
    logging.getLogger("trainer").propagate = True
    startup.look_for_no_tpu_in_vain()
    assert environment == told | ({"TPU_SKIP_MDS_QUERY": "1"} if said else {})
    assert (said in caplog.text) if said else not caplog.records


def test_where_there_is_no_software_for_tpus_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {})
    startup.look_for_no_tpu_in_vain()
    assert os.environ == {}
