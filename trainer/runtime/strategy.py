"""Cluster and devices -> tf.distribute.Strategy: the first TensorFlow act of the process.

MultiWorkerMirroredStrategy must come before any TensorFlow operation, variable or data set; whoever calls `build` has made
none.
"""

import faulthandler
import logging
from dataclasses import dataclass

import tensorflow as tf
from tensorflow.python.distribute import collective_all_reduce_strategy

from trainer.cluster import Cluster
from trainer.config import RuntimeConfig
from trainer.cores import usable_cores
from trainer.errors import PeerLostError, UserError
from trainer.startup import gpus_are_hidden

log = logging.getLogger(__name__)
BUILDING_SECONDS = 300  # after the rendezvous all peers are there, and building takes a few


@dataclass(frozen=True)
class Devices:
    """What this process has to compute on: numbers of GPUs, TPU cores, and devices that the CPU is split into.

    `gpus_missing`: the software is for GPUs, nobody asked for the CPU, and yet there is no GPU.
    """

    gpus: int
    tpus: int
    cpus: int
    gpus_missing: bool = False

    @property
    def mirrored(self) -> list[str]:
        """The devices that one process can mirror its variables over."""
        kind, number = ("GPU", self.gpus) if self.gpus else ("CPU", self.cpus)
        return [f"{kind}:{place}" for place in range(number)]


@dataclass(frozen=True)
class Choice:
    """A strategy by its name on the command line, and why it was chosen."""

    name: str
    why: str


def configure_threads(runtime: RuntimeConfig) -> int:
    """Pin TensorFlow's threads, because the bits of a sum depend on how it was divided; return the number."""
    threads = runtime.threads or usable_cores()
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    return threads


def configure_devices(runtime: RuntimeConfig) -> Devices:
    """Apply the switches of `runtime` to the devices, and count them.

    Raises:
        UserError: the CPU is to be split on a machine with GPUs.
    """
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, runtime.memory_growth)
    tf.config.experimental.enable_tensor_float_32_execution(runtime.tf32)
    if runtime.deterministic:
        tf.config.experimental.enable_op_determinism()
    if runtime.cpu_devices > 1 and gpus:
        raise UserError("runtime.cpu_devices: this machine has GPUs, which are used instead; CUDA_VISIBLE_DEVICES= hides them")
    if runtime.cpu_devices > 1:
        parts = [tf.config.LogicalDeviceConfiguration()] * runtime.cpu_devices
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], parts)
    missing = not gpus and runtime.cpu_devices == 1 and tf.test.is_built_with_cuda() and not gpus_are_hidden()
    return Devices(len(gpus), len(tf.config.list_physical_devices("TPU")), runtime.cpu_devices, missing)


def choose(wanted: str, cluster: Cluster, devices: Devices) -> Choice:
    """Decide on a strategy; `auto` takes the one that uses all there is.

    Raises:
        UserError: what is wanted would leave workers out, or they or the GPUs are missing.
    """
    if devices.gpus_missing:
        _say_that_gpus_are_missing(wanted)
    if wanted == "auto":
        return _automatic(cluster, devices)
    if cluster.size > 1 and wanted != "multi_worker_mirrored":
        raise UserError(
            f"--strategy={wanted}: {cluster.source} names {cluster.size} workers, each of which would train for itself into one "
            "folder; use --strategy=multi_worker_mirrored"
        )
    if wanted == "multi_worker_mirrored" and not cluster.workers:
        raise UserError(
            "--strategy=multi_worker_mirrored: the environment names no workers; set TF_CONFIG (or CLUSTER_SPEC, or "
            "JOB_COMPLETION_INDEX with TRAINER_WORKERS), or use --strategy=mirrored for the devices of one machine"
        )
    return Choice(wanted, "asked for")


def _say_that_gpus_are_missing(wanted: str) -> None:
    """Nobody should pay for a machine with GPUs and train on its CPU.

    Raises:
        UserError: replicas on GPUs were asked for.
    """
    why = "TensorFlow was built for GPUs, but sees none: is the NVIDIA driver on the host, and the container run with --gpus all?"
    if wanted == "mirrored":
        raise UserError(f"--strategy=mirrored: {why} --set runtime.cpu_devices=2 or CUDA_VISIBLE_DEVICES= asks for the CPU")
    if wanted != "tpu":
        log.warning("%s The CPU trains; CUDA_VISIBLE_DEVICES= asks for that without a warning", why)


