"""What is said of the input: shares and speeds of intervals, one warning, and the figure in the line of progress."""

import logging
from collections.abc import Iterator

import pytest

from trainer.runtime import meter
from trainer.runtime.meter import Fed, InputWatch, Meter
from trainer.runtime.progress import Progress


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logging.getLogger("trainer").propagate = True
    with caplog.at_level(logging.INFO):
        yield caplog


def measured(monkeypatch: pytest.MonkeyPatch, *blocks: tuple[float, float, int]) -> Meter:
    """A meter after blocks of one step, of so many seconds, seconds waited and bytes read; half a second goes between them."""
    now, waited, read, found = 100.0, 0.0, 0, Meter(batch_size=1)
    for seconds, waits, reads in blocks:
        monkeypatch.setattr(meter.time, "perf_counter", lambda now=now: now)
        found.start(waited, read)
        now, waited, read = now + seconds, waited + waits, read + reads
        monkeypatch.setattr(meter.time, "perf_counter", lambda now=now: now)
        found.stop(1, waited, read)
        now += 0.5
    return found


def test_an_interval_is_all_blocks_but_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, (30.0, 25.0, 9_000_000), (2.0, 0.5, 3_000_000), (2.0, 1.5, 5_000_000))
    interval = found.end_interval()
    assert interval == pytest.approx((4.0, 2.0, 8_000_000))
    assert interval.wait_share == pytest.approx(0.5)
    assert interval.mb_per_second == pytest.approx(2.0)
    assert found.end_interval() == Fed(), "the next one begins"


def test_of_the_last_blocks_the_newest_counts_most(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = (2.0, 1.0, 0), (2.0, 0.0, 0)
    share = measured(monkeypatch, fast, slow, fast, fast).fed.wait_share
    assert share == pytest.approx(0.49 / (2 * (1 + 0.7 + 0.49)))


def test_nothing_measured_is_no_share() -> None:
    assert (Fed().wait_share, Fed().mb_per_second) == (0.0, 0.0)


def test_the_clock_of_the_day_may_be_set_forward() -> None:
    assert Fed(seconds=1.0, waited=3600.0).wait_share == 1.0


def test_a_slow_input_is_said_once_with_what_to_change(lines: pytest.LogCaptureFixture) -> None:
    watch = InputWatch()
    for _ in range(5):
        watch.look(Fed(10.0, 4.0, 82_000_000))
    (line,) = (record for record in lines.records if record.levelno == logging.WARNING)
    assert line.message.startswith("input-bound: the devices waited for input for 40 % of the last 10 s, 8.2 MB/s were read; ")
    assert [word for word in ("data.cache", "data.readers", "runtime.threads", "JPEG", "size") if word not in line.message] == []


def test_a_slow_input_is_said_again_after_it_was_fast(lines: pytest.LogCaptureFixture) -> None:
    watch = InputWatch()
    for share in (0.11, 0.5, 0.06, 0.2, 0.04, 0.5):  # at 6 % it is still near the limit
        watch.look(Fed(10.0, 10 * share))
    assert [record.levelname for record in lines.records] == ["WARNING", "INFO", "WARNING"]


def test_a_fast_input_is_not_worth_a_line(lines: pytest.LogCaptureFixture) -> None:
    watch = InputWatch()
    for share in (0.0, 0.05, 0.099):
        watch.look(Fed(10.0, 10 * share))
    assert lines.records == []


def test_short_intervals_are_judged_together(lines: pytest.LogCaptureFixture) -> None:
    watch = InputWatch()
    for waited in (0.9, 0.0, 0.0):
        watch.look(Fed(1.0, waited))
    assert [record.message.partition(";")[0] for record in lines.records] == [
        "input-bound: the devices waited for input for 45 % of the last 2 s, 0.0 MB/s were read"
    ]


def test_the_line_of_progress_tells_of_the_input(lines: pytest.LogCaptureFixture) -> None:
    Progress(0, 10, 2).update(10, 3.0, {"l1": 8.0}, Fed(10.0, 0.31, 124_000_000))
    assert [record.message for record in lines.records] == ["step 10/10  3.0 images/s  input 3 %  12.4 MB/s  L1 8  left 0:00"]


def test_before_anything_is_measured_it_does_not(lines: pytest.LogCaptureFixture) -> None:
    Progress(0, 10, 2).update(10, 0.0, {"l1": 8.0}, Fed())
    assert [record.message for record in lines.records] == ["step 10/10  L1 8"]


def test_meter_leaves_the_compiling_block_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 30.0, 30.0, 31.0, 31.0, 32.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))
    measured = Meter(batch_size=4)
    assert measured.steps_per_block() == 1
    for steps in (1, 10, 10):
        measured.start()
        measured.stop(steps)
    assert measured.images_per_second == pytest.approx(40.0)
    assert measured.steps_per_block() == 20
