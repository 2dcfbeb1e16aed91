"""Summaries, pictures, files, meter, progress, cores and versions."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.events import Scalar, scalars_of
from trainer.config import RuntimeConfig
from trainer.cores import quota, usable_cores
from trainer.data.workers import Workers
from trainer.runtime import files, meter, pictures, strategy
from trainer.runtime.progress import Progress
from trainer.runtime.summaries import Summaries
from trainer.runtime.versions import warn_of_changes, with_earlier


def steps_in(folder: Path) -> list[Scalar]:
    return [scalar for path in sorted(folder.glob("*/events*")) for scalar in scalars_of(path)]


@pytest.fixture
def events(tmp_path: Path) -> Path:
    summaries = Summaries(tmp_path)
    for step in (1, 2, 3):
        summaries.scalars("train", {"loss": step / 2}, step)
    summaries.close()
    return tmp_path


def test_scalars_are_written(events: Path) -> None:
    assert steps_in(events) == [(1, "loss", 0.5), (2, "loss", 1.0), (3, "loss", 1.5)]


def test_events_after_a_step_are_cut_off(events: Path) -> None:
    Summaries(events).cut_after(2)
    assert steps_in(events) == [(1, "loss", 0.5), (2, "loss", 1.0)]


def test_torn_last_event_is_dropped_and_the_file_readable_again(events: Path) -> None:
    (path,) = events.glob("train/events*")
    path.write_bytes(path.read_bytes()[:-7])
    Summaries(events).cut_after(9)
    assert [step for step, _, _ in steps_in(events)] == [1, 2]


def test_whole_event_files_are_not_touched(events: Path) -> None:
    (path,) = events.glob("train/events*")
    before = path.stat().st_mtime_ns
    Summaries(events).cut_after(3)
    assert path.stat().st_mtime_ns == before


def test_grid_shows_each_image_in_its_place(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey, colour = (
        rng.integers(0, 256, (2, 2, 40, 50, 3), np.uint8)[0][..., :1],
        rng.integers(0, 256, (2, 40, 50, 4), np.uint8),
    )
    pictures.save_grid(tmp_path / "deep" / "grid.png", "step 5", [("input", grey), ("output", colour)])
    sheet = np.asarray(Image.open(tmp_path / "deep" / "grid.png"))
    top, left = 2 * pictures.HEADER + 44, 54
    assert sheet.shape == (2 * pictures.HEADER + 84, 104, 3)
    np.testing.assert_array_equal(sheet[top : top + 40, left : left + 50], colour[1][..., :3])
    np.testing.assert_array_equal(sheet[top : top + 40, :50], np.repeat(grey[1], 3, -1))
    assert (sheet[: pictures.HEADER] < 100).any(), "the title is drawn"


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_meter_leaves_the_compiling_block_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 30.0, 30.0, 31.0, 31.0, 32.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))
    measured = meter.Meter(batch_size=4)
    assert measured.steps_per_block() == 1
    for steps in (1, 10, 10):
        measured.start()
        measured.stop(steps)
    assert measured.images_per_second == pytest.approx(40.0)
    assert measured.steps_per_block() == 20


def test_without_a_terminal_progress_is_a_plain_line(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("trainer").propagate = True
    progress = Progress(0, 10, 2)
    with caplog.at_level(logging.INFO):
        progress.update(5, 3.0, {"l1": 9.0})
        progress.update(10, 3.0, {"discriminator": 0.5, "generator_gan": 1.25, "l1": 8.0})
    assert [record.message for record in caplog.records] == ["step 10/10  3.0 images/s  D 0.5  G 1.25  L1 8  left 0:00"]


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress(0, 10, 1)
    progress.update(5, 3.0, {"l1": 9.0})
    progress.close()
    assert "50%" in terminal.getvalue()
    assert "step 5/10" in terminal.getvalue()
    assert "L1 9" in terminal.getvalue()


def test_the_speed_of_a_disk_is_measured_and_nothing_left(tmp_path: Path) -> None:
    assert files.write_speed(tmp_path / "not" / "there") > 1
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize(
    ("changed", "lines"),
    [
        ({"image": "b"}, [("INFO", "since the run began: image a -> b")]),
        ({"image": "b", "revision": "2"}, [("INFO", "since the run began: image a -> b, revision 1 -> 2")]),
        ({"threads": "4"}, [("WARNING", "since the run began: threads 2 -> 4; results will agree to rounding, not bit for bit")]),
        ({}, []),
    ],
)
def test_another_image_changes_no_bits(
    changed: dict[str, str], lines: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("trainer").propagate = True
    before = {"threads": "2", "image": "a", "revision": "1"}
    with caplog.at_level(logging.INFO):
        warn_of_changes(before, before | changed)
    assert [(record.levelname, record.message) for record in caplog.records] == lines


@pytest.mark.parametrize(
    ("now", "image", "revision"),
    [
        ({}, "a", "1"),
        ({"revision": "1"}, "a", "1"),
        ({"revision": "2"}, None, "2"),
        ({"image": "b"}, "b", None),
        ({"image": "b", "revision": "2"}, "b", "2"),
    ],
)
def test_what_a_start_is_not_told_of_its_image_stays_as_it_was(
    now: dict[str, str], image: str | None, revision: str | None
) -> None:
    kept = with_earlier({"image": "a", "revision": "1", "threads": "2"}, {"threads": "4", **now})
    assert (kept.get("image"), kept.get("revision"), kept["threads"]) == (image, revision, "4")