def _automatic(cluster: Cluster, devices: Devices) -> Choice:
    if cluster.tpu or devices.tpus:
        return Choice("tpu", f"a TPU is named: {cluster.tpu}" if cluster.tpu else "this machine has a TPU")
    if cluster.size > 1:
        return Choice("multi_worker_mirrored", f"{cluster.source} names {cluster.size} workers")
    if devices.gpus > 1:
        return Choice("mirrored", f"this machine has {devices.gpus} GPUs")
    if devices.gpus == 0 and devices.cpus > 1:
        return Choice("mirrored", f"runtime.cpu_devices={devices.cpus}")
    return Choice("one_device", "one GPU" if devices.gpus else "no GPU found")


def count_replicas(choice: Choice, cluster: Cluster, devices: Devices) -> int:
    """How many replicas a strategy of this host's devices will have, before it is built; not for TPUs, which tell only then."""
    if choice.name == "one_device":
        return 1
    return len(devices.mirrored) * (cluster.size if choice.name == "multi_worker_mirrored" else 1)


def build(choice: Choice, cluster: Cluster, devices: Devices) -> tf.distribute.Strategy:
    """Make the strategy.

    Raises:
        UserError: there is no TPU.
        PeerLostError: the port of this worker is taken, or a peer went away.
    """
    if choice.name == "one_device":
        return tf.distribute.OneDeviceStrategy(f"/{devices.mirrored[0].lower()}")
    if choice.name == "mirrored":
        return tf.distribute.MirroredStrategy(devices.mirrored)
    return _tpu(cluster) if choice.name == "tpu" else _multi_worker(cluster, devices)


def _tpu(cluster: Cluster) -> tf.distribute.Strategy:
    name = cluster.tpu or "local"
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0].split(" with these attrs")[0][:120]
        raise UserError(f"--strategy=tpu: this machine can use no TPU as {name!r} ({reason})") from error


class _CpuWorkers(collective_all_reduce_strategy.CollectiveAllReduceExtended):
    """The public strategy takes one CPU of each worker; this takes all that runtime.cpu_devices made, to try it out."""

    devices: Devices

    def _initialize_local_devices(self, cluster_resolver: object, worker_device: str) -> tuple[tuple[str, ...], str]:
        return tuple(f"{worker_device}/device:{name}" for name in self.devices.mirrored), "CPU"


class _MultiCpuStrategy(tf.distribute.MultiWorkerMirroredStrategy):
    def __init__(self, resolver: object, devices: Devices) -> None:
        extended = type("CpuWorkers", (_CpuWorkers,), {"devices": devices})
        options = tf.distribute.experimental.CommunicationOptions()
        tf.distribute.Strategy.__init__(self, extended(self, cluster_resolver=resolver, communication_options=options))
        self._cluster_resolver = resolver


def _multi_worker(cluster: Cluster, devices: Devices) -> tf.distribute.Strategy:
    """All workers form one job, so that worker 0 is the chief whatever the scheduler calls it."""
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(cluster.workers)}),
        task_type="worker",
        task_id=cluster.index,
        num_accelerators={"GPU": devices.gpus},
        rpc_layer="grpc",
    )
    several = not devices.gpus and devices.cpus > 1
    # Building holds the interpreter's lock, so only a thread of C can end a wait for a peer that died meanwhile.
    faulthandler.dump_traceback_later(BUILDING_SECONDS, exit=True, file=2)
    try:
        return _MultiCpuStrategy(resolver, devices) if several else tf.distribute.MultiWorkerMirroredStrategy(resolver)
    except tf.errors.OpError as error:
        own, reason = cluster.workers[cluster.index], error.message.strip().splitlines()[0]
        raise PeerLostError(f"worker {cluster.index} cannot join the others at {own}: {reason}; run all workers again") from error
    finally:
        faulthandler.cancel_dump_traceback_later()


def describe(strategy: tf.distribute.Strategy, devices: Devices, threads: int) -> str:
    """The devices in words."""
    replicas = strategy.num_replicas_in_sync
    if isinstance(strategy, tf.distribute.TPUStrategy):
        return f"{replicas} TPU cores"
    kind = "GPU" if devices.gpus else "CPU"
    if replicas == 1:
        alone = "" if isinstance(strategy, tf.distribute.OneDeviceStrategy) else "one replica: "
        return alone + ("one GPU" if devices.gpus else f"the CPU, {threads} threads")
    return f"{replicas} replicas on {kind}s" + ("" if devices.gpus else f", {threads} threads here")
