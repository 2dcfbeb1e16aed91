"""What workers agree on, without networks: sums over real strategies, and what becomes of those whose peer has died."""

import json
import re
import signal
import subprocess

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.ports import held_ports
from tests.helpers.processes import finish, start_program
from tests.helpers.workers import NOTICED_SOON, tf_config
from trainer.cluster import Cluster
from trainer.errors import ExitCode, PeerLostError
from trainer.runtime.workers import Alone, meet, naming_lost_peers

BEGIN = """
import json, os, signal, sys
import numpy as np
from trainer.cluster import Cluster, read_cluster
from trainer.config import RuntimeConfig
from trainer.errors import TrainerError
from trainer.runtime import strategy as devices
from trainer.runtime.workers import Together, meet, naming_lost_peers

def end(code, line):
    print(line, flush=True)
    os._exit(code)

cluster, index = read_cluster(os.environ), read_cluster(os.environ).index
have = devices.configure_devices(RuntimeConfig(cpu_devices=int(sys.argv[1])))
"""
BUILD = """
strategy = devices.build(devices.choose("auto", cluster, have), cluster, have)
workers = meet(strategy, cluster)
"""
AGREE = """
sums = workers.add_up(np.array([1.5 + index, 10.0 ** (15 * index), 0.0]))
said = [sums.tolist(), workers.any(False), workers.any(index == workers.size - 1), workers.of_chief(2**40 + index)]
workers.leave()
end(0, json.dumps([strategy.num_replicas_in_sync, workers.size, workers.index, *said]))
"""


def run(program: str, workers: int, devices: int) -> list[subprocess.CompletedProcess[str]]:
    """Run a program as each of several workers, to their ends."""
    with held_ports(workers) as ports:
        running = [
            start_program(program, str(devices), **({"TF_CONFIG": tf_config(ports, index)} if workers > 1 else {}))
            for index in range(workers)
        ]
        return [finish(process, 120) for process in running]


@pytest.mark.parametrize(("workers", "devices"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_each_worker_counts_once_however_many_devices_it_has(workers: int, devices: int) -> None:
    """The third sum is of zeros alone, and the second needs double precision."""
    sums = [sum(1.5 + index for index in range(workers)), sum(10.0 ** (15 * index) for index in range(workers)), 0.0]
    for index, done in enumerate(run(BEGIN + BUILD + AGREE, workers, devices)):
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [workers * devices, workers, index, sums, False, True, 2**40]


def test_two_replicas_of_one_worker_bring_its_values_once() -> None:
    """The sums of several workers, on a strategy of one: the replicas of a worker are told apart by their number in it."""
    alone = BUILD.replace("meet(strategy, cluster)", 'Together(strategy, Cluster("TF_CONFIG", ("a:1",)))')
    (done,) = run(BEGIN + alone + AGREE, 1, 2)
    assert json.loads(done.stdout) == [2, 1, 0, [1.5, 1.0, 0.0], False, True, 2**40], done.stderr


BLOCKS = """
from types import SimpleNamespace
from trainer.config import Config
from trainer.runtime.meter import Meter
from trainer.train.actions import Run

Meter.steps_per_block = lambda self: 3 + index
length = Run.steps_per_block(SimpleNamespace(config=Config(), meter=Meter(1), workers=workers))
workers.leave()
end(0, length)
"""


def test_the_chiefs_clock_counts_for_all() -> None:
    assert [done.stdout for done in run(BEGIN + BUILD + BLOCKS, 2, 1)] == ["3\n", "3\n"]


def test_a_process_alone_agrees_with_itself() -> None:
    workers = meet(tf.distribute.get_strategy(), Cluster())
    assert isinstance(workers, Alone)
    assert (workers.size, workers.index) == (1, 0)
    np.testing.assert_array_equal(workers.add_up(np.array([1.5, 2.0])), [1.5, 2.0])
    assert (workers.any(True), workers.any(False), workers.of_chief(7)) == (True, False, 7)
    workers.leave()


DIES = """
try:
    with naming_lost_peers(cluster):
        for number in range(3):
            workers.any(False)
        if index == VICTIM:
            os.kill(os.getpid(), signal.SIGKILL)
        workers.any(False)
except TrainerError as error:
    end(error.exit_code, str(error))
end(0, "it was not noticed")
"""


@pytest.mark.parametrize(("victim", "other"), [(1, 0), (0, 1)])
def test_a_peer_that_dies_is_lost_and_named(victim: int, other: int) -> None:
    ends = run(BEGIN + NOTICED_SOON + BUILD + DIES.replace("VICTIM", str(victim)), 2, 1)
    assert [ends[victim].returncode, ends[other].returncode] == [-signal.SIGKILL, ExitCode.AGAIN], ends
    line = r"worker {}: (worker {} \(127\.0\.0\.1:\d+\)|a peer) was lost \(\w.*\); run all workers again: they go on from .*\n"
    assert re.fullmatch(line.format(other, victim), ends[other].stdout)


LEAVES = """
try:
    with naming_lost_peers(cluster):
        workers.any(False)
        if index == 1:
            end(1, "failed in its part")
        workers.leave()
except TrainerError as error:
    end(error.exit_code, "lost")
end(0, "all is done")
"""


def test_nobody_takes_a_run_for_done_whose_peer_has_failed_in_its_part() -> None:
    chief, other = run(BEGIN + NOTICED_SOON + BUILD + LEAVES, 2, 1)
    assert (other.returncode, other.stdout) == (1, "failed in its part\n"), other.stderr
    assert (chief.returncode, chief.stdout) == (ExitCode.AGAIN, "lost\n"), chief.stderr


UNAVAILABLE = tf.errors.UnavailableError(None, None, "/job:worker/replica:0/task:1: Connection reset by peer")
TWO = Cluster("TF_CONFIG", ("a:1", "b:2"), 0)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UNAVAILABLE, "worker 0: worker 1 (b:2) was lost (Connection reset by peer)"),
        (tf.errors.DeadlineExceededError(None, None, "too late"), "worker 0: a peer was lost (DeadlineExceededError)"),
        (tf.errors.AbortedError(None, None, "/job:worker/replica:0/task:0: x"), "worker 0: a peer was lost (AbortedError)"),
        (tf.errors.CancelledError(None, None, "/job:worker/replica:0/task:7: x"), "worker 0: a peer was lost (CancelledError)"),
        (tf.errors.InternalError(None, None, "Socket closed"), "worker 0: a peer was lost (Socket closed)"),
        (tf.errors.UnknownError(None, None, "Collective ops is aborted by: x"), "worker 0: a peer was lost (UnknownError)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_tensorflow_says_of_a_lost_peer_becomes_one_line(error: tf.errors.OpError, line: str) -> None:
    with pytest.raises(PeerLostError) as caught, naming_lost_peers(TWO):
        raise error
    assert str(caught.value) == f"{line}; run all workers again: they go on from the newest checkpoint"


@pytest.mark.parametrize(
    ("error", "cluster"), [(tf.errors.InvalidArgumentError(None, None, "shapes"), TWO), (UNAVAILABLE, Cluster())]
)
def test_what_no_peer_is_to_blame_for_stays_what_it_is(error: tf.errors.OpError, cluster: Cluster) -> None:
    with pytest.raises(type(error)) as caught, naming_lost_peers(cluster):
        raise error
    assert caught.value is error
