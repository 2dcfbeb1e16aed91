"""Environments of every scheduler, and broken ones, as tables; nothing here loads TensorFlow."""

import json
import subprocess
import sys

import pytest

from tests.helpers.clusters import vertex
from trainer.cluster import Cluster, VertexFolders, read_cluster, read_container
from trainer.errors import UserError

A, B, C = "10.0.0.1:2222", "10.0.0.2:2222", "10.0.0.3:2222"
POOLS = {"workerpool0": [A], "workerpool1": [B, C]}
JOB = {"TRAINER_JOB": "p2p", "TRAINER_SERVICE": "trainers", "TRAINER_WORKERS": "3"}


def tf_config(cluster: object, kind: str | None = None, index: object = 0) -> dict[str, str]:
    task = {} if kind is None else {"type": kind, "index": index}
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}


@pytest.mark.parametrize(
    ("environment", "workers", "index", "role"),
    [
        ({}, (), 0, "worker"),
        ({"TF_CONFIG": ""}, (), 0, "worker"),
        ({"TF_CONFIG": "{}"}, (), 0, "worker"),
        (tf_config({"worker": [A]}), (A,), 0, "worker"),
        (tf_config({"worker": [A, B]}, "worker", 1), (A, B), 1, "worker"),
        (tf_config({"worker": [A, B]}, "worker", "1"), (A, B), 1, "worker"),
        (tf_config({"chief": [A], "worker": [B, C]}, "chief"), (A, B, C), 0, "worker"),
        (tf_config({"chief": [A], "worker": [B, C]}, "worker", 0), (A, B, C), 1, "worker"),
        (tf_config({"master": [A], "worker": [B]}, "worker", 0), (A, B), 1, "worker"),
        (tf_config({"chief": [A], "worker": [B], "ps": [C]}, "worker", 0), (A, B), 1, "worker"),
        (tf_config({"chief": [A], "worker": [B]}, "evaluator", 0), (A, B), 0, "evaluator"),
        (vertex({"workerpool0": [A]}, "workerpool0"), (A,), 0, "worker"),
        (vertex(POOLS, "workerpool0"), (A, B, C), 0, "worker"),
        (vertex(POOLS, "workerpool1", 1), (A, B, C), 2, "worker"),
        (vertex(POOLS, "workerpool3"), (A, B, C), 0, "evaluator"),
        (vertex(POOLS, "workerpool1", 1) | tf_config({"chief": [A], "worker": [B, C]}, "worker", 1), (A, B, C), 2, "worker"),
        ({"JOB_COMPLETION_INDEX": "0"}, (), 0, "worker"),
        ({"JOB_COMPLETION_INDEX": "0", "TRAINER_WORKERS": "1"}, ("localhost:2222",), 0, "worker"),
        (tf_config({"worker": ["[::1]:2222", B]}, "worker", 1), ("[::1]:2222", B), 1, "worker"),
        (
            {"JOB_COMPLETION_INDEX": "2", **JOB},
            ("p2p-0.trainers:2222", "p2p-1.trainers:2222", "p2p-2.trainers:2222"),
            2,
            "worker",
        ),
        (
            {"JOB_COMPLETION_INDEX": "1", **JOB, "TRAINER_WORKERS": "2", "TRAINER_PORT": "80", "TRAINER_NAMESPACE": "gan"},
            ("p2p-0.trainers.gan.svc:80", "p2p-1.trainers.gan.svc:80"),
            1,
            "worker",
        ),
    ],
)
def test_the_place_among_the_workers(environment: dict[str, str], workers: tuple[str, ...], index: int, role: str) -> None:
    cluster = read_cluster(environment)
    assert (cluster.workers, cluster.index, cluster.role) == (workers, index, role)


@pytest.mark.parametrize(
    ("environment", "tpu"),
    [
        ({"TPU_NAME": "local"}, "local"),
        ({"TPU_NAME": "node-7"}, "node-7"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, "local"),
        ({"TPU_ACCELERATOR_TYPE": "v5litepod-8"}, "local"),
        ({"TPU_WORKER_ID": "0"}, "local"),
        ({"TPU_NAME": ""}, None),
    ],
)
def test_a_tpu(environment: dict[str, str], tpu: str | None) -> None:
    assert read_cluster(environment).tpu == tpu


def test_only_the_first_worker_is_the_chief_and_an_evaluator_never_is() -> None:
    chiefs = [Cluster("x", (A, B), 0).is_chief, Cluster("x", (A, B), 1).is_chief, Cluster("x", (A, B), 0, "evaluator").is_chief]
    assert chiefs == [True, False, False]
    assert (Cluster().is_chief, Cluster().size) == (True, 1)


