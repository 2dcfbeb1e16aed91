"""Two workers as real processes: peers that die, hang, never come, see other things; stops and failures that all share."""

import importlib.metadata
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.damage import flip_in_record
from tests.helpers.events import scalars
from tests.helpers.ports import held_ports, taken
from tests.helpers.processes import run_trainer
from tests.helpers.runs import assert_same_run, newest, newest_step, short
from tests.helpers.scores import scores_of
from tests.helpers.settings import TINY, flags, small_config
from tests.helpers.waiting import wait_until
from tests.helpers.workers import NOTICED_SOON, Workers, tf_config
from trainer import __version__
from trainer.data.pipeline import PairData
from trainer.data.records import read_manifest
from trainer.model.generators import translate
from trainer.runtime import strategy
from trainer.trained import open_run

BARE = (*TINY, "train.batch_size=2", "model.norm=none", "train.evaluate_every=0", "train.sample_every=0")
ENDLESS = (*BARE, "train.steps=1000000", "train.checkpoint_every=4", "train.steps_per_loop=2")
GO_ON = "run all workers again: they go on from the newest checkpoint"


def trained_a_while(workers: Workers, folder: Path, step: int = 8) -> None:
    """Wait until a run that does not end has saved a step."""

    def saved() -> bool:
        for index, process in workers.processes.items():
            assert process.poll() is None, workers.log(index)
        return newest_step(folder) >= step

    wait_until(saved, what=f"a checkpoint of step {step}")


def last_words(workers: Workers) -> list[str]:
    """What each of two workers said last, which begins with `trainer: `."""
    lines = [workers.last_line(index) for index in (0, 1)]
    assert all(line.startswith("trainer: ") for line in lines), lines
    return [line.removeprefix("trainer: ") for line in lines]


# Death.


