"""The environment -> where this process stands among others. It is handed the mapping and loads no TensorFlow.

Four schedulers speak four dialects; each is turned into the same value:

TF_CONFIG                             TensorFlow's own, set by Vertex AI, Kubeflow and by hand
CLUSTER_SPEC                          Vertex AI, which numbers worker pools: 0 the chief, 1 workers, 2 servers, 3 evaluators
JOB_COMPLETION_INDEX, TRAINER_...     an Indexed Job of Kubernetes: its pods are JOB-0.SERVICE, JOB-1.SERVICE and so on
TPU_NAME, TPU_...                     a TPU of this host
"""

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.errors import UserError

LEGACY_KERAS = "TF_USE_LEGACY_KERAS"
DEFAULT_PORT = 2222
Role = Literal["worker", "evaluator"]

_POOLS = {"workerpool0": "chief", "workerpool1": "worker", "workerpool2": "ps", "workerpool3": "evaluator"}
_ADDRESS = re.compile(r"^(\[[0-9a-fA-F:.]+\]|[^\s/:]+):(\d{1,5})$")
_JOBS = ("chief", "master", "worker", "ps", "evaluator")
HIGHEST_PORT = 65535
_TPU_SIGNS = ("TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID")


@dataclass(frozen=True)
class VertexFolders:
    """Where Vertex AI wants what a job writes; None where it says nothing (without baseOutputDirectory it never does)."""

    model: str | None = None
    checkpoints: str | None = None
    summaries: str | None = None


@dataclass(frozen=True)
class Cluster:
    """All workers, and which of them this process is.

    Attributes:
        source: the variable that said so, for messages; empty for a process alone.
        workers: host:port of each worker, the chief first; empty for a process alone.
        index: this process's place in `workers`.
        role: an evaluator is no worker: it never takes part in a step.
        tpu: the TPU's name, `local` for this host's own; None without one.
        folders: where Vertex AI wants the results.
        trial: the tuning trial of Vertex AI; empty outside one.
    """

    source: str = ""
    workers: tuple[str, ...] = ()
    index: int = 0
    role: Role = "worker"
    tpu: str | None = None
    folders: VertexFolders = VertexFolders()
    trial: str = ""

    @property
    def size(self) -> int:
        """Processes that train together."""
        return max(1, len(self.workers))

    @property
    def is_chief(self) -> bool:
        """Whether this process writes what all of them compute."""
        return self.index == 0 and self.role == "worker"


def read_cluster(environment: Mapping[str, str]) -> Cluster:
    """Work out the cluster from the environment.

    Raises:
        UserError: a variable is broken, or two contradict each other.
    """
    found = [cluster for read in (_from_tf_config, _from_vertex, _from_job) if (cluster := read(environment))]
    for other in found[1:]:
        first = found[0]
        if (other.workers, other.index, other.role) != (first.workers, first.index, first.role):
            raise UserError(f"{first.source} says {_place(first)} and {other.source} says {_place(other)}; unset one of them")
    cluster = found[0] if found else Cluster()
    tpu = _tpu(environment)
    if tpu and cluster.size > 1:
        raise UserError(
            f"{cluster.source} names {cluster.size} workers beside a TPU; only the TPUs of a single host are supported"
        )
    trial = next((one.trial for one in found if one.trial), "")
    return Cluster(cluster.source, cluster.workers, cluster.index, cluster.role, tpu, _vertex_folders(environment), trial)


def _place(cluster: Cluster) -> str:
    return f"{cluster.role} {cluster.index} of {', '.join(cluster.workers) or 'no others'}"


