import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import run_trainer, start_trainer
from trainer import __main__ as entry
from trainer import startup
from trainer.arguments import FLAGS_OF, define_flags, parse
from trainer.commands import resolve
from trainer.config import Config
from trainer.errors import UserError
from trainer.help import help_text


def test_list_of_flags_is_frozen() -> None:
    names = {name for name in define_flags() if len(name) > 1}
    assert names == {
        "config", "set", "strategy", "data_dir", "model_dir", "dry_run", "help", "version",
        "source", "layout", "labels", "split_percent", "shard_mb", "processes", "skip_bad", "base_url",
        "thumbnails", "split", "inference", "checkpoint", "input", "output", "seed", "formats", "log_format",
    }  # fmt: skip


def test_train_is_the_command_when_none_is_named() -> None:
    assert parse(["trainer"])[0] == parse(["trainer", "train"])[0] == "train"


def test_without_flags_it_is_the_sample_into_runs() -> None:
    config, model_dir = resolve(parse(["trainer"])[1])
    assert model_dir == Path("runs/sample")
    assert config.data.dir == ""
    assert config.model.generator.filters == 24


def test_data_dir_alone_takes_the_papers_defaults() -> None:
    config, model_dir = resolve(parse(["trainer", "--data_dir=/some/where else"])[1])
    assert config == Config(data={"dir": "/some/where else"})  # type: ignore[arg-type]
    assert model_dir == Path("runs/run")


@pytest.mark.parametrize("flag", ["--data_dir=gs:/bucket/x", "--model_dir=gs:bucket/x", "--set=data.dir=s3://b/x"])
def test_what_looks_like_an_address_never_becomes_a_local_folder(flag: str) -> None:
    with pytest.raises(UserError, match="allowed: a folder of this machine, or gs://BUCKET/FOLDER"):
        resolve(parse(["trainer", flag])[1])


def quick(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    began = time.monotonic()
    done = run_trainer(*arguments, **environment)
    return done, time.monotonic() - began


@pytest.mark.clock
def test_help_teaches_in_under_two_seconds() -> None:
    done, seconds = quick("--help")
    assert done.returncode == 0
    assert seconds < 2
    for word in ("--data_dir", "train.checkpoint_every", "trainer --config=", "143"):
        assert word in done.stdout


@pytest.mark.clock
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--set", "train.setps=3"), "trainer: --set train.setps=3: unknown key train.setps; did you mean train.steps?\n"),
        (("--config=nope.yaml",), "trainer: nope.yaml: no such config file\n"),
        (
            ("trian",),
            "trainer: unknown command 'trian'; allowed: train, prepare, check, evaluate, predict, export (`trainer --help`)\n",
        ),
        (
            ("--confg=x",),
            "trainer: Unknown command line flag 'confg'. Did you mean: config ? (`trainer --help` lists the flags)\n",
        ),
    ],
)
def test_wrong_input_is_one_line_exit_2_in_under_two_seconds(arguments: tuple[str, ...], line: str) -> None:
    done, seconds = quick(*arguments)
    assert (done.returncode, done.stderr, done.stdout) == (2, line, "")
    assert seconds < 2


@pytest.mark.clock
def test_legacy_keras_is_refused_at_once() -> None:
    done, seconds = quick(TF_USE_LEGACY_KERAS="1")
    assert done.returncode == 2
    assert done.stderr == "trainer: TF_USE_LEGACY_KERAS=1: this trainer is written for Keras 3; unset the variable\n"
    assert seconds < 2


def test_without_tensorflow_the_line_says_what_to_install() -> None:
    """Imports of TensorFlow are blocked in a real process, as if it were not there."""
    hide = "u.find_spec = lambda name, *rest: None if name == 'tensorflow' else find(name, *rest)"
    code = f"import sys, importlib.util as u; find = u.find_spec; {hide}; sys.argv = ['trainer']"
    code += "; import trainer.__main__ as entry; entry.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("trainer: TensorFlow is not installed: pip install 'pix2pix-trainer[cpu]'")
    assert done.stderr.count("\n") == 1


