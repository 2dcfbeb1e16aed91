"""Whole runs as real processes: killed, stopped, resumed, diverged, finished."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.clock import assert_within
from tests.helpers.damage import flip_in_record
from tests.helpers.deaths import Moment, end_at, files_of, restore_all, states_of
from tests.helpers.events import scalars
from tests.helpers.processes import finish, run_trainer, start_program, start_trainer
from tests.helpers.runs import (
    LITTLE,
    SHORT_STEPS,
    assert_same_run,
    contents,
    last_line,
    newest,
    newest_step,
    short,
    train_a_little,
    wait_for_step,
)  # fmt: skip
from tests.helpers.settings import TINY, flags
from trainer.runtime.checkpoints import Checkpoints
from trainer.trained import TrainedRun

LOOP, ACTIONS = "trainer.train.loop", "trainer.train.actions"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone, which all others must equal; leave it as it is."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_trainer(*short(folder))
    assert done.returncode == 0, done.stderr
    return folder


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def dense(folder: Path) -> list[str]:
    """The short run in blocks that end where something is due: after steps 4, 7, 8, 10, 12, 14, 16, 20 and so on."""
    return short(folder, "train.steps_per_loop=10")


def test_killed_in_an_evaluation_it_ends_with_the_same_bits(trained_run: TrainedRun, tmp_path: Path) -> None:
    """The shortest story of all: steps 17 to 20 and the first images of their evaluation are done again."""
    folder = tmp_path / "run"
    killed = end_at(Moment(ACTIONS, "Run._interrupted", 2), *flags(folder, *LITTLE))
    assert killed.returncode == -signal.SIGKILL
    assert newest_step(folder) == 16
    train_a_little(folder)
    assert_same_run(folder, trained_run.folder.path)


@pytest.mark.slow
def test_stopped_where_something_is_due_and_killed_in_a_rotation_it_ends_with_the_same_bits(
    undisturbed: Path, tmp_path: Path
) -> None:
    """Weights, moments, losses' sums, metrics, pictures and scalars, dropout on; what was due at the stop is done once."""
    folder = tmp_path / "run"
    stopped = end_at(Moment(LOOP, "finish_step", 4, number=signal.SIGTERM), *dense(folder))
    saved = f"SIGTERM: stopped; step 10 is saved in {folder}; the same command goes on from there"
    assert last_line(stopped) == f"trainer: {saved}"
    marker = newest(folder)
    assert marker is not None
    assert (marker.step, marker.pending) == (10, True)
    assert metrics(folder) == [], "the evaluation of step 10 was due and is not done"
    killed = end_at(Moment("pathlib", "Path.unlink", 5, "/checkpoints/step-"), *dense(folder))
    assert "going on from the checkpoint of step 10" in killed.stderr
    assert torn_checkpoints(folder), "the kill came between two removals"
    done = run_trainer(*short(folder))
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, undisturbed)
    assert torn_checkpoints(folder) == set()


def torn_checkpoints(folder: Path) -> set[str]:
    """Files of checkpoints that no marker names, or that a marker names and that are not there."""
    markers = Checkpoints(folder / "checkpoints", 2).markers()
    named = {name for marker in markers for name in marker.files}
    return named ^ {path.name for path in (folder / "checkpoints").glob("step-*-*")}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ended_at_all_kinds_of_moments_it_ends_with_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    """One run, ended five times: each time it goes on from what the one before has left."""
    folder = tmp_path / "run"
    moments = [
        (0, Moment(ACTIONS, "Run.summarise", 1)),  # step 4; the first checkpoint is due after step 7
        (0, Moment("trainer.runtime.checkpoints", "sync", 1, "/checkpoints/step-00000007")),  # its files are there, no marker is
        (10, Moment(ACTIONS, "Run._interrupted", 2, number=signal.SIGINT)),  # asked in the middle of an evaluation
        (10, Moment(ACTIONS, "Run._interrupted", 2)),  # in the middle of the same one, which is begun anew
        (14, Moment("trainer.runtime.checkpoints", "Checkpoints.save", 3, number=signal.SIGHUP)),  # a terminal that is closed
    ]
    for left, moment in moments:
        end_at(moment, *dense(folder))
        assert newest_step(folder) == left, moment
    done = run_trainer(*short(folder))
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, undisturbed)


