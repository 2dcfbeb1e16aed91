"""Which strategy is chosen, as a table; the switches that reach TensorFlow, in processes of their own."""

import logging
import os
import subprocess
import sys

import pytest

from tests.helpers.processes import run_trainer
from tests.helpers.settings import SMALL
from trainer.cluster import Cluster
from trainer.config import Config
from trainer.errors import UserError
from trainer.runtime.strategy import Devices, choose
from trainer.train.block import check_replicas, fitting_batch_sizes

ALONE, SEVERAL, ONE = Cluster(), Cluster("TF_CONFIG", ("a:1", "b:1")), Cluster("TF_CONFIG", ("a:1",))


@pytest.mark.parametrize(
    ("wanted", "cluster", "devices", "name", "why"),
    [
        ("auto", ALONE, Devices(0, 0, 1), "one_device", "no GPU found"),
        ("auto", ALONE, Devices(1, 0, 1), "one_device", "one GPU"),
        ("auto", ALONE, Devices(8, 0, 1), "mirrored", "this machine has 8 GPUs"),
        ("auto", ALONE, Devices(0, 0, 2), "mirrored", "runtime.cpu_devices=2"),
        ("auto", ONE, Devices(2, 0, 1), "mirrored", "this machine has 2 GPUs"),
        ("auto", SEVERAL, Devices(0, 0, 1), "multi_worker_mirrored", "TF_CONFIG names 2 workers"),
        ("auto", SEVERAL, Devices(8, 0, 1), "multi_worker_mirrored", "TF_CONFIG names 2 workers"),
        ("auto", Cluster(tpu="local"), Devices(0, 0, 1), "tpu", "a TPU is named: local"),
        ("auto", ALONE, Devices(0, 4, 1), "tpu", "this machine has a TPU"),
        ("one_device", ALONE, Devices(8, 0, 1), "one_device", "asked for"),
        ("mirrored", ALONE, Devices(0, 0, 1), "mirrored", "asked for"),
        ("multi_worker_mirrored", SEVERAL, Devices(0, 0, 1), "multi_worker_mirrored", "asked for"),
        ("multi_worker_mirrored", ONE, Devices(0, 0, 1), "multi_worker_mirrored", "asked for"),
        ("tpu", ALONE, Devices(0, 0, 1), "tpu", "asked for"),
    ],
)
def test_the_choice_and_its_reason(wanted: str, cluster: Cluster, devices: Devices, name: str, why: str) -> None:
    choice = choose(wanted, cluster, devices)
    assert (choice.name, choice.why) == (name, why)


@pytest.mark.parametrize("wanted", ["one_device", "mirrored", "tpu"])
def test_a_strategy_of_one_process_is_refused_among_several_workers(wanted: str) -> None:
    with pytest.raises(UserError, match=f"^--strategy={wanted}: TF_CONFIG names 2 workers, each of which would train for itself"):
        choose(wanted, SEVERAL, Devices(0, 0, 1))


def test_several_workers_are_refused_where_none_are_named() -> None:
    with pytest.raises(UserError, match=r"^--strategy=multi_worker_mirrored: the environment names no workers; set TF_CONFIG"):
        choose("multi_worker_mirrored", ALONE, Devices(2, 0, 1))


NO_GPU = Devices(0, 0, 1, gpus_missing=True)


