"""What comes before the first step: who may train together, what a run goes on with, and what is refused."""

import importlib.metadata
import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.ports import LOOPBACK, held_ports
from tests.helpers.settings import small_config
from trainer.cluster import Cluster
from trainer.config import leaves
from trainer.data import records
from trainer.data.pipeline import PairData
from trainer.errors import DivergedError, ExitCode, TrainerError, UserError
from trainer.runtime.ledger import Marker
from trainer.runtime.rendezvous import Message
from trainer.runtime.run_folder import RecordedFailure, RunFolder
from trainer.runtime.strategy import Devices
from trainer.train.begin import OWN_SETTINGS, Order, Preparation, is_finished

ONE_CPU = Devices(0, 0, 1)
CRC_OF_XXX = "d7ba8005"  # CRC-32C of the bytes xxx


def order(folder: Path, *settings: str, cluster: Cluster | None = None, adaptable: bool = False) -> Order:
    return Order(small_config(*settings), folder, cluster=cluster or Cluster(), adaptable=adaptable)


def prepare(folder: Path, *settings: str, replicas: int = 1, threads: int = 2, adaptable: bool = False) -> Preparation:
    """All that a process by itself does before it touches a device; the folder is let go of."""
    ready = Preparation(order(folder, *settings, adaptable=adaptable), replicas, threads)
    ready.by_itself()
    ready.folder._lock.close()
    return ready


def meet(folder: Path, chief: tuple[str, ...], worker: tuple[str, ...], have: Devices = ONE_CPU) -> list[Message | TrainerError]:
    """Let a chief and a worker with these settings meet over loopback: the plan that each comes to, or why it does not.

    Args:
        folder: the run's.
        chief, worker: the settings of each.
        have: the worker's devices; the chief has one CPU.
    """

    def come(index: int) -> Message | TrainerError:
        settings = ("runtime.rendezvous_seconds=20", *(chief, worker)[index])
        ready = Preparation(order(folder, *settings, cluster=Cluster("TF_CONFIG", addresses, index)), 2, 2)
        try:
            return ready.meet(have if index else ONE_CPU)
        except TrainerError as failure:
            return failure

    with held_ports(2) as ports, ThreadPoolExecutor(2) as pool:
        addresses = tuple(f"{LOOPBACK}:{port}" for port in ports)
        return list(pool.map(come, (0, 1)))


@pytest.fixture
def other_data(sample_folder: Path, tmp_path: Path) -> Path:
    """The sample's shards under a manifest that names one shard less: each pair is sound, but it is another set."""
    data = Path(shutil.copytree(sample_folder, tmp_path / "other"))
    manifest = records.read_manifest(data)
    fewer = manifest.splits | {"train": manifest.splits["train"][:1]}
    records.write_manifest(data, manifest.model_copy(update={"splits": fewer}))
    return data


def test_workers_may_have_paths_and_threads_of_their_own(sample_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sample_folder, tmp_path / "copy")
    own = (f"data.dir={copy}", "runtime.threads=3", "data.readers=5", "data.cache=memory", "data.read_ahead_mb=7")
    plans = meet(tmp_path / "run", ("train.batch_size=2", f"data.dir={sample_folder}"), ("train.batch_size=2", *own))
    assert plans[0] == plans[1]
    assert isinstance(plans[0], dict)
    assert (plans[0]["prefix"], plans[0]["finished"]) == (None, False)


@pytest.mark.parametrize("what", ["data", "devices", "seed", "train.ema_decay"])
def test_workers_that_would_train_something_else_are_refused(
    what: str, sample_folder: Path, other_data: Path, tmp_path: Path
) -> None:
    """Both end with the same line, which names what differs."""
    data = other_data if what == "data" else sample_folder
    setting = {"seed": "seed=7", "train.ema_decay": "train.ema_decay=0.9"}.get(what, "train.steps=9")
    chief = ("train.batch_size=2", "train.steps=9", f"data.dir={sample_folder}")
    have = Devices(0, 0, 2) if what == "devices" else ONE_CPU
    failures = meet(tmp_path / "run", chief, (*chief, f"data.dir={data}", setting), have)
    there, here = {
        "data": tuple(records.read_manifest(folder).digest() for folder in (other_data, sample_folder)),
        "devices": ("CPU:0, CPU:1", "CPU:0"),
        "seed": ("7", str(small_config().seed)),
        "train.ema_decay": ("0.9", str(small_config().train.ema_decay)),
    }[what]
    line = f"worker 1 runs with other settings than the chief: {what}: {there} there, {here} here; "
    line += "start all workers with the same command"
    assert [str(failure) for failure in failures] == [line, line]
    assert [failure.exit_code for failure in failures if isinstance(failure, TrainerError)] == [ExitCode.USER] * 2


