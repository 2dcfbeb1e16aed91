import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import run_trainer
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


@pytest.mark.parametrize("flag", ["--data_dir=gs://bucket/x", "--model_dir=gs://bucket/x", "--set=data.dir=gs://b/x"])
def test_a_bucket_is_refused_and_never_becomes_a_local_folder(flag: str) -> None:
    with pytest.raises(UserError, match="local folders only"):
        resolve(parse(["trainer", flag])[1])


def quick(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    began = time.monotonic()
    done = run_trainer(*arguments, **environment)
    return done, time.monotonic() - began


def test_help_teaches_in_under_two_seconds() -> None:
    done, seconds = quick("--help")
    assert done.returncode == 0
    assert seconds < 2
    for word in ("--data_dir", "train.checkpoint_every", "trainer --config=", "143"):
        assert word in done.stdout


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