def test_software_for_gpus_without_a_gpu_is_no_way_to_mirror() -> None:
    line = (
        "--strategy=mirrored: TensorFlow was built for GPUs, but sees none: is the NVIDIA driver on the host, and the container "
        "run with --gpus all? --set runtime.cpu_devices=2 or CUDA_VISIBLE_DEVICES= asks for the CPU"
    )
    with pytest.raises(UserError) as caught:
        choose("mirrored", ALONE, NO_GPU)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("wanted", "cluster", "devices", "warns"),
    [
        ("auto", ALONE, NO_GPU, True),
        ("one_device", ALONE, NO_GPU, True),
        ("multi_worker_mirrored", SEVERAL, NO_GPU, True),
        ("tpu", ALONE, NO_GPU, False),
        ("auto", ALONE, Devices(0, 0, 1), False),
    ],
)
def test_software_for_gpus_without_a_gpu_is_warned_of(
    wanted: str, cluster: Cluster, devices: Devices, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("trainer").propagate = True
    choose(wanted, cluster, devices)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warns
    assert ("--gpus all" in caplog.text and "NVIDIA driver" in caplog.text) == warns


@pytest.mark.parametrize(
    ("batch", "microbatches", "replicas", "line"),
    [
        (1, 1, 2, "train.batch_size: got 1, allowed: a multiple of 2 for 2 replicas, such as 2"),
        (7, 1, 4, "train.batch_size: got 7, allowed: a multiple of 4 for 4 replicas, such as 4 or 8"),
        (6, 2, 2, "train.batch_size: got 6, allowed: a multiple of 4 for 2 replicas times 2 microbatches, such as 4 or 8"),
        (3, 2, 1, "train.batch_size: got 3, allowed: a multiple of 2 for 2 microbatches, such as 2 or 4"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(
    batch: int, microbatches: int, replicas: int, line: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_replicas(Config.model_validate({"train": {"batch_size": batch, "microbatches": microbatches}}), replicas)
    assert str(caught.value) == line


@pytest.mark.parametrize(("batch", "parts", "sizes"), [(1, 2, (2, 2)), (5, 2, (4, 6)), (9, 8, (8, 16)), (1, 3, (3, 3))])
def test_the_nearest_sizes(batch: int, parts: int, sizes: tuple[int, int]) -> None:
    assert fitting_batch_sizes(batch, parts) == sizes


def test_the_sample_alone_is_adapted_and_says_so(tmp_path: object) -> None:
    three = ("--strategy=mirrored", "--set=runtime.cpu_devices=3", *(f"--set={setting}" for setting in SMALL))
    done = run_trainer(f"--model_dir={tmp_path}/run", *three, "--set=train.steps=4", "--set=train.evaluate_every=0")
    assert done.returncode == 0, done.stderr
    assert "train.batch_size: the sample's 1 becomes 3, for 3 replicas" in done.stderr
    again = run_trainer(
        f"--model_dir={tmp_path}/run", *(f"--set={setting}" for setting in SMALL), "--set=train.steps=4", "--dry_run"
    )
    assert "one_device (no GPU found): replicas: 1, pairs for each: 3" in again.stdout, "what the run began with stays"
    assert "strategy mirrored (asked for): 3 replicas on CPUs" in done.stderr
    chosen = run_trainer(f"--model_dir={tmp_path}/other", *three, "--set=train.batch_size=4")
    assert chosen.returncode == 2
    assert "train.batch_size: got 4, allowed: a multiple of 3 for 3 replicas, such as 3 or 6" in chosen.stderr


def test_without_a_tpu_the_strategy_says_so(tmp_path: object) -> None:
    done = run_trainer(f"--model_dir={tmp_path}/run", "--strategy=tpu")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("trainer: --strategy=tpu: this machine can use no TPU as 'local' (")
    assert len(done.stderr.strip().splitlines()[-1]) < 250


SWITCHES = """
import tensorflow as tf
from tensorflow.python.framework import config
from trainer.config import RuntimeConfig
from trainer.runtime.strategy import configure_devices
devices = configure_devices(RuntimeConfig(cpu_devices=3, tf32=False, deterministic=True))
assert len(tf.config.list_logical_devices("CPU")) == 3
assert not tf.config.experimental.tensor_float_32_execution_enabled()
assert config.is_op_determinism_enabled()
assert devices.mirrored == ["CPU:0", "CPU:1", "CPU:2"], devices
"""


def test_the_switches_reach_tensorflow() -> None:
    done = subprocess.run([sys.executable, "-c", SWITCHES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


MISSING = """
import sys
import tensorflow as tf
from trainer.config import RuntimeConfig
from trainer.runtime.strategy import configure_devices
tf.test.is_built_with_cuda = lambda: sys.argv[1] == "cuda"
print(configure_devices(RuntimeConfig(cpu_devices=int(sys.argv[2]))).gpus_missing)
"""


@pytest.mark.parametrize(
    ("built", "cpu_devices", "visible", "missing"),
    [("cuda", 1, None, True), ("cuda", 1, "0", True), ("cuda", 1, "", False), ("cuda", 2, None, False), ("cpu", 1, None, False)],
)
def test_gpus_are_missing_where_nobody_asked_for_the_cpu(
    built: str, cpu_devices: int, visible: str | None, missing: bool
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    command = [sys.executable, "-c", MISSING, built, str(cpu_devices)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == f"{missing}\n", done.stderr