def _json(name: str, text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: is not JSON: {error.msg} at character {error.pos}") from error
    if not isinstance(document, dict):
        raise UserError(f"{name}: allowed: a mapping with cluster and task; got {text[:60]}")
    return document


def _from_tf_config(environment: Mapping[str, str]) -> Cluster | None:
    text = environment.get("TF_CONFIG", "").strip()
    return _from_tables("TF_CONFIG", _json("TF_CONFIG", text)) if text else None


def _from_vertex(environment: Mapping[str, str]) -> Cluster | None:
    """CLUSTER_SPEC, its pools renamed as TF_CONFIG names the same processes."""
    text = environment.get("CLUSTER_SPEC", "").strip()
    if not text:
        return None
    document = _json("CLUSTER_SPEC", text)
    cluster, task = _table("CLUSTER_SPEC", document, "cluster"), _table("CLUSTER_SPEC", document, "task")
    unknown = {*cluster, *([task["type"]] if "type" in task else [])} - set(_POOLS)
    if unknown:
        raise UserError(f"CLUSTER_SPEC: unknown pool {sorted(unknown)[0]!r}; allowed: {', '.join(_POOLS)}")
    renamed = {_POOLS[pool]: addresses for pool, addresses in cluster.items()}
    if "type" in task:
        task = {**task, "type": _POOLS[task["type"]]}
    return _from_tables("CLUSTER_SPEC", {"cluster": renamed, "task": task})


def _table(name: str, document: Mapping[str, Any], key: str) -> dict[str, Any]:
    table = document.get(key) or {}
    if not isinstance(table, dict):
        raise UserError(f"{name}: {key}: allowed: a mapping; got {str(table)[:60]}")
    return table


def _from_tables(name: str, document: Mapping[str, Any]) -> Cluster | None:
    """A cluster from TF_CONFIG's two tables; parameter servers are left out of it."""
    cluster, task = _table(name, document, "cluster"), _table(name, document, "task")
    strange = sorted(set(cluster) - set(_JOBS))
    if strange:
        raise UserError(f"{name}: cluster.{strange[0]}: unknown; allowed: {', '.join(_JOBS)}")
    if "chief" in cluster and "master" in cluster:
        raise UserError(f"{name}: names both a chief and a master; they are the same: leave one out")
    chiefs = _addresses(name, cluster, "chief") or _addresses(name, cluster, "master")
    workers = (*chiefs, *_addresses(name, cluster, "worker"))
    if len(chiefs) > 1:
        raise UserError(f"{name}: names {len(chiefs)} chiefs; allowed: one")
    if len(set(workers)) < len(workers):
        raise UserError(f"{name}: names an address twice: {', '.join(workers)}")
    if not workers:
        return None
    role, index = _task(name, task, len(chiefs), len(workers))
    return Cluster(name, workers, index, role, trial=str(task.get("trial", "")))


def _addresses(name: str, cluster: Mapping[str, Any], job: str) -> tuple[str, ...]:
    listed = cluster.get(job) or []
    for address in listed if isinstance(listed, list) else [listed]:
        found = _ADDRESS.match(address) if isinstance(listed, list) and isinstance(address, str) else None
        if not found or not 0 < int(found[2]) <= HIGHEST_PORT:
            raise UserError(f"{name}: cluster.{job}: allowed: a list of host:port; got {str(address)[:60]!r}")
    return tuple(listed)


def _task(name: str, task: Mapping[str, Any], chiefs: int, workers: int) -> tuple[Role, int]:
    """Role and place of this process."""
    kind, index = task.get("type"), str(task.get("index", 0))
    if kind is None:
        if workers == 1:
            return "worker", 0
        raise UserError(f"{name}: names {workers} workers but no task.type; allowed: chief, worker or evaluator")
    if kind == "ps":
        raise UserError(
            f"{name}: this process is a parameter server; asynchronous updates do not train a GAN: leave its pool out"
        )
    if kind not in ("chief", "master", "worker", "evaluator"):
        raise UserError(f"{name}: task.type: got {kind!r}, allowed: chief, worker or evaluator")
    if kind == "evaluator":
        return "evaluator", 0
    least, most = (chiefs, workers) if kind == "worker" else (0, chiefs)
    if not index.isascii() or not index.isdigit() or int(index) >= most - least:
        raise UserError(f"{name}: task: {kind} {index} is not among the {most - least} of its kind in the cluster")
    return "worker", least + int(index)


def _from_job(environment: Mapping[str, str]) -> Cluster | None:
    """An Indexed Job; how many pods it has and what they are called, its manifest must say, for the pods are not told."""
    index, count = environment.get("JOB_COMPLETION_INDEX", ""), environment.get("TRAINER_WORKERS", "")
    if not count:
        if index not in ("", "0"):
            raise UserError(f"JOB_COMPLETION_INDEX={index}: set TRAINER_WORKERS too, or every pod of the Job trains alone")
        return None
    size = _number("TRAINER_WORKERS", count)
    if not index:
        raise UserError(f"TRAINER_WORKERS={size}: JOB_COMPLETION_INDEX is not set; an Indexed Job sets it for each of its pods")
    place = _number("JOB_COMPLETION_INDEX", index)
    if size == 1 and place == 0:
        return Cluster("TRAINER_WORKERS", (f"localhost:{DEFAULT_PORT}",))
    if place >= size:
        raise UserError(
            f"JOB_COMPLETION_INDEX={place}: TRAINER_WORKERS={size} leaves no such worker; make it the Job's completions"
        )
    missing = [name for name in ("TRAINER_JOB", "TRAINER_SERVICE") if not environment.get(name)]
    if missing:
        raise UserError(
            f"TRAINER_WORKERS={size}: set {' and '.join(missing)} too: the names of the Job and of its headless Service"
        )
    port = _number("TRAINER_PORT", environment.get("TRAINER_PORT") or str(DEFAULT_PORT))
    if not 0 < port <= HIGHEST_PORT:
        raise UserError(f"TRAINER_PORT={port}: allowed: 1 to {HIGHEST_PORT}")
    space = environment.get("TRAINER_NAMESPACE")
    domain = environment["TRAINER_SERVICE"] + (f".{space}.svc" if space else "")
    workers = tuple(f"{environment['TRAINER_JOB']}-{number}.{domain}:{port}" for number in range(size))
    return Cluster("JOB_COMPLETION_INDEX", workers, place)


def _number(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise UserError(f"{name}={text}: allowed: a whole number")
    return int(text)


def _tpu(environment: Mapping[str, str]) -> str | None:
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) > 1:
        raise UserError(f"TPU_WORKER_HOSTNAMES names {len(hosts)} hosts; only slices of a single host are supported")
    return environment.get("TPU_NAME") or ("local" if any(environment.get(name) for name in _TPU_SIGNS) else None)


def _vertex_folders(environment: Mapping[str, str]) -> VertexFolders:
    names = ("AIP_MODEL_DIR", "AIP_CHECKPOINT_DIR", "AIP_TENSORBOARD_LOG_DIR")
    for name in names:
        if environment.get(name) and not environment[name].startswith(("gs://", "/")):
            raise UserError(f"{name}={environment[name]}: allowed: gs://BUCKET/FOLDER or an absolute folder")
    return VertexFolders(*(environment.get(name) or None for name in names))


@dataclass(frozen=True)
class Container:
    """What the process is told of the container that it runs in.

    Attributes:
        notes: image and revision, if they are told, for the run's config.yaml.
        grace_seconds: the time between a signal and the end by force; None if it is not told.
        job: names the job of which this process is a try, so that the next try may take over from it; empty if it is not told.
    """

    notes: Mapping[str, str] = field(default_factory=dict)
    grace_seconds: int | None = None
    job: str = ""


def read_container(environment: Mapping[str, str]) -> Container:
    """TRAINER_IMAGE, TRAINER_REVISION, TRAINER_GRACE_SECONDS, and the job's name of Kubernetes or Vertex AI.

    Raises:
        UserError: the grace period is no number.
    """
    told = {"image": environment.get("TRAINER_IMAGE"), "revision": environment.get("TRAINER_REVISION")}
    grace = environment.get("TRAINER_GRACE_SECONDS")
    seconds = _number("TRAINER_GRACE_SECONDS", grace) if grace else None
    job = environment.get("TRAINER_JOB_UID") or environment.get("CLOUD_ML_JOB_ID") or ""
    return Container({name: value for name, value in told.items() if value}, seconds, job)


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse an environment in which training cannot work, before TensorFlow is loaded.

    Raises:
        UserError: TensorFlow is not installed, or Keras 2 is asked for.
    """
    if environment.get(LEGACY_KERAS, "0").lower() not in ("", "0", "false"):
        raise UserError(f"{LEGACY_KERAS}={environment[LEGACY_KERAS]}: this trainer is written for Keras 3; unset the variable")
    backend = environment.get("KERAS_BACKEND", "tensorflow")
    if backend != "tensorflow":
        raise UserError(f"KERAS_BACKEND={backend}: this trainer is written for TensorFlow; unset the variable")
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            "TensorFlow is not installed: pip install 'pix2pix-trainer[cpu]' for a machine without accelerator, "
            "[gpu] for NVIDIA GPUs, [tpu] for TPUs"
        )
