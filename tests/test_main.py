"""The command line: flags, help, one line for each mistake, exit codes. In this process, unless the start itself is meant."""

import errno
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.clock import assert_within
from tests.helpers.images import write_pairs
from tests.helpers.processes import finish, run_trainer, start_program
from tests.helpers.settings import SMALL, flags
from trainer import __main__ as entry
from trainer import cluster, startup
from trainer.arguments import COMMANDS, define_flags, parse
from trainer.commands import resolve
from trainer.config import Config
from trainer.errors import UserError
from trainer.help import help_text
from trainer.runtime.logs import Where
from trainer.storage.service import Patience


class Done(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


Trainer = Callable[..., Done]


@pytest.fixture
def trainer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    """`trainer ARGUMENTS` in this process, which is as before when the test is over."""
    handlers = {number: signal.getsignal(number) for number in startup.STOPS}
    monkeypatch.setattr(Patience, "seconds", Patience.seconds)
    ours = logging.getLogger("trainer")
    logs = ours.handlers, ours.level, ours.propagate

    def run(*arguments: str) -> Done:
        return Done(entry.told(["trainer", *arguments]), *capsys.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    ours.handlers, ours.level, ours.propagate = logs
    Where.worker, Where.workers = 0, 1


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


@pytest.mark.clock
@pytest.mark.parametrize(
    ("arguments", "environment"),
    [(["--help"], {}), (["--set", "train.setps=3"], {}), (["--config=nope.yaml"], {}), ([], {"TF_USE_LEGACY_KERAS": "1"})],
)
def test_an_answer_that_needs_no_tensorflow_comes_in_under_two_seconds(arguments: list[str], environment: dict[str, str]) -> None:
    began = time.monotonic()
    run_trainer(*arguments, cold=True, **environment)
    assert_within(0, time.monotonic() - began, 2)


def test_help_teaches(trainer: Trainer) -> None:
    done = trainer("--help")
    assert (done.code, done.err) == (0, "")
    for word in ("--data_dir", "train.checkpoint_every", "trainer --config=", "143"):
        assert word in done.out


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
        (
            ("--seed=1",),
            "trainer: trainer train takes no --seed (`trainer train --help` lists its flags); the setting is --set seed=...\n",
        ),
        (("evaluate",), "trainer: trainer evaluate needs --model_dir (`trainer evaluate --help` shows examples)\n"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(arguments: tuple[str, ...], line: str, trainer: Trainer) -> None:
    assert trainer(*arguments) == Done(2, "", line)


def test_legacy_keras_is_refused(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")
    line = "trainer: TF_USE_LEGACY_KERAS=1: this trainer is written for Keras 3; unset the variable\n"
    assert trainer() == Done(2, "", line)


def test_without_tensorflow_the_line_says_what_to_install(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    find = cluster.importlib.util.find_spec
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name, *rest: None if name == "tensorflow" else find(name))
    done = trainer()
    assert done.code == 2
    assert done.err.startswith("trainer: TensorFlow is not installed: pip install 'pix2pix-trainer[cpu]'")
    assert done.err.count("\n") == 1


def test_an_error_that_nobody_foresaw_ends_at_once_with_its_traceback() -> None:
    """Threads that still work, as those of an input pipeline do, are not waited for."""
    code = "import sys, threading, time; import trainer.__main__ as entry; entry.run = lambda argv: 1 / 0"
    code += "; threading.Thread(target=time.sleep, args=(60,)).start(); sys.argv = ['trainer']; entry.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_missing_data_leaves_nothing_behind(trainer: Trainer, tmp_path: Path) -> None:
    done = trainer(f"--data_dir={tmp_path}/nope", f"--model_dir={tmp_path}/run", "--dry_run")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"trainer: {tmp_path}/nope: no such data folder")
    assert list(tmp_path.iterdir()) == []


def test_dry_run_tells_networks_data_and_plan_and_writes_nothing(trainer: Trainer, tmp_path: Path) -> None:
    done = trainer("--dry_run", f"--model_dir={tmp_path}/run", "--set", "model.generator.filters=64")
    assert done.code == 0
    assert list(tmp_path.iterdir()) == []
    for line in (
        "generator: 54,414,531 parameters",
        "generator_down8                         1x1x512    4,194,816",
        "receptive field 70x70, 30x30 logits",
        "train         40 pairs",
        "1,400 steps of batch size 1",
    ):
        assert line in done.out


@pytest.mark.parametrize(("seconds", "verdict"), [("60", "fits"), ("1", "is too short")])
def test_a_dry_run_says_whether_a_stop_has_the_time_to_save(
    seconds: str, verdict: str, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each parameter a stop saves itself and two moments, in 4 bytes each."""
    monkeypatch.setenv("TRAINER_GRACE_SECONDS", seconds)
    done = trainer("--dry_run", *flags(tmp_path / "run", *SMALL))
    assert done.code == 0, done.err
    trained = sum(int(number.replace(",", "")) for number in re.findall(r"^\w+: ([\d,]+) parameters", done.out, re.MULTILINE))
    line = rf"  a stop saves {trained * 12 / 1e6:.0f} MB: about \d+\.\d s at the [\d,]+ MB/s measured here"
    assert re.search(line + rf"; the grace period of {seconds} s .* {verdict}", done.out)
    assert list(tmp_path.iterdir()) == []


def is_taken(command: str, flag: str) -> bool:
    value = {"split": "val", "labels": "both", "layout": "list", "inference": "paper", "checkpoint": "best", "strategy": "tpu"}
    switch = flag in ("skip_bad", "dry_run")
    number = flag in ("processes", "shard_mb", "seed")
    try:
        parse(["trainer", command, f"--{flag}" if switch else f"--{flag}={value.get(flag, 7 if number else 'x')}"])
    except UserError as error:
        assert "takes no" in str(error)
        return False
    return True


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_lists_the_flags_that_it_takes_and_no_others(command: str) -> None:
    everywhere = {"help", "version", "log_format"}
    names = [name for name in define_flags() if len(name) > 1 and name not in everywhere]
    listed = set(re.findall(r"^  --(\w+) ", help_text(define_flags(), command).partition("\nFlags:\n")[2], re.MULTILINE))
    taken = {name for name in names if is_taken(command, name)}
    assert taken == listed - everywhere if command != "train" else taken <= listed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_of_the_help_can_be_typed(command: str) -> None:
    examples = re.findall(r"^  (trainer .*?)(?:  .*)?$", help_text(define_flags(), command), re.MULTILINE)
    if command != "train":
        examples = [example for example in examples if example.split()[1] == command]
    assert len(examples) >= 2
    for example in examples:
        parse(shlex.split(example))


def test_help_after_a_command_is_that_of_the_command(trainer: Trainer) -> None:
    assert trainer("predict", "--help").out.startswith("trainer predict: ")
    assert trainer("--help").out.startswith("trainer [COMMAND] [flags]: ")


@pytest.mark.parametrize("flag", ["--help", "--log_format=json"])
def test_a_reader_who_is_gone_does_not_change_the_exit_code(flag: str) -> None:
    """As in `trainer ... | head`: the pipe has no reader any more, so that every write meets EPIPE."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "trainer", "--version", flag]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


STOPS_WITHOUT_A_READER = """
import os, sys
from trainer.__main__ import told
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 2)
sys.exit(told(["trainer", "--speed=3"]))
"""


def test_a_mistake_that_nobody_reads_of_keeps_its_exit_code() -> None:
    assert finish(start_program(STOPS_WITHOUT_A_READER)).returncode == 2


HANGS_UP = """
import os, signal, sys
from trainer.__main__ import main
from trainer.data import prepare
write_one, written = prepare.write_one, []

def hang_up(*given):
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGHUP)
    written.append(1)
    return write_one(*given)

prepare.write_one = hang_up
main()
"""


def test_prepare_goes_on_after_its_terminal_hung_up(tmp_path: Path) -> None:
    """It ends at once, as any program does; the same command goes on, and makes what it would have made."""
    write_pairs(tmp_path / "pictures", 9)
    command = ["prepare", f"--source={tmp_path}/pictures", "--split_percent=40,30,30", "--processes=1"]
    done = finish(start_program(HANGS_UP, *command, f"--output={tmp_path}/data"))
    assert done.returncode == -signal.SIGHUP
    assert not (tmp_path / "data" / "dataset.json").exists()
    assert run_trainer(*command, f"--output={tmp_path}/data").returncode == 0
    assert run_trainer(*command, f"--output={tmp_path}/whole/data").returncode == 0
    made = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("data", "whole/data")]
    assert made[0] == made[1]


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
    number: int, code: int, advice: str, monkeypatch: pytest.MonkeyPatch, trainer: Trainer
) -> None:
    def fails(argv: list[str]) -> str:
        raise OSError(number, os.strerror(number), "/x")

    monkeypatch.setattr(entry, "run", fails)
    user = f"{os.getuid()}:{os.getgid()}"
    assert trainer() == Done(code, "", f"trainer: /x: {os.strerror(number)}{advice.format(user)}\n")


def test_of_several_workers_only_the_chief_runs_another_command(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}'
    monkeypatch.setenv("TF_CONFIG", config)
    line = "worker 1: this command works in one process, the chief's; nothing to do here\n"
    assert trainer("evaluate", f"--model_dir={tmp_path}") == Done(0, line, "")


@pytest.mark.parametrize("number", startup.STOPS)
def test_a_stop_of_a_command_that_does_not_train_is_one_line(
    number: signal.Signals, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entry, "run", lambda argv: os.kill(os.getpid(), number))
    done = trainer("check")
    assert (done.code, done.out, done.err.count("\n")) == (143, "", 1)
    assert done.err.startswith(f"trainer: {number.name}: stopped; ")
