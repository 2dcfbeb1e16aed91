"""Whole runs as real processes: killed, stopped, resumed, diverged, finished."""

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.damage import flip_in_record
from tests.helpers.events import scalars
from tests.helpers.processes import finish, run_trainer, start_program, start_trainer
from tests.helpers.runs import STEPS, arguments, assert_same_run, contents, newest, wait_for_step
from trainer.data import records
from trainer.runtime.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_trainer(*arguments(folder))
    assert done.returncode == 0, done.stderr
    return folder


def test_killed_at_three_random_moments_it_ends_with_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    """Weights, moments, losses' sums, metrics, pictures and scalars, dropout on; SIGKILL leaves no time for anything."""
    folder, moments = tmp_path / "run", random.Random(20161121)
    for after in (70, 140, 175):
        process = start_trainer(*arguments(folder))
        wait_for_step(process, folder, after)
        time.sleep(moments.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL, "it was over before the kill"
    done = run_trainer(*arguments(folder))
    assert done.returncode == 0, done.stderr
    assert "going on from the checkpoint of step" in done.stderr
    assert_same_run(folder, undisturbed)


@pytest.mark.clock
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_stopped_by_a_signal_it_saves_and_ends_with_the_same_bits(
    number: signal.Signals, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start_trainer(*arguments(folder))
    wait_for_step(process, folder, 105)
    began = time.monotonic()
    process.send_signal(number)
    assert process.stderr is not None
    while f"{number.name}: stopping after this step" not in (line := process.stderr.readline()):
        assert line, "the signal was not seen"
    assert time.monotonic() - began < 1
    err = process.stderr.read()  # not communicate(): it would miss what readline has buffered
    assert process.wait(timeout=30) == 143
    assert time.monotonic() - began < 5
    last = err.strip().splitlines()[-1]
    saved = re.fullmatch(
        rf"trainer: {number.name}: stopped; step (\d+) is saved in {folder}; the same command goes on from there", last
    )
    marker = newest(folder)
    assert saved, last
    assert marker is not None
    assert marker.step == int(saved[1]) >= 105
    assert run_trainer(*arguments(folder)).returncode == 0
    assert_same_run(folder, undisturbed)


@pytest.mark.slow
def test_blocks_of_any_length_give_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    done = run_trainer(*arguments(tmp_path / "run", "train.steps_per_loop=7", "data.cache=memory"))
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_run_leaves_what_the_readme_says(undisturbed: Path) -> None:
    assert {path.name for path in undisturbed.iterdir()} == {
        ".lock", "config.yaml", "checkpoints", "summaries", "samples", "metrics.jsonl", "data", "data.json"
    }  # fmt: skip
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(50, STEPS + 1, 50), STEPS]
    assert list(lines[0]) == ["step", "split", "images", "l1", "psnr", "ssim"]
    assert [line["split"] for line in lines] == ["val"] * 8 + ["test"]
    assert lines[-1]["l1"] < lines[0]["l1"], "400 steps make the pictures better"
    best = json.loads((undisturbed / "checkpoints" / "best.json").read_text())
    assert best["val_l1"] == min(line["l1"] for line in lines[:-1])
    kept = [marker.step for marker in Checkpoints(undisturbed / "checkpoints", 2).markers()]
    assert kept == sorted({best["step"], *kept[-2:]})
    assert kept[-1] == STEPS
    tags = {tag for _, tag, _ in scalars(undisturbed)}
    assert tags == {"loss/discriminator", "loss/generator_gan", "loss/l1", "l1", "psnr", "ssim"}


def test_finished_run_says_so_and_changes_nothing(undisturbed: Path) -> None:
    before = contents(undisturbed)
    began = time.monotonic()
    done = run_trainer(*arguments(undisturbed))
    assert done.returncode == 0
    assert time.monotonic() - began < 10
    assert done.stdout.startswith("this run is finished; raise train.steps to go on\n")
    assert re.search(r"^test L1 \d+\.\d of 255$", done.stdout, re.MULTILINE)
    assert contents(undisturbed) == before


def test_other_settings_are_refused_and_more_steps_are_not(undisturbed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    refused = run_trainer(*arguments(folder, "model.norm=instance", "data.mirror=false"))
    assert refused.returncode == 2
    assert "config.yaml: data.mirror: True in the run, False now" in refused.stderr
    assert "config.yaml: model.norm: 'batch' in the run, 'instance' now" in refused.stderr
    longer = run_trainer(*arguments(folder, f"train.steps={STEPS + 10}"))
    marker = newest(folder)
    assert longer.returncode == 0, longer.stderr
    assert marker is not None
    assert marker.step == STEPS + 10


@pytest.mark.slow
def test_damaged_newest_checkpoint_falls_back_and_ends_with_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    path = next((folder / "checkpoints").glob(f"step-{STEPS:08d}-*.data*"))
    path.write_bytes(path.read_bytes()[:-1])
    done = run_trainer(*arguments(folder))
    assert done.returncode == 0, done.stderr
    assert f"warning: checkpoint of step {STEPS} is damaged" in done.stderr
    assert_same_run(folder, undisturbed)


def test_divergence_ends_with_3_keeps_the_last_good_and_is_not_replayed(tmp_path: Path) -> None:
    """A learning rate that overflows within a few steps of the first checkpoint."""
    folder = tmp_path / "run"
    flags = arguments(folder, "optimizer.learning_rate=1e25", "train.checkpoint_every=1", "train.evaluate_every=0")
    done = run_trainer(*flags)
    assert done.returncode == 3
    last = done.stderr.strip().splitlines()[-1]
    found = re.match(
        r"trainer: step (\d+): a loss or gradient is not finite \(discriminator \S+, generator_gan \S+, l1 \S+\); ", last
    )
    assert found, last
    marker = newest(folder)
    assert (marker.step if marker else 0) == int(found[1]) - 1
    began = time.monotonic()
    again = run_trainer(*flags)
    assert again.returncode == 3
    assert time.monotonic() - began < 10
    assert last in again.stderr


def test_damaged_record_ends_with_2_and_names_shard_and_record(sample_folder: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(sample_folder, tmp_path / "data"))
    shard = records.read_manifest(data).splits["train"][1]
    damaged = flip_in_record(data, "train", 27)
    done = run_trainer(*arguments(tmp_path / "run"), f"--data_dir={data}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"trainer: {damaged}: the record's checksum")
    assert "Traceback" not in done.stderr
    shutil.copy(sample_folder / shard.file, data / shard.file)
    assert run_trainer(*arguments(tmp_path / "run", "train.steps=40"), f"--data_dir={data}").returncode == 0


def test_other_data_are_refused(undisturbed: Path, sample_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    data = Path(shutil.copytree(sample_folder, tmp_path / "data"))
    manifest = records.read_manifest(data)
    records.write_manifest(data, manifest.model_copy(update={"splits": manifest.splits | {"train": manifest.splits["val"]}}))
    done = run_trainer(*arguments(folder, f"train.steps={STEPS + 1}"), f"--data_dir={data}")
    assert done.returncode == 2
    assert "was trained on other data" in done.stderr


@pytest.mark.slow
def test_damaged_record_in_val_names_shard_and_record(sample_folder: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(sample_folder, tmp_path / "data"))
    damaged = flip_in_record(data, "val", 5)
    done = run_trainer(*arguments(tmp_path / "run"), f"--data_dir={data}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"trainer: {damaged}: the record's checksum")
    assert "Traceback" not in done.stderr


EVERY_STEP = (
    "train.steps=120",
    "train.summary_every=1",
    "train.evaluate_every=30",
    "train.checkpoint_every=0",
    "train.keep=1",
)


@pytest.mark.slow
def test_stopped_where_something_is_due_it_is_done_once_after_the_resume(tmp_path: Path) -> None:
    """Scalars are due after every step, so every stop leaves a step to be finished; no checkpoint is asked for."""
    whole = tmp_path / "whole"
    assert run_trainer(*arguments(whole, *EVERY_STEP)).returncode == 0
    for attempt in range(5):  # a signal that comes while something is done for a step is heard after it
        folder = tmp_path / f"run-{attempt}"
        process = start_trainer(*arguments(folder, *EVERY_STEP))
        wait_for_step(process, folder, 30)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        marker = newest(folder)
        assert process.returncode == 143
        assert marker is not None
        if marker.pending:
            break
    assert marker.pending
    done = run_trainer(*arguments(folder, *EVERY_STEP))
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, whole)
    marker = newest(folder)
    assert marker is not None
    assert (marker.step, marker.pending) == (120, False), "the last step is saved though no checkpoint was asked for"


DIES_AT_A_WRITE = """
import os, sys
from trainer.runtime import files
whole, count = files.sync, 0
def counting(path):
    global count
    count += 1
    if count == int(os.environ["DIE_AT"]):
        os._exit(9)
    whole(path)
files.sync = counting
from trainer.__main__ import main
main()
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dead_at_any_write_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    """The process ends at its n-th write of a file, for each n of a short run, and is started again until it is done."""
    settings = (
        "train.steps=24",
        "train.summary_every=4",
        "train.evaluate_every=6",
        "train.checkpoint_every=5",
        "train.keep=1",
    )
    whole = tmp_path / "whole"
    assert run_trainer(*arguments(whole, *settings)).returncode == 0
    for die_at in range(3, 60, 4):
        folder = tmp_path / f"run-{die_at}"
        died = finish(start_program(DIES_AT_A_WRITE, *arguments(folder, *settings), DIE_AT=str(die_at)))
        assert died.returncode in (9, 0)
        done = run_trainer(*arguments(folder, *settings))
        assert done.returncode == 0, done.stderr
        assert_same_run(folder, whole)
        assert list(folder.rglob(".writing-*")) == list(folder.rglob("*_temp")) == []
        if died.returncode == 0:
            break