BRIEF = (
    *TINY, "train.batch_size=2", "train.steps=12", "train.summary_every=3", "train.evaluate_every=6", "train.sample_every=6",
    "train.checkpoint_every=4", "train.keep=1",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dead_at_any_change_of_a_file_it_ends_with_the_same_bits(sample_folder: Path, tmp_path: Path) -> None:
    """For each change and each sync of a whole run, the folder as a kill just before it leaves it.

    Whatever came after the last whole checkpoint is taken back: all moments between two checkpoints become one state, byte for
    byte. So one run that goes on from each of these states speaks for all moments.
    """
    whole = tmp_path / "whole"
    moments = states_of(whole, tmp_path / "states", *flags(whole, *BRIEF, data_dir=sample_folder))
    assert len(moments) > 35
    begun = {moment: Path(shutil.copytree(moment, tmp_path / "begun" / moment.name)) for moment in moments}
    restore_all(list(begun.values()), *BRIEF, f"data.dir={str(sample_folder)!r}")
    states: dict[tuple[int, object], Path] = {}
    for moment, folder in begun.items():
        assert not list(folder.rglob(".writing-*"))
        assert torn_checkpoints(folder) == set()
        states.setdefault((newest_step(folder), what_counts(folder)), moment)
    assert [step for step, _ in states] == [0, 4, 6, 8, 12, 12], "one for each checkpoint, before the first, when all is done"
    for moment in states.values():
        done = run_trainer(*flags(moment, *BRIEF, data_dir=sample_folder))
        assert done.returncode == 0, done.stderr
        assert_same_run(moment, whole)


def what_counts(folder: Path) -> object:
    """Files that have content, byte for byte, and the scalars: an event file may begin where nothing is in it yet."""
    files = [(name, content) for name, content in files_of(folder) if content and not name.startswith("summaries/")]
    return tuple(files), repr(scalars(folder, measured=True))


@pytest.mark.clock
@pytest.mark.slow
def test_a_signal_is_seen_within_a_second_and_the_run_saved_soon_after(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start_trainer(*short(folder, "train.steps=100000", "train.evaluate_every=0", "train.sample_every=0"))
    wait_for_step(process, folder, 7)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    while "SIGTERM: stopping after this step" not in (line := process.stderr.readline()):
        assert line, "the signal was not seen"
    assert_within(0, time.monotonic() - began, 1)
    process.stderr.read()  # not communicate(): it would miss what readline has buffered
    assert process.wait(timeout=30) == 143
    assert_within(0, time.monotonic() - began, 5)


@pytest.mark.slow
def test_blocks_of_any_length_give_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    done = run_trainer(*short(tmp_path / "run", "train.steps_per_loop=3", "data.cache=memory"))
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", undisturbed)


CLOCK_THAT_JUMPS = """
from trainer.startup import load_tensorflow
load_tensorflow()
import itertools, time
now, readings = time.time, itertools.count()
time.time = lambda: now() - 3600.0 * (next(readings) // 10 % 3)
from trainer.__main__ import main
main()
"""


@pytest.mark.slow
def test_a_clock_that_is_set_back_changes_no_bit(undisturbed: Path, tmp_path: Path) -> None:
    """By up to two hours, every few steps. Under runtime.deterministic the input is timed by Python's clock too."""
    folder = tmp_path / "run"
    done = finish(start_program(CLOCK_THAT_JUMPS, *short(folder, "runtime.deterministic=true")))
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, undisturbed)
    shares = [value for _, tag, value in scalars(folder, measured=True) if tag == "input/wait_share"]
    assert shares
    assert 0.0 <= min(shares) <= max(shares) <= 1.0


@pytest.mark.slow
def test_a_run_leaves_what_the_readme_says(undisturbed: Path) -> None:
    assert {path.name for path in undisturbed.iterdir()} == {
        ".lock", "config.yaml", "checkpoints", "summaries", "samples", "metrics.jsonl", "data", "data.json"
    }  # fmt: skip
    lines = metrics(undisturbed)
    assert [line["step"] for line in lines] == [*range(10, SHORT_STEPS + 1, 10), SHORT_STEPS]
    assert list(lines[0]) == ["step", "split", "images", "l1", "psnr", "ssim"]
    assert [line["split"] for line in lines] == ["val"] * 6 + ["test"]
    assert lines[-1]["l1"] < lines[0]["l1"], "60 steps make the pictures better"
    best = json.loads((undisturbed / "checkpoints" / "best.json").read_text())
    assert best["val_l1"] == min(line["l1"] for line in lines[:-1])
    assert best["step"] == next(line["step"] for line in lines if line["l1"] == best["val_l1"])
    kept = [marker.step for marker in Checkpoints(undisturbed / "checkpoints", 2).markers()]
    assert kept == sorted({best["step"], *kept[-2:]})
    assert kept[-1] == SHORT_STEPS
    assert sorted(path.name for path in (undisturbed / "samples").iterdir()) == [f"step-{step:07d}.png" for step in (20, 40, 60)]


@pytest.mark.slow
def test_a_run_logs_its_scalars_where_they_are_due(undisturbed: Path) -> None:
    steps: dict[str, list[int]] = {}
    for step, tag, _ in scalars(undisturbed, measured=True):
        steps.setdefault(tag, []).append(step)
    share, speed = steps.pop("input/wait_share"), steps.pop("input/mb_per_second")
    expected = {tag: list(range(10, 61, 10)) for tag in ("l1", "psnr", "ssim")}
    expected |= {f"loss/{name}": list(range(4, 61, 4)) for name in ("discriminator", "generator_gan", "l1")}
    assert steps == expected | {"images_per_second": list(range(4, 61, 4))}
    assert share == speed
    assert set(range(12, 61, 4)) <= set(share) <= set(range(4, 61, 4)), "the first block is left out"


@pytest.mark.slow
def test_finished_run_says_so_and_changes_nothing(undisturbed: Path) -> None:
    before = contents(undisturbed)
    done = run_trainer(*short(undisturbed))
    assert done.returncode == 0
    assert done.stdout.startswith("this run is finished; raise train.steps to go on\n")
    assert re.search(r"^test L1 \d+\.\d of 255$", done.stdout, re.MULTILINE)
    assert contents(undisturbed) == before


@pytest.mark.slow
def test_other_settings_are_refused_and_more_steps_are_not(undisturbed: Path, tmp_path: Path) -> None:
    """The last step is saved though no checkpoint is asked for and none is the best; other threads are warned of."""
    folder = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    refused = run_trainer(*short(folder, "model.norm=instance", "data.mirror=false"))
    assert refused.returncode == 2
    assert "config.yaml: data.mirror: True in the run, False now" in refused.stderr
    assert "config.yaml: model.norm: 'batch' in the run, 'instance' now" in refused.stderr
    never = ("train.checkpoint_every=0", "train.evaluate_every=0")
    longer = run_trainer(*short(folder, f"train.steps={SHORT_STEPS + 2}", *never, "runtime.threads=7"))
    assert longer.returncode == 0, longer.stderr
    assert newest_step(folder) == SHORT_STEPS + 2
    warned = re.search(
        r"warning: since the run began: threads \d+ -> 7; results will agree to rounding, not bit for bit", longer.stderr
    )
    assert warned, longer.stderr


@pytest.mark.slow
def test_damaged_newest_checkpoint_falls_back_and_ends_with_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    path = next((folder / "checkpoints").glob(f"step-{SHORT_STEPS:08d}-*.data*"))
    path.write_bytes(path.read_bytes()[:-1])
    done = run_trainer(*short(folder))
    assert done.returncode == 0, done.stderr
    assert f"warning: checkpoint of step {SHORT_STEPS} is damaged" in done.stderr
    assert "going on from the checkpoint of step 56" in done.stderr
    assert_same_run(folder, undisturbed)


@pytest.mark.slow
def test_divergence_ends_with_3_keeps_the_last_good_and_is_not_replayed(tmp_path: Path) -> None:
    """A learning rate that overflows within a few steps of the first checkpoint."""
    folder = tmp_path / "run"
    given = short(folder, "optimizer.learning_rate=1e25", "train.checkpoint_every=1", "train.evaluate_every=0")
    done = run_trainer(*given)
    assert done.returncode == 3
    last = last_line(done)
    found = re.match(
        r"trainer: step (\d+): a loss or gradient is not finite \(discriminator \S+, generator_gan \S+, l1 \S+\); ", last
    )
    assert found, last
    assert newest_step(folder) == int(found[1]) - 1
    again = run_trainer(*given)
    assert again.returncode == 3
    assert last in again.stderr
    assert "training on" not in again.stderr


@pytest.mark.parametrize(
    ("split", "number"), [pytest.param("train", 27, marks=pytest.mark.slow), pytest.param("val", 5, marks=pytest.mark.slow)]
)
def test_damaged_record_ends_with_2_and_is_named(split: str, number: int, sample_folder: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(sample_folder, tmp_path / "data"))
    damaged = flip_in_record(data, split, number)
    given = [*short(tmp_path / "run"), f"--data_dir={data}"]
    done = run_trainer(*given)
    assert done.returncode == 2
    assert last_line(done).startswith(f"trainer: {damaged}: the record's checksum")
    assert "Traceback" not in done.stderr
    again = run_trainer(*given)
    assert again.returncode == 2
    assert last_line(again).startswith(last_line(done))
    assert "training on" not in again.stderr