@pytest.mark.slow
def test_a_killed_worker_ends_the_chief_with_75(sample_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    workers = Workers(tmp_path / "logs", *flags(folder, *ENDLESS, data_dir=sample_folder), first=NOTICED_SOON)
    trained_a_while(workers, folder)
    workers.processes[1].kill()
    assert workers.codes(60) == {1: -signal.SIGKILL, 0: 75}
    line = rf"trainer: worker 0: (worker 1 \(127\.0\.0\.1:{workers.ports[1]}\)|a peer) was lost \(\w.*\); {GO_ON}"
    assert re.fullmatch(line, workers.last_line(0))


DIES_IN_A_SAVE = """
import itertools, os, signal
from trainer.runtime.ledger import FolderLedger
change, saves = FolderLedger.change, itertools.count(1)

def change_or_die(self, added, dropped):
    if added and next(saves) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    change(self, added, dropped)

FolderLedger.change = change_or_die
"""


@pytest.mark.slow
def test_a_chief_that_dies_in_a_save_ends_the_others_with_75_and_all_go_on_to_the_same_bits(
    run_of_two: Path, sample_folder: Path, tmp_path: Path
) -> None:
    """The third save has written its files but not its marker."""
    folder = tmp_path / "run"
    arguments = [*short(folder), f"--data_dir={sample_folder}"]
    workers = Workers(tmp_path / "logs", only=())
    workers.start(0, *arguments, first=DIES_IN_A_SAVE)
    workers.start(1, *arguments)
    assert workers.codes() == {0: -signal.SIGKILL, 1: 75}
    assert workers.last_line(1).endswith(GO_ON)
    saved = newest(folder)
    assert saved is not None
    torn = {path.name.split("-")[1] for path in (folder / "checkpoints").glob("step-*-*.index")} - {f"{saved.step:08d}"}
    assert max(map(int, torn)) > saved.step, "files without a marker lie there"
    again = Workers(tmp_path / "again", *arguments)
    assert again.codes() == {0: 0, 1: 0}, again.log(0)
    assert f"going on from the checkpoint of step {saved.step}" in again.log(1)
    assert_same_run(folder, run_of_two)


DIES_WHEN_IT_CONNECTS = """
import os, signal
from trainer.runtime import strategy
strategy.build = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
"""
PATIENT = """
from trainer.runtime import strategy
strategy.BUILDING_SECONDS = 2
"""


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_peer_that_dies_while_tensorflow_connects_ends_the_other_after_a_while(
    victim: int, sample_folder: Path, tmp_path: Path
) -> None:
    """TensorFlow waits for it in silence and holds the interpreter: what ends the process can say nothing but where it was."""
    arguments = flags(tmp_path / "run", *ENDLESS, data_dir=sample_folder)
    workers = Workers(tmp_path / "logs", only=())
    for index in (0, 1):
        workers.start(index, *arguments, first=DIES_WHEN_IT_CONNECTS if index == victim else PATIENT)
    assert workers.codes(40) == {victim: -signal.SIGKILL, 1 - victim: 1}
    assert "Timeout (0:00:02)!" in workers.log(1 - victim)
    assert strategy.BUILDING_SECONDS == 300, "as docs/distribution.md says"


@pytest.mark.slow
def test_a_hanging_peer_ends_the_others_with_75(sample_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = flags(folder, *ENDLESS, "runtime.peer_timeout_seconds=5", data_dir=sample_folder)
    workers = Workers(tmp_path / "logs", *arguments)
    trained_a_while(workers, folder)
    workers.processes[1].send_signal(signal.SIGSTOP)
    try:
        assert workers.processes[0].wait(60) == 75
    finally:
        workers.processes[1].kill()
    assert GO_ON in workers.last_line(0)


# Stops and failures that all share.

FOLDER_GOES = """
import itertools
from trainer.runtime.checkpoints import Checkpoints
write, saves = Checkpoints._write, itertools.count(1)

def write_or_not(self, *given):
    if next(saves) == 2:
        self._here.rename(self._here.with_name("moved"))
        self._here.touch()
    write(self, *given)

Checkpoints._write = write_or_not
"""


@pytest.mark.slow
def test_when_the_chief_cannot_save_no_other_says_that_all_is_done(sample_folder: Path, tmp_path: Path) -> None:
    """A file takes the folder's place before the last save, which every worker but the chief thinks is made."""
    folder = tmp_path / "run"
    arguments = flags(folder, *BARE, "train.steps=8", "train.checkpoint_every=4", data_dir=sample_folder)
    workers = Workers(tmp_path / "logs", only=())
    workers.start(0, *arguments, first=NOTICED_SOON + FOLDER_GOES)
    workers.start(1, *arguments, first=NOTICED_SOON)
    assert workers.codes() == {0: 1, 1: 75}
    last = f"trainer: {folder}/checkpoints: the checkpoint of step 8 could not be saved: File exists"
    assert (workers.last_line(0), workers.last_line(1)[-len(GO_ON) :]) == (last, GO_ON)


STOPS_ITSELF = """
import os, signal
from trainer.train import loop
run_block = loop.run_block

def run_block_and_stop(run, block, step):
    if step == 12:
        os.kill(os.getpid(), signal.SIGTERM)
    return run_block(run, block, step)

loop.run_block = run_block_and_stop
"""


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_stops_all_at_the_same_step_and_the_run_ends_with_the_same_bits(
    asked: int, run_of_two: Path, sample_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = [*short(folder), f"--data_dir={sample_folder}"]
    workers = Workers(tmp_path / "logs", only=())
    for index in (0, 1):
        workers.start(index, *arguments, first=STOPS_ITSELF if index == asked else "")
    assert workers.codes() == {0: 143, 1: 143}
    saved = newest_step(folder)
    assert 12 <= saved < 60
    for index, line in enumerate(last_words(workers)):
        by = "SIGTERM" if index == asked else "a signal to another worker"
        assert line == f"{by}: stopped; step {saved} is saved in {folder}; the same command goes on from there"
    again = Workers(tmp_path / "again", *arguments)
    assert again.codes() == {0: 0, 1: 0}, again.log(0)
    assert_same_run(folder, run_of_two)


SPOILT_HERE = """
import tensorflow as tf
from trainer.model import losses
l1_loss = losses.l1_loss
losses.l1_loss = lambda target, drawn: l1_loss(target, drawn) + tf.constant(float("inf"))
"""


@pytest.mark.slow
def test_a_worker_that_diverges_alone_ends_all_with_3_and_they_do_not_begin_again(sample_folder: Path, tmp_path: Path) -> None:
    arguments = flags(tmp_path / "run", *BARE, "train.steps=8", data_dir=sample_folder)
    workers = Workers(tmp_path / "logs", only=())
    workers.start(0, *arguments)
    workers.start(1, *arguments, first=SPOILT_HERE)
    assert workers.codes() == {0: 3, 1: 3}, workers.log(0)
    chief, worker = last_words(workers)
    assert chief == worker
    assert chief.startswith("step 1: a loss or gradient is not finite (")
    again = Workers(tmp_path / "again", *arguments)
    assert again.codes() == {0: 3, 1: 3}
    advice = f"(nothing has changed since; to try all the same, remove {tmp_path}/run/failure.json)"
    assert last_words(again) == [f"{chief} {advice}"] * 2


@pytest.mark.slow
def test_a_record_that_is_damaged_for_one_worker_ends_all_once_and_then_at_once_until_it_is_mended(
    sample_folder: Path, tmp_path: Path
) -> None:
    """Each worker has a copy of the data; the third batch of worker 1 is damaged in its own."""
    damaged = Path(shutil.copytree(sample_folder, tmp_path / "data of worker 1"))
    settings = (*BARE, "train.steps=6")
    config = small_config(*settings)
    name = flip_in_record(damaged, "train", int(PairData(sample_folder, config).batch_records(2)[1]))
    folders = {0: sample_folder, 1: damaged}

    def start(logs: str) -> Workers:
        workers = Workers(tmp_path / logs, only=())
        for index in (0, 1):
            workers.start(index, *flags(tmp_path / "run", *settings, data_dir=folders[index]), first=NOTICED_SOON)
        return workers

    workers = start("first")
    assert workers.codes() == {0: 75, 1: 2}, workers.log(0)
    assert name in workers.last_line(1)
    assert workers.last_line(0).endswith(GO_ON)
    again = start("again")
    assert again.codes() == {0: 2, 1: 2}
    told = last_words(again)
    assert told[0] == told[1]
    assert name in told[0]
    assert "nothing has changed since" in told[0]
    shutil.copytree(sample_folder, damaged, dirs_exist_ok=True)
    mended = start("mended")
    assert mended.codes() == {0: 0, 1: 0}, mended.log(0)
    assert not (tmp_path / "run" / "failure.json").exists()


# Numbers.

SAYS_BLOCKS = """
from trainer.runtime.meter import Meter
from trainer.train import loop
Meter.steps_per_block = lambda self: OWN
run_block = loop.run_block

def run_and_say(run, block, step):
    reached = run_block(run, block, step)
    print(f"block {step} {reached}", flush=True)
    return reached

loop.run_block = run_and_say
"""
MEASURED = (
    *TINY, "train.batch_size=4", "train.steps=8", "train.evaluate_every=4", "train.summary_every=8",
    "train.checkpoint_every=4", "train.sample_every=0", "model.norm=instance",
)  # fmt: skip


@pytest.mark.slow
def test_two_workers_of_two_devices_leave_the_numbers_of_one_device(sample_folder: Path, tmp_path: Path) -> None:
    """Losses, scores and counts, on the same global batches; scores also from pixels in NumPy. The chief's clock says that a
    block is of three steps, that of the other worker two.
    """
    alone = run_trainer(*flags(tmp_path / "one", *MEASURED, data_dir=sample_folder))
    assert alone.returncode == 0, alone.stderr
    together = flags(tmp_path / "two", *MEASURED, "runtime.cpu_devices=2", data_dir=sample_folder)
    workers = Workers(tmp_path / "logs", only=())
    for index, steps in enumerate((3, 2)):
        workers.start(index, *together, first=SAYS_BLOCKS.replace("OWN", str(steps)))
    assert workers.codes() == {0: 0, 1: 0}, workers.log(0)
    blocks = ["block 0 3", "block 3 4", "block 4 7", "block 7 8"]
    for index in (0, 1):
        assert re.findall(r"^block \d+ \d+$", workers.log(index), re.M) == blocks
    one, two = scalars(tmp_path / "one"), scalars(tmp_path / "two")
    assert [entry[:2] for entry in one] == [entry[:2] for entry in two]
    np.testing.assert_allclose([entry.value for entry in two], [entry.value for entry in one], rtol=2e-4)
    pictures = {split: sum(shard.examples for shard in shards) for split, shards in read_manifest(sample_folder).splits.items()}
    rows = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("one", "two")]
    for row, other in zip(*rows, strict=True):
        assert (row.pop("split"), row["images"]) == (split := other.pop("split"), pictures[split])
        assert other == pytest.approx(row, rel=2e-4)
    last = rows[1][-1]
    expected = {"step": 8, "images": pictures["test"], **scores_from_pixels(tmp_path / "two", sample_folder)}
    assert last == pytest.approx(expected, rel=1e-3)


def scores_from_pixels(run: Path, data: Path) -> dict[str, float]:
    """The means of a run's scores on `test`, from its newest generator's drawings as 8-bit pictures, one after the other."""
    config = small_config(*MEASURED)
    pairs, generator = PairData(data, config), open_run(run).generator()
    found = []
    for batch in pairs.batches_of(pairs.split("test"), range(pairs.split("test").examples), 1):
        drawn, target = (image.numpy()[0] for image in (translate(generator, batch["input"], config.seed), batch["target"]))
        found.append(scores_of(*(np.clip((image + 1) * 127.5, 0, 255).round().astype(np.uint8) for image in (drawn, target))))
    return {name: float(np.mean([scores[name] for scores in found])) for name in found[0]}


# The meeting, up to a refusal.


def test_a_peer_that_never_comes_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    chief = Workers(tmp_path / "logs", *short(folder, "runtime.rendezvous_seconds=3"), only=(0,))
    worker = Workers(tmp_path / "other", *short(folder, "runtime.rendezvous_seconds=3"), only=(1,))
    assert chief.codes() == {0: 75}
    absent = f"worker 1 (127.0.0.1:{chief.ports[1]})"
    assert re.search(rf"waiting for {re.escape(absent)}, at most \d s more", chief.log(0))
    assert chief.last_line(0) == f"trainer: after 3 s these workers have not come: {absent}; run all workers again"
    assert worker.codes() == {1: 75}
    assert re.search(
        rf"waiting for the chief \(127.0.0.1:{worker.ports[0]}: Connection refused\), at most \d s more", worker.log(1)
    )
    assert worker.last_line(1).startswith(f"trainer: after 3 s the chief (127.0.0.1:{worker.ports[0]}) cannot be reached: ")


def test_a_worker_that_waits_can_be_stopped(tmp_path: Path) -> None:
    """It would wait for a quarter of an hour."""
    chief = Workers(tmp_path / "logs", *short(tmp_path / "run"), only=(0,))
    chief.wait_for(0, "waiting for worker 1")
    chief.processes[0].send_signal(signal.SIGTERM)
    assert chief.codes(60) == {0: 143}
    assert chief.last_line(0) == "trainer: SIGTERM: stopped; the same command begins again, or goes on from what is saved"


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with held_ports(2) as (port, other), taken(port):
        done = run_trainer(*short(tmp_path / "run"), TF_CONFIG=tf_config([port, other], 0))
    assert done.returncode == 75
    line = f"trainer: port {port}, where this worker is to listen, cannot be used: Address already in use"
    assert done.stderr.strip().splitlines()[-1] == line


def refused(workers: Workers, code: int = 2) -> list[str]:
    """The last lines of two workers that both end with this code, before anything is trained."""
    assert workers.codes() == {0: code, 1: code}, workers.log(0)
    return last_words(workers)


def test_a_workers_own_port_that_is_taken_is_named(tmp_path: Path) -> None:
    workers = Workers(tmp_path / "logs", only=())
    with taken(workers.ports[1]):
        for index in (0, 1):
            workers.start(index, *short(tmp_path / "run"))
        lines = refused(workers, 75)
    line = f"port {workers.ports[1]}, where this worker is to listen, cannot be used: Address already in use"
    assert lines == [f"worker 1: {line}", line]


def test_folders_of_each_host_are_noticed_before_anything_is_trained(sample_folder: Path, tmp_path: Path) -> None:
    workers = Workers(tmp_path / "logs", only=())
    for index in (0, 1):
        arguments = [*short(tmp_path / f"host{index}" / "run"), f"--data_dir={sample_folder}"]
        workers.start(index, *arguments, first="from trainer.runtime import run_folder\nrun_folder.SEE_SECONDS = 0.5")
    advice = "every worker must see the same folder: put it on a shared file system, or in a bucket"
    line = f"--model_dir={tmp_path}/host1/run: is not the chief's folder but one of this host; {advice}"
    assert refused(workers) == [f"worker 1: {line}", line]
    assert newest(tmp_path / "host0" / "run") is None


def other_than_the_chief(what: str, there: str, here: str) -> str:
    """The line that all workers end with."""
    difference = f"{what}: {there} there, {here} here; start all workers with the same command"
    return f"worker 1 runs with other settings than the chief: {difference}"


def test_other_settings_on_one_worker_are_refused_on_all(tmp_path: Path) -> None:
    workers = Workers(tmp_path / "logs", only=())
    for index in (0, 1):
        workers.start(index, *short(tmp_path / "run", f"seed={index}"))
    assert refused(workers) == [other_than_the_chief("seed", "1", "0")] * 2


def test_other_data_on_one_worker_are_refused_on_all(sample_folder: Path, tmp_path: Path) -> None:
    """The same pictures in other splits."""
    other = Path(shutil.copytree(sample_folder, tmp_path / "other"))
    document = json.loads((other / "dataset.json").read_text())
    document["splits"]["train"] += document["splits"].pop("val")
    (other / "dataset.json").write_text(json.dumps(document))
    workers = Workers(tmp_path / "logs", only=())
    for index, data in enumerate((sample_folder, other)):
        workers.start(index, *short(tmp_path / "run"), f"--data_dir={data}")
    digests = [read_manifest(data).digest() for data in (other, sample_folder)]
    assert refused(workers) == [other_than_the_chief("data", *digests)] * 2
    assert newest(tmp_path / "run") is None


@pytest.mark.parametrize("software", ["keras", "tensorflow", "trainer"])
def test_other_software_on_one_worker_is_refused_on_all(software: str, sample_folder: Path, tmp_path: Path) -> None:
    """Worker 1 finds another package installed, and the trainer says itself what it is."""
    distribution = "tensorflow-cpu" if software == "tensorflow" else software
    installed = tmp_path / "site" / f"{distribution.replace('-', '_')}-0.0.1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.0.1\n")
    first = f"import sys\nsys.path.insert(0, {str(installed.parent)!r})\nfrom trainer.runtime import versions\n"
    first += "versions.__version__ = '0.0.1'\n" if software == "trainer" else ""
    workers = Workers(tmp_path / "logs", only=())
    arguments = [*short(tmp_path / "run"), f"--data_dir={sample_folder}"]
    workers.start(0, *arguments)
    workers.start(1, *arguments, first=first)
    here = __version__ if software == "trainer" else importlib.metadata.version(distribution)
    assert refused(workers) == [other_than_the_chief(software, "0.0.1", here)] * 2


def test_missing_data_on_one_worker_is_told_to_all(sample_folder: Path, tmp_path: Path) -> None:
    workers = Workers(tmp_path / "logs", only=())
    workers.start(0, *short(tmp_path / "run"), f"--data_dir={sample_folder}")
    workers.start(1, *short(tmp_path / "run"), f"--data_dir={tmp_path}/nowhere")
    chief, worker = refused(workers)
    assert worker.startswith(f"{tmp_path}/nowhere")
    assert chief == f"worker 1: {worker}"


@pytest.mark.slow
def test_a_finished_run_says_so_on_all(run_of_two: Path, sample_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run_of_two, tmp_path / "run")
    workers = Workers(tmp_path / "logs", *short(folder), f"--data_dir={sample_folder}")
    assert workers.codes() == {0: 0, 1: 0}
    assert all("this run is finished" in workers.log(index) for index in (0, 1))
    assert_same_run(folder, run_of_two)


def test_an_evaluator_builds_no_strategy(tmp_path: Path) -> None:
    config = '{"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": {"type": "evaluator", "index": 0}}'
    done = run_trainer(*short(tmp_path / "run"), TF_CONFIG=config)
    assert done.returncode == 0
    assert done.stdout.startswith("this process is an evaluator, and there is nothing for it to do")
    assert not (tmp_path / "run").exists()
