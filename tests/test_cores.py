"""How many threads and processes compute: as many as there are cores, and as a container may use."""

from pathlib import Path

import pytest

from trainer.config import RuntimeConfig
from trainer.cores import quota, usable_cores
from trainer.data.workers import Workers
from trainer.runtime import strategy


@pytest.mark.parametrize(
    ("file", "content", "cores"),
    [
        ("cpu.max", "100000 100000\n", 1),
        ("cpu.max", "150000 100000\n", 2),
        ("cpu.max", "50000 100000\n", 1),
        ("cpu.max", "400000 100000\n", 4),
        ("cpu.max", "max 100000\n", None),
        ("cpu.max", "", None),
        ("cpu.max", "-1 -1", None),
        ("cpu/cpu.cfs_quota_us", "250000\n", 3),
        ("cpu/cpu.cfs_quota_us", "-1\n", None),
        ("cpu/cpu.cfs_quota_us", "much\n", None),
    ],
)
def test_the_limit_of_a_container_in_cores(file: str, content: str, cores: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / file).write_text(content)
    assert quota(tmp_path) == cores


def test_no_limit_is_no_limit(tmp_path: Path) -> None:
    assert quota(tmp_path) is None


@pytest.mark.parametrize(("limit", "cores"), [(None, 8), (3, 3), (64, 8), (1, 1)])
def test_threads_and_processes_are_as_many_as_can_compute(limit: int | None, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr("os.cpu_count", lambda: 96)
    monkeypatch.setattr("trainer.cores.quota", lambda: limit)
    monkeypatch.setattr("tensorflow.config.threading.set_intra_op_parallelism_threads", threads.append)
    monkeypatch.setattr("tensorflow.config.threading.set_inter_op_parallelism_threads", threads.append)
    assert usable_cores() == cores
    assert strategy.configure_threads(RuntimeConfig()) == cores
    assert threads == [cores, cores]
    assert Workers(0)._processes == cores
    assert strategy.configure_threads(RuntimeConfig(threads=5)) == 5
