"""What a person sees while it trains."""

import io
import logging

import pytest

from trainer.runtime.progress import Progress


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


@pytest.mark.parametrize(("left", "words"), [(59, "0:59"), (61, "1:01"), (3599, "59:59"), (3600, "1:00:00"), (93784, "26:03:04")])
def test_the_time_left_is_that_of_the_steps_left_at_the_speed_so_far(
    left: int, words: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed at step 100 of 300: the 100 steps before count for nothing."""
    logging.getLogger("trainer").propagate = True
    clock = iter([50.0, 50.0 + left])
    monkeypatch.setattr("trainer.runtime.progress.time.monotonic", lambda: next(clock))
    progress = Progress(100, 300, 1)
    with caplog.at_level(logging.INFO):
        progress.update(200, 3.0, {"l1": 8.0})
    assert [record.message for record in caplog.records] == [f"step 200/300  3.0 images/s  L1 8  left {words}"]


def test_lines_come_every_ten_seconds_and_at_the_end(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    logging.getLogger("trainer").propagate = True
    clock = iter([0.0, 4.0, 9.9, 10.0, 19.9, 20.0, 20.1])
    monkeypatch.setattr("trainer.runtime.progress.time.monotonic", lambda: next(clock))
    progress = Progress(0, 6, 1)
    with caplog.at_level(logging.INFO):
        for step in range(1, 7):
            progress.update(step, 0.0, {"l1": 8.0})
    assert [record.message for record in caplog.records] == ["step 3/6  L1 8", "step 5/6  L1 8", "step 6/6  L1 8"]