def test_an_error_that_nobody_foresaw_ends_at_once_with_its_traceback() -> None:
    """Threads that still work, as those of an input pipeline do, are not waited for."""
    code = "import sys, threading, time; import trainer.__main__ as entry; entry.run = lambda argv: 1 / 0"
    code += "; threading.Thread(target=time.sleep, args=(60,)).start(); sys.argv = ['trainer']; entry.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_missing_data_leaves_nothing_behind(tmp_path: Path) -> None:
    done = run_trainer(f"--data_dir={tmp_path}/nope", f"--model_dir={tmp_path}/run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"trainer: {tmp_path}/nope: no such data folder")
    assert list(tmp_path.iterdir()) == []


def test_dry_run_tells_networks_data_and_plan_and_writes_nothing(tmp_path: Path) -> None:
    done = run_trainer("--dry_run", f"--model_dir={tmp_path}/run", "--set", "model.generator.filters=64")
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []
    for line in (
        "generator: 54,414,531 parameters",
        "generator_down8                         1x1x512    4,194,816",
        "receptive field 70x70, 30x30 logits",
        "train         40 pairs",
        "1,400 steps of batch size 1",
    ):
        assert line in done.stdout


def test_help_of_a_command_lists_its_flags_and_no_others() -> None:
    for command, names in FLAGS_OF.items():
        text = help_text(define_flags(), command)
        assert [name for name in names if f"  --{name} " not in text] == []
    assert "--thumbnails" not in help_text(define_flags(), "predict")


def test_a_flag_of_another_command_is_refused() -> None:
    with pytest.raises(UserError, match="trainer evaluate takes no --seed"):
        parse(["trainer", "evaluate", "--model_dir=x", "--seed=3"])


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    """As in `trainer --help | head -1`, with so much output that the pipe is full."""
    command = f"{sys.executable} -m trainer --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("trainer [COMMAND]")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flag", ["--version", "--log_format=json"])
def test_a_reader_who_is_gone_does_not_change_the_exit_code(flag: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "trainer", "--version", flag]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


SLOW = """
import time
print("loading", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", startup.STOPS)
@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("module", ["absl", "tensorflow"])
def test_a_stop_while_something_is_imported_is_one_line(
    module: str, log_format: str, number: signal.Signals, tmp_path: Path
) -> None:
    """absl is among the first that are imported, TensorFlow the last, and with json in the child."""
    (tmp_path / f"{module}.py").write_text(SLOW)
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


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """As in `nohup` and in the background of a shell's script."""
    (tmp_path / "absl.py").write_text(SLOW)
    program = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from trainer.__main__ import main; main()"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.kill()
    process.communicate()


@pytest.fixture
def handlers() -> Iterator[None]:
    old = {number: signal.getsignal(number) for number in startup.STOPS}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


ADVICE = "; let user {} read and write there, or choose another place"


@pytest.mark.parametrize(
    ("number", "code", "advice"),
    [
        (errno.EACCES, 2, ADVICE),
        (errno.EPERM, 2, ADVICE),
        (errno.EROFS, 2, ADVICE),
        (errno.ENOSPC, 1, ""),
        (errno.EIO, 1, ""),
    ],
)
def test_an_error_of_the_system_is_a_line_with_advice(
    number: int, code: int, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], handlers: None
) -> None:
    def fails(argv: list[str]) -> str:
        raise OSError(number, os.strerror(number), "/x")

    monkeypatch.setattr(entry, "run", fails)
    assert entry.told(["trainer"]) == code
    user = f"{os.getuid()}:{os.getgid()}"
    assert capsys.readouterr().err == f"trainer: /x: {os.strerror(number)}{advice.format(user)}\n"


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


def test_of_several_workers_only_the_chief_runs_another_command(tmp_path: Path) -> None:
    config = '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}'
    done = run_trainer("evaluate", f"--model_dir={tmp_path}", TF_CONFIG=config)
    assert done.returncode == 0
    assert done.stdout == "worker 1: this command works in one process, the chief's; nothing to do here\n"


def test_a_flag_that_is_a_setting_is_pointed_to() -> None:
    done = run_trainer("--seed=1")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("lists its flags); the setting is --set seed=...")


@pytest.mark.parametrize(("seconds", "verdict"), [("60", "fits"), ("1", "is too short")])
def test_a_dry_run_says_whether_a_stop_has_the_time_to_save(seconds: str, verdict: str, tmp_path: Path) -> None:
    done = run_trainer("--dry_run", f"--model_dir={tmp_path}/run", TRAINER_GRACE_SECONDS=seconds)
    assert done.returncode == 0, done.stderr
    line = (
        rf"  a stop saves 97 MB: about \d+\.\d s at the [\d,]+ MB/s measured here; the grace period of {seconds} s .* {verdict}"
    )
    assert re.search(line, done.stdout)
    assert list(tmp_path.iterdir()) == []
