"""Which strategy is chosen, as a table; the switches that reach TensorFlow, in processes of their own."""

import json
import logging
from pathlib import Path

import pytest

from tests.helpers.processes import finish, run_trainer, start_program
from tests.helpers.settings import TINY, flags
from trainer.cluster import Cluster
from trainer.config import Config
from trainer.cores import usable_cores
from trainer.errors import UserError
from trainer.runtime.strategy import Choice, Devices, choose, count_replicas
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


THREE = ("--strategy=mirrored", "--set=runtime.cpu_devices=3")


def test_the_sample_alone_is_adapted_and_says_so(tmp_path: Path) -> None:
    settings = [*flags(tmp_path, *TINY), "--dry_run"]
    done = run_trainer(*settings, *THREE)
    assert done.returncode == 0, done.stderr
    assert "train.batch_size: the sample's 1 becomes 3, for 3 replicas" in done.stderr
    assert "strategy mirrored (asked for): replicas: 3, pairs for each: 1" in done.stdout
    chosen = run_trainer(*settings, *THREE, "--set=train.batch_size=4")
    assert chosen.returncode == 2
    assert "train.batch_size: got 4, allowed: a multiple of 3 for 3 replicas, such as 3 or 6" in chosen.stderr


@pytest.mark.slow
def test_what_the_samples_run_began_with_stays(tmp_path: Path) -> None:
    settings = flags(tmp_path, *TINY, "train.steps=2", "train.evaluate_every=0", "train.sample_every=0")
    done = run_trainer(*settings, *THREE)
    assert done.returncode == 0, done.stderr
    assert "train.batch_size: the sample's 1 becomes 3, for 3 replicas" in done.stderr
    assert "strategy mirrored (asked for): 3 replicas on CPUs" in done.stderr
    again = run_trainer(*settings, "--dry_run")
    assert "one_device (no GPU found): replicas: 1, pairs for each: 3" in again.stdout


def test_without_a_tpu_the_strategy_says_so(tmp_path: Path) -> None:
    done = run_trainer(f"--model_dir={tmp_path}/run", "--strategy=tpu")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("trainer: --strategy=tpu: this machine can use no TPU as 'local' (")
    assert len(done.stderr.strip().splitlines()[-1]) < 250


SWITCHES = """
import json, sys
import tensorflow as tf
from tensorflow.python.framework import config
from trainer.config import RuntimeConfig
from trainer.runtime.strategy import configure_devices, configure_threads
runtime = RuntimeConfig(**json.loads(sys.argv[1]))
threads, devices = configure_threads(runtime), configure_devices(runtime)
of = tf.config.threading
print(json.dumps({
    "devices": devices.mirrored,
    "made": len(tf.config.list_logical_devices("CPU")),
    "tf32": tf.config.experimental.tensor_float_32_execution_enabled(),
    "deterministic": config.is_op_determinism_enabled(),
    "threads": [threads, of.get_intra_op_parallelism_threads(), of.get_inter_op_parallelism_threads()],
}))
"""


def switched(**settings: object) -> dict[str, object]:
    """What TensorFlow says of itself after the switches were set, in a process of its own."""
    done = finish(start_program(SWITCHES, json.dumps(settings)))
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_the_switches_reach_tensorflow() -> None:
    found = switched(cpu_devices=3, tf32=False, deterministic=True, threads=5)
    names = ["CPU:0", "CPU:1", "CPU:2"]
    assert found == {"devices": names, "made": 3, "tf32": False, "deterministic": True, "threads": [5, 5, 5]}


def test_without_switches_there_is_one_cpu_of_all_cores() -> None:
    found = switched(tf32=True)
    assert found == {"devices": ["CPU:0"], "made": 1, "tf32": True, "deterministic": False, "threads": [usable_cores()] * 3}


MISSING = """
import json, os, sys
import tensorflow as tf
from trainer.config import RuntimeConfig
from trainer.runtime.strategy import configure_devices
built, cpu_devices, visible = json.loads(sys.argv[1])
os.environ.pop("CUDA_VISIBLE_DEVICES", None)
os.environ.update({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
tf.test.is_built_with_cuda = lambda: built == "cuda"
print(configure_devices(RuntimeConfig(cpu_devices=cpu_devices)).gpus_missing)
"""


@pytest.mark.parametrize(
    ("built", "cpu_devices", "visible", "missing"),
    [
        ("cuda", 1, None, True),
        ("cuda", 1, "0", True),
        ("cuda", 1, "", False),
        ("cuda", 1, "-1", False),
        ("cuda", 2, None, False),
        ("cpu", 1, None, False),
    ],
)
def test_gpus_are_missing_where_nobody_asked_for_the_cpu(
    built: str, cpu_devices: int, visible: str | None, missing: bool
) -> None:
    done = finish(start_program(MISSING, json.dumps([built, cpu_devices, visible])))
    assert done.stdout == f"{missing}\n", done.stderr


@pytest.mark.parametrize(
    ("choice", "cluster", "devices", "replicas"),
    [
        ("one_device", ALONE, Devices(8, 0, 1), 1),
        ("mirrored", ALONE, Devices(8, 0, 1), 8),
        ("mirrored", ALONE, Devices(0, 0, 3), 3),
        ("multi_worker_mirrored", SEVERAL, Devices(4, 0, 1), 8),
        ("multi_worker_mirrored", SEVERAL, Devices(0, 0, 2), 4),
    ],
)
def test_replicas_are_counted_over_all_workers(choice: str, cluster: Cluster, devices: Devices, replicas: int) -> None:
    assert count_replicas(Choice(choice, ""), cluster, devices) == replicas