def test_what_workers_must_share_is_every_setting_but_their_own_and_the_software(tmp_path: Path) -> None:
    config = small_config()
    shared = Preparation(order(tmp_path), 1, 2)._trains(Devices(2, 0, 1), "0123")
    of_software = {"trainer", "tensorflow", "keras"}
    assert set(shared) == {key for key, _ in leaves(config) if key not in OWN_SETTINGS} | of_software | {"devices", "data"}
    assert (shared["devices"], shared["data"]) == ("GPU:0, GPU:1", "0123")
    assert shared["keras"] == importlib.metadata.version("keras")
    assert shared["optimizer.learning_rate"] == str(config.optimizer.learning_rate)


@pytest.mark.parametrize(
    ("batch", "replicas", "microbatches", "size"),
    [(1, 1, 1, 1), (1, 3, 1, 3), (4, 2, 1, 4), (3, 2, 1, 4), (1, 2, 2, 4), (5, 4, 1, 8)],
)
def test_the_samples_batch_becomes_the_next_that_can_be_shared(
    batch: int, replicas: int, microbatches: int, size: int, tmp_path: Path
) -> None:
    settings = (f"train.batch_size={batch}", f"train.microbatches={microbatches}")
    adapted = Preparation(order(tmp_path, *settings, adaptable=True), replicas, 2).adapted()
    assert adapted == small_config(f"train.batch_size={size}", settings[1])


