"""Summaries, pictures, files, meter and progress."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from trainer.runtime import files, meter, pictures
from trainer.runtime.progress import Progress
from trainer.runtime.summaries import Summaries


def steps_in(folder: Path) -> list[tuple[int, str, float]]:
    found = []
    for path in sorted(folder.glob("*/events*")):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            found += [(event.step, value.tag, float(tf.make_ndarray(value.tensor))) for value in event.summary.value]
    return found


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
