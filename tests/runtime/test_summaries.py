"""What TensorBoard is given: scalars once each, also after a kill."""

import errno
import json
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from tests.helpers.disks import small_disk
from tests.helpers.events import Scalar, scalars_of
from tests.helpers.waiting import wait_until
from trainer.runtime.summaries import Summaries, open_summaries
from trainer.trained import TrainedRun

INPUT = {"input/wait_share", "input/mb_per_second"}  # not before the second block is timed


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


def test_each_kind_has_a_file_of_its_own(tmp_path: Path) -> None:
    summaries = Summaries(tmp_path)
    summaries.scalars("train", {"loss": 1.0, "speed": 2.0}, 1)
    summaries.scalars("val", {"l1": 3.0}, 1)
    summaries.close()
    found = {path.parent.name: scalars_of(path) for path in tmp_path.glob("*/events*")}
    assert found == {"train": [(1, "loss", 1.0), (1, "speed", 2.0)], "val": [(1, "l1", 3.0)]}


def test_what_is_flushed_is_in_the_file_before_it_is_closed(tmp_path: Path) -> None:
    summaries = Summaries(tmp_path)
    summaries.scalars("train", {"loss": 1.0}, 1)
    summaries.flush()
    assert steps_in(tmp_path) == [(1, "loss", 1.0)]
    summaries.close()


def test_workers_other_than_the_chief_write_no_file(tmp_path: Path) -> None:
    summaries = open_summaries(tmp_path, lambda: None, writes=False)
    summaries.scalars("train", {"loss": 1.0}, 1)
    summaries.cut_after(0)
    summaries.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_of_the_system_that_names_the_folder(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        summaries = Summaries(disk.path / "summaries")
        summaries.scalars("train", {"loss": 1.0}, 1)
        summaries.flush()
        disk.fill()
        with pytest.raises(OSError, match="No space left on device") as caught:
            for step in range(2, 100):  # a page of the disk is begun, and has room for some
                summaries.scalars("train", {"loss": 1.0}, step)
                summaries.flush()
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(disk.path / "summaries"))
        disk.free()
        again = Summaries(disk.path / "summaries")
        again.cut_after(1)
        again.scalars("train", {"loss": 5.0}, 2)
        again.close()
        assert steps_in(disk.path / "summaries") == [(1, "loss", 1.0), (2, "loss", 5.0)]


def ask(address: str, path: str, **query: str) -> object:
    """What TensorBoard answers."""
    with urllib.request.urlopen(f"{address}{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_tensorboard_shows_the_scalars_of_a_run(trained_run: TrainedRun, tmp_path: Path) -> None:
    log, folder = tmp_path / "tensorboard.log", trained_run.folder.summaries
    command = [str(Path(sys.executable).with_name("tensorboard")), f"--logdir={folder}", "--host=127.0.0.1", "--port=0"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: re.search(r"http://\S+", log.read_text()), process, what="TensorBoard's address")
        found = re.search(r"http://[^/\s]+", log.read_text())
        assert found
        wait_until(lambda: "val" in str(ask(found[0], "/data/plugin/scalars/tags")), process, what="the scalars of val")
        tags = ask(found[0], "/data/plugin/scalars/tags")
        shown = ask(found[0], "/data/plugin/scalars/scalars", run="val", tag="l1")
    finally:
        process.kill()
        process.wait()
    assert isinstance(tags, dict)
    assert isinstance(shown, list)
    assert {run: set(names) for run, names in tags.items()} == {
        "val": {"l1", "psnr", "ssim"},
        "train": {"loss/discriminator", "loss/generator_gan", "loss/l1", "images_per_second"} | (set(tags["train"]) & INPUT),
    }
    measured = {entry["step"]: entry["l1"] for entry in trained_run.folder.metrics() if entry["split"] == "val"}
    assert {step: value for _, step, value in shown} == pytest.approx(measured, rel=1e-6)
    assert len(measured) > 1
