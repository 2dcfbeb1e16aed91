"""Two workers as real processes: peers that die, hang, never come, see other folders; stops and failures that all share."""

import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.processes import run_trainer
from tests.helpers.runs import arguments, assert_same_run, newest
from tests.helpers.workers import Workers, held_ports, taken, tf_config

LONG = ("train.steps=100000", "train.checkpoint_every=20", "train.evaluate_every=0", "train.sample_every=0")
TRAINS = "step "


def trained_a_while(workers: Workers, folder: Path, step: int = 40) -> None:
    deadline = time.monotonic() + 90
    while (marker := newest(folder)) is None or marker.step < step:
        assert time.monotonic() < deadline, workers.log(0)
        for index, process in workers.processes.items():
            assert process.poll() is None, workers.log(index)
        time.sleep(0.05)


@pytest.mark.parametrize(("victim", "other"), [(1, 0), pytest.param(0, 1, marks=pytest.mark.slow)])
def test_a_killed_peer_ends_the_others_with_75_and_they_go_on_together(victim: int, other: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    workers = Workers(tmp_path / "logs", *arguments(folder, *LONG))
    trained_a_while(workers, folder)
    began = time.monotonic()
    workers.processes[victim].kill()
    assert workers.codes(60) == {victim: -signal.SIGKILL, other: 75}
    assert time.monotonic() - began < 30
    assert re.match(
        rf"trainer: worker {other}: (worker {victim} \(127.0.0.1:\d+\)|a peer) was lost \(\w", workers.last_line(other)
    )
    assert workers.last_line(other).endswith("run all workers again: they go on from the newest checkpoint")
    saved = newest(folder)
    assert saved is not None
    again = Workers(tmp_path / "again", *arguments(folder, *LONG, f"train.steps={saved.step + 20}"))
    assert again.codes() == {0: 0, 1: 0}, again.log(0)
    assert f"going on from the checkpoint of step {saved.step}" in again.log(1)


def test_when_the_chief_cannot_save_no_other_says_that_all_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    workers = Workers(tmp_path / "logs", *arguments(folder, *LONG))
    trained_a_while(workers, folder, 20)
    (folder / "checkpoints").rename(folder / "moved")
    (folder / "checkpoints").touch()
    assert workers.codes(60) == {0: 1, 1: 75}
    assert "could not be saved: File exists" in workers.last_line(0)
    assert workers.last_line(1).endswith("run all workers again: they go on from the newest checkpoint")


@pytest.mark.slow
def test_a_hanging_peer_ends_the_others_with_75(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    workers = Workers(tmp_path / "logs", *arguments(folder, *LONG, "runtime.peer_timeout_seconds=8"))
    trained_a_while(workers, folder)
    workers.processes[1].send_signal(signal.SIGSTOP)
    try:
        assert workers.processes[0].wait(40) == 75
    finally:
        workers.processes[1].kill()
    assert "run all workers again" in workers.last_line(0)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_stops_all_at_the_same_step_and_the_run_ends_with_the_same_bits(asked: int, tmp_path: Path) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    short = ("train.steps=200", "train.evaluate_every=100", "train.checkpoint_every=20")
    workers = Workers(tmp_path / "logs", *arguments(folder, *short))
    trained_a_while(workers, folder, 20)
    workers.processes[asked].send_signal(signal.SIGTERM)
    assert workers.codes(30) == {0: 143, 1: 143}
    steps = {index: re.search(r"stopped; step (\d+) is saved", workers.last_line(index)) for index in (0, 1)}
    assert steps[0] and steps[1], [workers.last_line(index) for index in (0, 1)]
    marker = newest(folder)
    assert marker is not None
    assert steps[0][1] == steps[1][1] == str(marker.step)
    assert Workers(tmp_path / "again", *arguments(folder, *short)).codes() == {0: 0, 1: 0}
    assert Workers(tmp_path / "undisturbed", *arguments(whole, *short)).codes() == {0: 0, 1: 0}
    assert_same_run(folder, whole)


def test_a_run_that_diverges_ends_everywhere_with_3(tmp_path: Path) -> None:
    workers = Workers(tmp_path / "logs", *arguments(tmp_path / "run", "optimizer.learning_rate=1e25", "train.evaluate_every=0"))
    assert workers.codes() == {0: 3, 1: 3}
    assert workers.last_line(0) == workers.last_line(1)
    again = Workers(tmp_path / "again", *arguments(tmp_path / "run", "optimizer.learning_rate=1e25", "train.evaluate_every=0"))
    assert again.codes() == {0: 3, 1: 3}
    assert "nothing has changed since" in again.last_line(1)


def test_a_peer_that_never_comes_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    chief = Workers(tmp_path / "logs", *arguments(folder, "runtime.rendezvous_seconds=3"), only=(0,))
    worker = Workers(tmp_path / "other", *arguments(folder, "runtime.rendezvous_seconds=3"), only=(1,))
    assert chief.codes() == {0: 75}
    absent = f"worker 1 (127.0.0.1:{chief.ports[1]})"
    assert re.search(rf"waiting for {re.escape(absent)}, at most \d s more", chief.log(0))
    assert chief.last_line(0) == f"trainer: after 3 s these workers have not come: {absent}; run all workers again"
    assert worker.codes() == {1: 75}
    assert re.search(
        rf"waiting for the chief \(127.0.0.1:{worker.ports[0]}: Connection refused\), at most \d s more", worker.log(1)
    )
    assert worker.last_line(1).startswith(f"trainer: after 3 s the chief (127.0.0.1:{worker.ports[0]}) cannot be reached: ")


@pytest.mark.clock
def test_a_worker_that_waits_can_be_stopped(tmp_path: Path) -> None:
    chief = Workers(tmp_path / "logs", *arguments(tmp_path / "run"), only=(0,))
    chief.wait_for(0, "waiting for worker 1")
    chief.processes[0].send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert chief.codes(10) == {0: 143}
    assert time.monotonic() - began < 2
    assert chief.last_line(0) == "trainer: SIGTERM: stopped; the same command begins again, or goes on from what is saved"


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with held_ports(2) as (port, other), taken(port):
        done = run_trainer(*arguments(tmp_path / "run"), TF_CONFIG=tf_config([port, other], 0))
    assert done.returncode == 75
    line = f"trainer: port {port}, where this worker is to listen, cannot be used: Address already in use"
    assert done.stderr.strip().splitlines()[-1] == line


def test_a_workers_own_port_that_is_taken_is_named(tmp_path: Path) -> None:
    workers = Workers(tmp_path / "logs", count=2, only=())
    with taken(workers.ports[1]):
        for index in (0, 1):
            workers.start(index, *arguments(tmp_path / "run"))
        codes = workers.codes()
    assert codes == {0: 75, 1: 75}
    line = f"port {workers.ports[1]}, where this worker is to listen, cannot be used: Address already in use"
    assert workers.last_line(1) == f"trainer: {line}"
    assert workers.last_line(0) == f"trainer: worker 1: {line}"


def test_folders_of_each_host_are_noticed_before_anything_is_trained(tmp_path: Path) -> None:
    workers = Workers(tmp_path / "logs", count=2, only=())
    for index in (0, 1):
        workers.start(index, *arguments(tmp_path / f"host{index}" / "run"))
    assert workers.codes() == {0: 2, 1: 2}
    advice = "every worker must see the same folder: put it on a shared file system, or in a bucket"
    line = f"--model_dir={tmp_path}/host1/run: is not the chief's folder but one of this host; {advice}"
    assert workers.last_line(1) == f"trainer: {line}"
    assert workers.last_line(0) == f"trainer: worker 1: {line}"
    assert newest(tmp_path / "host0" / "run") is None


def test_other_settings_on_one_worker_are_refused_on_all(tmp_path: Path) -> None:
    workers = Workers(tmp_path / "logs", count=2, only=())
    for index, seed in enumerate((0, 1)):
        workers.start(index, *arguments(tmp_path / "run", f"seed={seed}"))
    assert workers.codes() == {0: 2, 1: 2}
    line = "worker 1 runs with other settings than the chief: seed: 1 there, 0 here; start all workers with the same command"
    assert workers.last_line(0) == workers.last_line(1) == f"trainer: {line}"


def test_missing_data_on_one_worker_is_told_to_all(sample_folder: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(sample_folder, tmp_path / "data"))
    workers = Workers(tmp_path / "logs", count=2, only=())
    workers.start(0, *arguments(tmp_path / "run"), f"--data_dir={data}")
    workers.start(1, *arguments(tmp_path / "run"), f"--data_dir={tmp_path}/nowhere")
    assert workers.codes() == {0: 2, 1: 2}
    assert workers.last_line(1).startswith(f"trainer: {tmp_path}/nowhere")
    assert workers.last_line(0) == workers.last_line(1).replace("trainer: ", "trainer: worker 1: ", 1)


@pytest.mark.slow
def test_a_finished_run_says_so_on_all(tmp_path: Path) -> None:
    short = arguments(tmp_path / "run", "train.steps=20", "train.evaluate_every=0")
    assert Workers(tmp_path / "logs", *short).codes() == {0: 0, 1: 0}
    again = Workers(tmp_path / "again", *short)
    assert again.codes(30) == {0: 0, 1: 0}
    assert all("this run is finished" in again.log(index) for index in (0, 1))


def test_an_evaluator_builds_no_strategy(tmp_path: Path) -> None:
    config = '{"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": {"type": "evaluator", "index": 0}}'
    done = run_trainer(*arguments(tmp_path / "run"), TF_CONFIG=config)
    assert done.returncode == 0
    assert done.stdout.startswith("this process is an evaluator, and there is nothing for it to do")
    assert not (tmp_path / "run").exists()