def test_a_batch_that_somebody_chose_is_refused_instead(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^train.batch_size: got 4, allowed: a multiple of 3 for 3 replicas, such as 3 or 6$"):
        Preparation(order(tmp_path, "train.batch_size=4"), 3, 2).adapted()


@pytest.mark.parametrize(("replicas", "size"), [(1, 6), (2, 6), (3, 6), (4, 4)])
def test_a_run_on_the_sample_goes_on_with_the_batch_that_it_began_with_if_it_can(
    replicas: int, size: int, tmp_path: Path
) -> None:
    RunFolder(tmp_path).write_config(small_config("train.batch_size=6"), {})
    adapted = Preparation(order(tmp_path, "train.batch_size=1", adaptable=True), replicas, 2).adapted()
    assert adapted.train.batch_size == size


def test_a_run_notes_what_its_bits_depend_on(sample_folder: Path, tmp_path: Path) -> None:
    settings = (f"data.dir={sample_folder}", "train.batch_size=8", "train.microbatches=2", "runtime.tf32=false")
    prepare(tmp_path, *settings, replicas=2, threads=5)
    noted = RunFolder(tmp_path).notes()
    assert noted["data"] == records.read_manifest(sample_folder).digest()
    expected = {"threads": "5", "replicas": "2", "workers": "1", "microbatches": "2", "tf32": "False", "deterministic": "False"}
    assert {name: noted[name] for name in expected} == expected
    assert noted["pairs normalised together"] == "2"
    assert noted["keras"] == importlib.metadata.version("keras")


@pytest.mark.parametrize(
    ("norm", "replicas", "threads", "lines"),
    [
        ("batch", 1, 2, []),
        ("batch", 1, 3, ["since the run began: threads 2 -> 3; results will agree to rounding, not bit for bit"]),
        (
            "batch",
            2,
            2,
            [
                "model.norm=batch normalises over 2 pairs at a time instead of 4: from here on it is another computation",
                "since the run began: replicas 1 -> 2, pairs normalised together 4 -> 2; "
                "results will agree to rounding, not bit for bit",
            ],
        ),
        ("instance", 2, 2, ["since the run began: replicas 1 -> 2; results will agree to rounding, not bit for bit"]),
    ],
)
def test_what_has_changed_since_a_run_began_is_warned_of(
    norm: str,
    replicas: int,
    threads: int,
    lines: list[str],
    sample_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = (f"data.dir={sample_folder}", "train.batch_size=4", f"model.norm={norm}")
    prepare(tmp_path, *settings)
    logging.getLogger("trainer").propagate = True
    caplog.clear()
    prepare(tmp_path, *settings, replicas=replicas, threads=threads)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == lines


def test_a_run_does_not_go_on_with_other_data(sample_folder: Path, other_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    prepare(run, f"data.dir={sample_folder}")
    noted = RunFolder(run).notes()
    line = f"^{run}: this run was trained on other data than {other_data}; use another --model_dir$"
    with pytest.raises(UserError, match=line):
        prepare(run, f"data.dir={other_data}")
    assert RunFolder(run).notes() == noted
    prepare(run, f"data.dir={shutil.copytree(sample_folder, tmp_path / 'moved')}")


@pytest.fixture
def failed(sample_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run that has diverged, and its data."""
    run, data = tmp_path / "run", Path(shutil.copytree(sample_folder, tmp_path / "data"))
    mark = prepare(run, f"data.dir={data}").mark()
    failure = DivergedError("step 3: a loss is not finite")
    RunFolder(run).record_failure(str(failure), failure.exit_code, mark)
    return run, data


def test_a_recorded_failure_is_told_again(failed: tuple[Path, Path]) -> None:
    run, data = failed
    for _ in range(2):
        with pytest.raises(RecordedFailure) as caught:
            prepare(run, f"data.dir={data}")
        assert str(caught.value) == (
            "step 3: a loss is not finite (nothing has changed since; to try all the same, remove " + f"{run}/failure.json)"
        )
        assert caught.value.exit_code == ExitCode.DIVERGED


@pytest.mark.parametrize("change", ["the file is removed", "a setting", "a shard that is as long as before"])
def test_a_recorded_failure_is_forgotten_after(change: str, failed: tuple[Path, Path]) -> None:
    run, data = failed
    if change == "the file is removed":
        (run / "failure.json").unlink()
    if change == "a shard that is as long as before":
        shard = data / records.read_manifest(data).splits["train"][0].file
        before = shard.stat()
        shard.write_bytes(shard.read_bytes())
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    steps = 9 if change == "a setting" else small_config().train.steps
    prepare(run, f"data.dir={data}", f"train.steps={steps}")
    assert not (run / "failure.json").exists()


@pytest.mark.parametrize(
    ("step", "pending", "measured", "finished"),
    [
        (9, False, [("test", 9)], True),
        (9, False, [("val", 9)], False),
        (9, False, [("test", 8)], False),
        (9, True, [("test", 9)], False),
        (8, False, [("test", 8)], False),
        (12, False, [("test", 12)], True),
    ],
)
def test_a_run_is_finished_when_the_test_split_is_measured_at_its_last_step(
    step: int, pending: bool, measured: list[tuple[str, int]], finished: bool, sample_folder: Path, tmp_path: Path
) -> None:
    config, folder = small_config("train.steps=9"), RunFolder(tmp_path)
    for split, at in measured:
        folder.add_metrics({"step": at, "split": split, "l1": 1.0})
    assert is_finished(Marker(step, pending, "step", {}), folder, PairData(sample_folder, config), config) == finished


def test_without_a_test_split_the_last_step_finishes_a_run(sample_folder: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(sample_folder, tmp_path / "data"))
    manifest = records.read_manifest(data)
    splits = {split: shards for split, shards in manifest.splits.items() if split != "test"}
    records.write_manifest(data, manifest.model_copy(update={"splits": splits}))
    config = small_config("train.steps=9")
    assert is_finished(Marker(9, False, "step", {}), RunFolder(tmp_path), PairData(data, config), config)


def test_a_run_starts_from_its_newest_whole_checkpoint(
    sample_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("trainer").propagate = True
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step, stated in ((3, 3), (6, 7)):
        prefix = f"step-{step:08d}-1"
        (folder / f"{prefix}.index").write_bytes(b"x" * step)
        marker = {"step": step, "pending": False, "prefix": prefix, "files": {f"{prefix}.index": [stated, CRC_OF_XXX]}}
        (folder / f"step-{step:08d}.json").write_text(json.dumps(marker))
    ready = prepare(tmp_path, f"data.dir={sample_folder}")
    assert ready.newest is not None
    assert (ready.newest.step, ready.newest.prefix) == (3, "step-00000003-1")
    assert "checkpoint of step 6 is damaged (step-00000006-1.index has 6 bytes instead of 7)" in caplog.text
