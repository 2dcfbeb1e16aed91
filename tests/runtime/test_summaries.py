"""What TensorBoard is given: scalars once each, also after a kill."""

from pathlib import Path

import pytest

from tests.helpers.events import Scalar, scalars_of
from trainer.runtime.summaries import Summaries


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