def test_vertex_folders_and_trial() -> None:
    folders = {"AIP_MODEL_DIR": "gs://b/7/model/", "AIP_CHECKPOINT_DIR": "gs://b/7/checkpoints/"}
    cluster = read_cluster(vertex({"workerpool0": [A]}, "workerpool0", trial="7") | folders)
    assert cluster.folders == VertexFolders("gs://b/7/model/", "gs://b/7/checkpoints/", None)
    assert cluster.trial == "7"


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"TF_CONFIG": "{"}, "TF_CONFIG: is not JSON: "),
        ({"TF_CONFIG": "[1]"}, "TF_CONFIG: allowed: a mapping with cluster and task; got [1]"),
        (tf_config([A]), "TF_CONFIG: cluster: allowed: a mapping; got "),
        (tf_config({"worker": A}, "worker"), f"TF_CONFIG: cluster.worker: allowed: a list of host:port; got '{A}'"),
        (tf_config({"worker": ["a"]}, "worker"), "TF_CONFIG: cluster.worker: allowed: a list of host:port; got 'a'"),
        (tf_config({"worker": [A, A]}, "worker"), f"TF_CONFIG: names an address twice: {A}, {A}"),
        (tf_config({"chief": [A, B]}, "chief"), "TF_CONFIG: names 2 chiefs; allowed: one"),
        (tf_config({"chief": [A], "master": [B]}, "chief"), "TF_CONFIG: names both a chief and a master"),
        (tf_config({"worker": [A, B]}), "TF_CONFIG: names 2 workers but no task.type; allowed: chief, worker or evaluator"),
        (tf_config({"worker": [A, B]}, "worker", 2), "TF_CONFIG: task: worker 2 is not among the 2 of its kind in the cluster"),
        (tf_config({"worker": [A, B]}, "worker", -1), "TF_CONFIG: task: worker -1 is not among the 2 of its kind"),
        (tf_config({"worker": [A, B]}, "chief"), "TF_CONFIG: task: chief 0 is not among the 0 of its kind in the cluster"),
        (tf_config({"worker": [A, B]}, "cook"), "TF_CONFIG: task.type: got 'cook', allowed: chief, worker or evaluator"),
        (tf_config({"worker": [A], "ps": [B]}, "ps"), "TF_CONFIG: this process is a parameter server; asynchronous updates"),
        (vertex(POOLS, "workerpool2"), "CLUSTER_SPEC: this process is a parameter server"),
        (vertex({"pool": [A]}, "workerpool0"), "CLUSTER_SPEC: unknown pool 'pool'; allowed: workerpool0, "),
        (
            vertex(POOLS, "workerpool0") | tf_config({"chief": [A], "worker": [B]}, "chief"),
            f"TF_CONFIG says worker 0 of {A}, {B} and CLUSTER_SPEC says worker 0 of {A}, {B}, {C}; unset one of them",
        ),
        ({"JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETION_INDEX=1: set TRAINER_WORKERS too, or every pod"),
        ({"JOB_COMPLETION_INDEX": "3", **JOB}, "JOB_COMPLETION_INDEX=3: TRAINER_WORKERS=3 leaves no such worker"),
        ({"JOB_COMPLETION_INDEX": "x", **JOB}, "JOB_COMPLETION_INDEX=x: allowed: a whole number"),
        (
            {"TRAINER_WORKERS": "2"},
            "TRAINER_WORKERS=2: JOB_COMPLETION_INDEX is not set; an Indexed Job sets it for each of its pods",
        ),
        ({"JOB_COMPLETION_INDEX": "0", **JOB, "TRAINER_PORT": "70000"}, "TRAINER_PORT=70000: allowed: 1 to 65535"),
        (tf_config({"worker": ["a:70000"]}, "worker"), "TF_CONFIG: cluster.worker: allowed: a list of host:port; got 'a:70000'"),
        (tf_config({"worker": ["http://a:1"]}, "worker"), "TF_CONFIG: cluster.worker: allowed: a list of host:port; got 'http"),
        (
            tf_config({"workers": [A, B]}, "worker"),
            "TF_CONFIG: cluster.workers: unknown; allowed: chief, master, worker, ps, evalu",
        ),
        (
            {"JOB_COMPLETION_INDEX": "0", "TRAINER_WORKERS": "2"},
            "TRAINER_WORKERS=2: set TRAINER_JOB and TRAINER_SERVICE too: ",
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES names 2 hosts; only slices of a single host are supported"),
        (
            {"TPU_NAME": "local"} | tf_config({"worker": [A, B]}, "worker"),
            "TF_CONFIG names 2 workers beside a TPU; only the TPUs of a single host are supported",
        ),
        ({"AIP_MODEL_DIR": "model"}, "AIP_MODEL_DIR=model: allowed: gs://BUCKET/FOLDER or an absolute folder"),
    ],
)
def test_a_broken_or_contradictory_environment_gets_one_line(environment: dict[str, str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        read_cluster(environment)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_it_loads_no_tensorflow() -> None:
    program = "import sys, trainer.cluster; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_what_is_told_of_the_container() -> None:
    told = read_container({"TRAINER_IMAGE": "trainer@sha256:1", "TRAINER_REVISION": "", "TRAINER_GRACE_SECONDS": "30"})
    assert (dict(told.notes), told.grace_seconds) == ({"image": "trainer@sha256:1"}, 30)
    assert (dict(read_container({}).notes), read_container({}).grace_seconds) == ({}, None)
    with pytest.raises(UserError, match=r"^TRAINER_GRACE_SECONDS=1m: allowed: a whole number$"):
        read_container({"TRAINER_GRACE_SECONDS": "1m"})
