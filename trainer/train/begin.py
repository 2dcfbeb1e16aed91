"""All that comes before the first step: devices, data, the run's folder, the other workers; then the strategy.

MultiWorkerMirroredStrategy has to be TensorFlow's first act, and TensorFlow waits for missing workers in silence. So whatever
can be found wrong is found before it, in plain Python, and the workers meet without TensorFlow first.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import tensorflow as tf

from trainer.cluster import Cluster, Container
from trainer.config import Config, leaves
from trainer.data.pipeline import PairData
from trainer.data.sample import ensure_sample
from trainer.errors import TrainerError, UserError
from trainer.runtime import strategy as devices
from trainer.runtime.bucket_checkpoints import checkpoints_in
from trainer.runtime.folders import open_folder
from trainer.runtime.ledger import Marker
from trainer.runtime.preemption import hold_signals
from trainer.runtime.rendezvous import Message, Rendezvous
from trainer.runtime.run_folder import DEAD_NODE_SECONDS, LOCK_SECONDS, SEE_SECONDS, RunFolder, fingerprint
from trainer.runtime.strategy import Choice, Devices
from trainer.runtime.versions import run_notes, warn_of_changes, with_earlier
from trainer.storage.bucket import BucketPath
from trainer.storage.places import Place, place
from trainer.train.block import check_replicas, fitting_batch_sizes

log = logging.getLogger(__name__)

# Each worker may have its own paths and threads; all else must be the same.
OWN_SETTINGS = ("data.dir", "data.cache", "data.readers", "data.read_ahead_mb", "runtime.threads", "runtime.rendezvous_seconds")


@dataclass(frozen=True)
class Order:
    """What the command line and the environment ask for.

    Attributes:
        config: the settings.
        model_dir: the run's folder.
        wanted: the strategy by name.
        cluster: where this process stands.
        container: what is known of the container around this process.
        adaptable: the batch size is nobody's wish, so it may be raised to a multiple of the replicas.
        failure: what this worker has found wrong already, and the others have to be told.
    """

    config: Config
    model_dir: Place
    wanted: str = "auto"
    cluster: Cluster = field(default_factory=Cluster)
    container: Container = field(default_factory=Container)
    adaptable: bool = False
    failure: TrainerError | None = None


@dataclass(frozen=True)
class Start:
    """What a run starts with.

    Attributes:
        config: the settings, the batch size adapted.
        folder, data: what they say.
        newest: the checkpoint to go on from, the same on all workers; None at the beginning.
        finished: there is nothing left to do.
        mark: the fingerprint of config and data, under which a failure is recorded.
        build: makes the strategy; from then on signals are kept back until a StopSignal hears them.
    """

    config: Config
    folder: RunFolder
    data: PairData
    newest: Marker | None
    finished: bool
    mark: str
    build: Callable[[], tf.distribute.Strategy]


def begin(order: Order) -> Start:
    """Make everything ready for the first step, up to the strategy.

    Raises:
        UserError: config, data, devices, folder or environment must change first.
        PeerLostError: a worker did not come.
    """
    threads = devices.configure_threads(order.config.runtime)
    have = devices.configure_devices(order.config.runtime)
    choice = devices.choose(order.wanted, order.cluster, have)
    alone = devices.build(choice, order.cluster, have) if choice.name != "multi_worker_mirrored" else None
    replicas = alone.num_replicas_in_sync if alone else devices.count_replicas(choice, order.cluster, have)
    ready = Preparation(order, replicas, threads)
    plan = ready.meet(have) if alone is None else ready.by_itself()

    def build() -> tf.distribute.Strategy:
        hold_signals()
        strategy = alone or devices.build(choice, order.cluster, have)
        ready.say_what_begins(choice, devices.describe(strategy, have, threads))
        return strategy

    return ready.start(plan, build)


class Preparation:
    """The folder, the data and the checkpoint of a run, before any device is touched."""

    def __init__(self, order: Order, replicas: int, threads: int) -> None:
        self._order, self._replicas, self._threads = order, replicas, threads
        self.folder = open_folder(order.model_dir, order.cluster.folders, writes=order.cluster.is_chief)
        self.config = order.config
        self.data: PairData | None = None
        self.newest: Marker | None = None

    def by_itself(self) -> Message:
        """Prepare a process without peers."""
        self._look_at_own()
        plan = self.as_chief()
        self._check_failure([])
        return plan

    def meet(self, have: Devices) -> Message:
        """Come to the rendezvous, with what was found here."""
        failure = self._order.failure or self._failure_of(self._look_at_own)
        digest = self.data.manifest.digest() if self.data else "the packaged sample"
        seconds, mark = self.config.runtime.rendezvous_seconds, self.mark() if self.data else ""
        meeting = Rendezvous(self._order.cluster, self._trains(have, digest), seconds, mark)
        if not self._order.cluster.is_chief:
            return meeting.as_worker(self._follow, failure)

        def prepare() -> Message:
            if failure:
                raise failure
            return self.as_chief()

        return meeting.as_chief(prepare, self._check_failure)

    def mark(self) -> str:
        """The fingerprint of what this worker trains, and on which files."""
        data = self._data()
        return fingerprint(self.config, data.folder if self.config.data.dir else None)

    def _check_failure(self, marks_of_others: list[str]) -> None:
        self.folder.check_failure({self.mark(), *marks_of_others})

    @staticmethod
    def _failure_of(act: Callable[[], None]) -> TrainerError | None:
        try:
            act()
        except TrainerError as failure:
            return failure
        return None

    def _trains(self, have: Devices, digest: str) -> dict[str, str]:
        """What must be the same on every worker, by name."""
        settings = {key: str(value) for key, value in leaves(self._order.config) if key not in OWN_SETTINGS}
        return settings | {"devices": ", ".join(have.mirrored), "data": digest} | software(run_notes(0, ""))

    def _look_at_own(self) -> None:
        """Find out what can be known without writing anything."""
        self.config = self.adapted()
        if self.config.data.dir:
            self.data = PairData(place(self.config.data.dir, "data.dir"), self.config).check_training()

    def adapted(self) -> Config:
        """The config; the sample's own batch size becomes a multiple of the replicas, or what its run began with, if it can.

        Raises:
            UserError: so many replicas cannot share the batch.
        """
        config = self._order.config
        train, parts = config.train, self._replicas * config.train.microbatches
        saved = self.folder.saved_config()
        began = saved.train.batch_size if saved else train.batch_size
        if self._order.adaptable and (train.batch_size % parts or began != train.batch_size):
            size = began if began % parts == 0 else fitting_batch_sizes(train.batch_size, parts)[1]
            log.info("train.batch_size: the sample's %d becomes %d, for %d replicas", train.batch_size, size, self._replicas)
            config = config.model_copy(update={"train": train.model_copy(update={"batch_size": size})})
        check_replicas(config, self._replicas)
        return config

    def as_chief(self) -> Message:
        """Claim the folder and choose the checkpoint; what all workers have to know."""
        self.folder.claim(DEAD_NODE_SECONDS if self._order.cluster.size > 1 else LOCK_SECONDS, self._order.container.job)
        self.folder.check_config(self.config)
        self._read_data(ensure_sample)
        newest = self.newest = self.folder.store(self.config.train.keep).newest_whole()
        finished = newest is not None and is_finished(newest, self.folder, self._data(), self.config)
        if not finished:
            self._note_what_runs()
        return {"token": self.folder.token, "prefix": newest.prefix if newest else None, "finished": finished}

    def _read_data(self, sample: Callable[[Path], Path]) -> None:
        if self.data is None:
            self.data = PairData(sample(self.folder.sample_data), self.config).check_training()

    def _data(self) -> PairData:
        assert self.data is not None
        return self.data

    def _note_what_runs(self) -> None:
        """Write config.yaml with versions, threads, replicas and data; say what changed since the run began.

        Raises:
            UserError: the run was trained on other data.
        """
        data, folder = self._data(), self.folder
        before = folder.notes()
        now = run_notes(self._threads, data.manifest.digest()) | self._notes_of_devices() | dict(self._order.container.notes)
        if before.get("data", now["data"]) != now["data"]:
            raise UserError(f"{folder.path}: this run was trained on other data than {data.folder}; use another --model_dir")
        warn_of_changes(before, now)
        folder.write_config(self.config, with_earlier(before, now))
        folder.write_data(data.manifest.about())

    def _follow(self, plan: Message) -> None:
        """See whether the chief's folder, and the checkpoint in it, are here too.

        Raises:
            UserError: this worker has another folder of that name.
        """
        where = f"--model_dir={self.folder.path}"
        advice = "every worker must see the same folder: put it on a shared file system, or in a bucket"
        if not self.folder.is_claimed_with(plan["token"]):
            raise UserError(f"{where}: is not the chief's folder but one of this host; {advice}")
        if plan["prefix"] and not self._find(plan["prefix"]):
            raise UserError(f"{where}: the chief goes on from {plan['prefix']}, which is not there; {advice}")
        self._read_data(ensure_sample if isinstance(self.folder.path, BucketPath) else lambda folder: folder)

    def _find(self, prefix: str) -> Marker | None:
        """The chief's checkpoint, which a network file system may show late."""
        deadline = time.monotonic() + SEE_SECONDS
        while not (marker := checkpoints_in(self.folder.checkpoints, 1).marker(prefix)) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.newest = marker
        return marker

    def _notes_of_devices(self) -> dict[str, str]:
        """What the bits depend on besides software, and with norm: batch what is computed."""
        config, runtime = self.config, self.config.runtime
        parts = self._replicas * config.train.microbatches
        together = {"pairs normalised together": str(config.train.batch_size // parts)} if config.model.norm == "batch" else {}
        counts = {"replicas": self._replicas, "workers": self._order.cluster.size, "microbatches": config.train.microbatches}
        switches = {"jit": runtime.jit, "tf32": runtime.tf32, "deterministic": runtime.deterministic}
        return {name: str(value) for name, value in (counts | switches).items()} | together

    def say_what_begins(self, choice: Choice, where: str) -> None:
        """Two lines, so that nobody trains for a day on the wrong thing."""
        data = self._data()
        source = data.folder if self.config.data.dir else "the packaged sample; --data_dir names another data set"
        log.info("strategy %s (%s): %s", choice.name, choice.why, where)
        pairs, name = data.train.examples, data.manifest.name
        if self.config.runtime.jit:
            log.info("runtime.jit: the first step compiles both networks, which can take minutes")
        log.info("training on %s (%s), %d pairs, into %s", name, source, pairs, self.folder.path)

    def start(self, plan: Message, build: Callable[[], tf.distribute.Strategy]) -> Start:
        """Everything together."""
        return Start(self.config, self.folder, self._data(), self.newest, plan["finished"], self.mark(), build)


def software(notes: dict[str, str]) -> dict[str, str]:
    """The versions among a run's notes."""
    return {name: notes[name] for name in ("trainer", "tensorflow", "keras")}


def is_finished(newest: Marker, folder: RunFolder, data: PairData, config: Config) -> bool:
    """Whether all steps are done, and the test split, if there is one, is measured."""
    measured = any(entry["split"] == "test" and entry["step"] == newest.step for entry in folder.metrics())
    return newest.step >= config.train.steps and not newest.pending and (measured or not data.split("test").examples)
